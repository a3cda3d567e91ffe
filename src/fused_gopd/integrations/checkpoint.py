"""The head of a checkpoint, without the body: what turns last hidden states from elsewhere into logits.

::

    head = load_head("teachers/math")  # reads the head's tensors alone, memory-mapped
    out = fg.gopd_loss(student, head(hidden), None, token_ids, estimator="full")

The model's class is built from its config without weights (on the meta device), the head's tensors are put into it, and
:func:`fused_gopd.integrations.transformers.head_of` takes the head from there: the same families, and the same factor,
softcap and removed rows, measured by the model's own code. ``docs/teachers.md`` has what it is for.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import LinearHead
from ..installing import packages
from . import needs

with needs(__name__, "transformers", "safetensors", install=partial(packages, "transformers>=5.0")):
    import transformers
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.utils.hub import cached_file

    from .hub import is_folder, require_model
    from .transformers import head_of
    from .transformers.causal import find_head
    from .transformers.final_norm import find_final_norm

__all__ = ["CheckpointHead", "load_head"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointHead:
    """A frozen head that was read by :func:`load_head`: called with hidden states it is a :class:`LinearHead` of them.

    Attributes:
        weight: (V, H), in the checkpoint's dtype.
        bias: (V,) or None.
        logit_scale, softcap: as in :class:`fused_gopd.LinearHead`, as the model's code has them.
        final_norm: the module that is applied to hidden states first (``norm=True``), or None.
        source: the path that was given.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    final_norm: nn.Module | None
    source: str
    config: str  # canonical JSON, for the fingerprint

    @torch.no_grad()
    def __call__(self, hidden: Tensor, *, temperature: float = 1.0) -> LinearHead:
        """The head on hidden states (..., H), in the dtype and on the device of the weight; no gradient flows there."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return LinearHead(
            hidden,
            self.weight,
            self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=temperature,
        )

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device | str) -> CheckpointHead:
        """The head on a device; the same object if it is there."""
        if self.device == torch.device(device):
            return self
        return replace(
            self,
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            final_norm=None if self.final_norm is None else copy.deepcopy(self.final_norm).to(device),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what was read: the bytes, dtypes and shapes of all tensors, factor, softcap, and the config.

        It is computed when it is first asked for, which reads every byte once. It identifies the head: two models that
        differ in their bodies alone have one fingerprint if their configs are the same.
        """
        found = hashlib.sha256(json.dumps([self.config, self.logit_scale, self.softcap]).encode())
        norm = {} if self.final_norm is None else self.final_norm.state_dict()
        tensors = {"weight": self.weight, "bias": self.bias, **{f"norm.{name}": norm[name] for name in sorted(norm)}}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in tensor.detach().reshape(-1).split(2**24):
                found.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def __repr__(self) -> str:
        parts = [f"{tuple(self.weight.shape)} {str(self.dtype).removeprefix('torch.')} on {self.device}"]
        parts += [name for name, there in (("bias", self.bias), ("final norm", self.final_norm)) if there is not None]
        parts += [f"logit_scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        return f"CheckpointHead({self.source}: {', '.join(parts)})"


def load_head(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    norm: bool = False,
    trust_remote_code: bool = False,
) -> CheckpointHead:
    """Read the head of a model that is not here: the tensors that turn its last hidden states into logits, alone.

    Args:
        path: a folder that ``save_pretrained`` wrote, or that was downloaded: ``config.json`` and
            ``model.safetensors``, or its index and those shards that have the head. Other shards may be missing. Or a
            name on the hub, of which these files are downloaded; or a GGUF file, whose head is dequantised to float32
            if it is quantised (needs gguf).
        device: where to put the tensors. The default is the CPU, where they are views of the mapped file: pages are
            read when they are used.
        norm: whether the hidden states are the outputs of the last layer, before the final norm. The model's own norm
            is then applied to them; its code has shown that nothing else is done in between.
        trust_remote_code: whether code of the folder may run, as in ``from_pretrained``.

    Returns:
        The head, frozen, in the dtype of the file.

    Raises:
        ValueError: no such folder; one of an adapter; one without safetensors (pickled weights are not read); a file
            that is damaged; tensors that are missing or of another shape; code of the folder, unless trusted.
        TypeError: a model without a linear head, as for ``head_of``; a quantised head; with ``norm``, a family in which
            more than a norm is between the last layer and the head, or none.
        RuntimeError: the model changes its logits in a way that no :class:`fused_gopd.LinearHead` does.
    """
    file: _Tensors | _Gguf
    if str(path).endswith(".gguf"):
        if norm:
            raise ValueError(
                f"norm must be False for a GGUF file, whose norms are stored in other forms, got {path}: take the "
                "folder of the same model"
            )
        config, model, file = _of_gguf(Path(path).expanduser())
    else:
        place = _Place(str(path))
        config = _config(place, trust_remote_code)
        model = _without_weights(config, place.name, trust_remote_code)
        file = _Tensors(place, model)
    head = find_head(model).head
    file.fill(head)
    final_norm = None
    if norm:
        final_norm = find_final_norm(model)
        file.fill(final_norm)
    with torch.no_grad():
        found = head_of(model, torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype))  # type: ignore
    if isinstance(file, _Gguf):
        file.require(found)
    device = "cpu" if device is None else device
    return CheckpointHead(
        weight=found.weight.detach().to(device),
        bias=None if found.bias is None else found.bias.detach().to(device),
        logit_scale=found.logit_scale,
        softcap=found.softcap,
        final_norm=None if final_norm is None else final_norm.to(device),
        source=str(path),
        config=json.dumps(config.to_diff_dict(), sort_keys=True, default=str),
    )


@dataclass(frozen=True)
class _Place:
    """A folder, or a name on the hub, and its files."""

    name: str

    def __post_init__(self) -> None:
        require_model("path", self.name)

    def file(self, name: str) -> Path | None:
        """A file, downloaded from the hub if it is there; None if there is none."""
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        found = cached_file(self.name, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)


# ------------------------------------------------------------------------------------------ the model, without weights


def _config(place: _Place, trust_remote_code: bool) -> Any:
    if place.file("adapter_config.json") is not None:
        raise ValueError(
            f"{place.name} is an adapter: give its base model if the adapter leaves the head alone, or else merge it, "
            "model.merge_and_unload().save_pretrained(folder)"
        )
    if place.file("config.json") is None:
        raise ValueError(f"path must be a model's folder: {place.name} has no config.json")
    try:
        return AutoConfig.from_pretrained(
            str(Path(place.name).expanduser()) if is_folder("path", place.name) else place.name,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the config of {place.name} cannot be read: {error}") from error


def _without_weights(config: Any, source: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config on the meta device."""
    own = getattr(config, "auto_map", None) or {}
    names = config.architectures or []
    with torch.device("meta"):
        if trust_remote_code and "AutoModelForCausalLM" in own:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=True)  # type: ignore
        for name in names:
            kind = getattr(transformers, name, None)
            if kind is not None:
                return kind._from_config(config)  # type: ignore[no-any-return]
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
            if type(config) in auto._model_mapping:
                return auto.from_config(config)  # type: ignore
    raise TypeError(
        f"{source} must be a causal language model, got model_type {config.model_type!r}, architectures {names}, which "
        f"transformers {transformers.__version__} does not have"
    )


# -------------------------------------------------------------------------------------------------------------- tensors


class _Tensors:
    """The tensors of a checkpoint by the names that the model has for them."""

    def __init__(self, place: _Place, model: PreTrainedModel) -> None:
        self.place, self.model = place, model
        self.stored = self._files()  # the checkpoint's name -> the name of the file that has it
        model.tie_weights()  # releases before transformers 5.1 do not do so on the meta device
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.aliases: dict[int, list[str]] = {}  # of a parameter: tied ones have several
        for name, parameter in parameters.items():
            self.aliases.setdefault(id(parameter), []).append(name)
        self.names: dict[str, str] = {}  # the model's name -> the checkpoint's
        self.converted: set[str] = set()  # those that transformers computes from what is stored
        rename = _renaming(model, {**parameters, **dict(model.named_buffers())})
        for stored in sorted(self.stored):
            name, converted = rename(stored)
            self.names[name] = stored
            if converted:
                self.converted.add(name)

    def _files(self) -> dict[str, str]:
        single = self.place.file(_WEIGHTS)  # first, as from_pretrained: an index of what was there before may be left
        if single is not None:
            with _opened(single) as file:
                return dict.fromkeys(file.keys(), _WEIGHTS)
        index = self.place.file(_INDEX)
        if index is not None:
            try:
                return {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from None
        pickled = next((x for x in _PICKLED if self.place.file(x) is not None), None)
        also = f", but {pickled}, which is pickled and not read: save it anew, model.save_pretrained(folder)"
        raise ValueError(f"{self.place.name} has neither {_WEIGHTS} nor {_INDEX}{also if pickled else ''}")

    def fill(self, module: nn.Module) -> None:
        """Give a module on the meta device its stored parameters, in their own dtype."""
        (path,) = [name for name, m in self.model.named_modules() if m is module]
        known = {f"{path}.{leaf}" for leaf, _ in module.named_parameters()}
        more = next((name for name in self.names if name.startswith(f"{path}.") and name not in known), None)
        if more is not None:  # scales, packed integers
            raise TypeError(
                f"{self.place.name} has {self.names[more]}, which {path} of the model has no place for: it is "
                "quantised, or of another model; leave the head out of it (modules_to_not_convert=['lm_head'])"
            )
        for leaf, parameter in list(module.named_parameters()):
            tensor = self._read(f"{path}.{leaf}", parameter)
            parent, _, last = leaf.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Parameter(tensor, requires_grad=False))

    def _read(self, own: str, parameter: Tensor) -> Tensor:
        """The stored tensor of a parameter. If the parameters that it is tied to are stored too, and others, its own
        is taken, as ``from_pretrained`` does, which then does not tie them."""
        names = [own, *(name for name in self.aliases[id(parameter)] if name != own)]
        name = next((name for name in names if name in self.names), None)
        if name is None:
            raise ValueError(
                f"{self.place.name} has no tensor for {' or '.join(names)}: is it a part of the model, another model, "
                "or one with a quantised head?"
            )
        stored = self.names[name]
        if name in self.converted:
            raise ValueError(f"{self.place.name} has {stored}, of which transformers makes {name}: not done here")
        path = self.place.file(self.stored[stored])
        if path is None:
            raise ValueError(
                f"{self.place.name} has no {self.stored[stored]}, which holds {stored} according to {_INDEX}"
            )
        with _opened(path) as file:
            try:
                tensor: Tensor = file.get_tensor(stored)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} has no {stored} that can be read: {error}") from None
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise TypeError(f"{stored} of {path} is quantised ({tensor.dtype}): leave the head out of the quantisation")
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{stored} of {path} must be {tuple(parameter.shape)}, as the config says, got {tuple(tensor.shape)}"
            )
        return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read, it is damaged or no safetensors file: {error}") from None


def _renaming(model: PreTrainedModel, known: dict[str, Tensor]) -> Callable[[str], tuple[str, bool]]:
    """Makes the model's name of a checkpoint's, and whether more than the name changes, as ``from_pretrained`` does."""
    conversions: list[Any] = get_model_conversion_mapping(model)
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    converters = [x for x in conversions if not isinstance(x, WeightRenaming)]

    def rename(stored: str) -> tuple[str, bool]:
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if name not in known and stored in known:
            return stored, False
        return name, converter is not None

    return rename


# ----------------------------------------------------------------------------------------------------------------- GGUF


def _of_gguf(path: Path) -> tuple[Any, PreTrainedModel, _Gguf]:
    if not path.is_file():
        raise ValueError(f"path must be a model: there is no file {path}")
    with needs(__name__, "gguf", install=partial(packages, "gguf>=0.17")):
        import gguf
    try:
        # a copy-on-write mapping: PyTorch has no tensors that cannot be written
        reader = gguf.GGUFReader(path, "c")
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} cannot be read, it is damaged, or of a model that is not known: {error}") from error
    file = _Gguf(path, gguf, reader)
    rows = file.weight.data.shape[0]
    config.get_text_config().vocab_size = rows  # the file has the tokenizer's, without padding
    model = _without_weights(config, str(path), False)
    return config, model, file


class _Gguf:
    """The head's tensors of a GGUF file."""

    def __init__(self, path: Path, gguf: Any, reader: Any) -> None:
        self.path, self.gguf, self.reader = path, gguf, reader
        self.tensors = {x.name: x for x in reader.tensors}
        found = self.tensors.get("output.weight", self.tensors.get("token_embd.weight"))
        if found is None:
            raise ValueError(
                f"{path} has neither output.weight nor token_embd.weight: of a split model, take that part"
            )
        self.weight = found

    def fill(self, head: nn.Module) -> None:
        given = {"weight": self.weight, "bias": self.tensors.get("output.bias")}
        for name, parameter in list(head.named_parameters()):
            stored = given.get(name)
            if stored is None:
                raise ValueError(f"{self.path} has no output.{name}, which the head of the model has")
            tensor = self._tensor(stored)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{stored.name} of {self.path} must be {tuple(parameter.shape)}, as its metadata say, got "
                    f"{tuple(tensor.shape)}"
                )
            setattr(head, name, nn.Parameter(tensor, requires_grad=False))

    def _tensor(self, stored: Any) -> Tensor:
        plain = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        dtype = plain.get(stored.tensor_type.name)
        if dtype is not None:
            return torch.from_numpy(stored.data.view("uint8")).view(dtype)
        try:
            return torch.from_numpy(self.gguf.dequantize(stored.data, stored.tensor_type))
        except NotImplementedError:
            raise TypeError(
                f"{stored.name} of {self.path} is quantised to {stored.tensor_type.name}, which gguf cannot dequantise"
            ) from None

    def require(self, head: LinearHead) -> None:
        """Raise if the metadata have another factor or softcap than the config that transformers makes of them."""
        for key, field in self.reader.fields.items():
            name, known = key.rpartition(".")[2], {"logit_scale": head.logit_scale}
            known["final_logit_softcapping"] = head.softcap or 0.0
            if name in known and abs(float(field.contents()) - known[name]) > 1e-6 * known[name]:
                raise ValueError(f"{self.path} has {key} {field.contents()}, which transformers reads as {known[name]}")
