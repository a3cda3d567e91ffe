"""The head of a checkpoint, without the body: what turns last hidden states from elsewhere into logits.

::

    head = load_head("teachers/math")  # reads the head's tensors alone, memory-mapped
    out = fg.gopd_loss(student, head(hidden), None, token_ids, estimator="full")

The model's class is built from its config without weights (on the meta device), the head's tensors are put into it, and
:func:`fused_gopd.integrations.transformers.head_of` takes the head from there: the same families, and the same factor,
softcap and removed rows, measured by the model's own code. ``docs/teachers.md`` has what it is for.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
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

    from .transformers import head_of
    from .transformers.causal import find_head

__all__ = ["CheckpointHead", "load_head"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


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
            ``model.safetensors``, or its index and those shards that have the head. Other shards may be missing.
        device: where to put the tensors. The default is the CPU, where they are views of the mapped file: pages are
            read when they are used.
        norm: whether the hidden states are those before the model's final norm, which is then applied to them.
        trust_remote_code: whether code of the folder may run, as in ``from_pretrained``.

    Returns:
        The head, frozen, in the dtype of the file.

    Raises:
        ValueError: no such folder; one of an adapter; one without safetensors (pickled weights are not read); a file
            that is damaged; tensors that are missing or of another shape; code of the folder, unless trusted.
        TypeError: a model without a linear head, as for ``head_of``; a quantised head.
        RuntimeError: the model changes its logits in a way that no :class:`fused_gopd.LinearHead` does.
    """
    source = str(path)
    folder = Path(path).expanduser()
    config = _config(folder, trust_remote_code)
    model = _without_weights(config, folder, trust_remote_code)
    file = _Folder(folder, model)
    head = find_head(model).head
    file.fill(head)
    final_norm = None
    if norm:
        raise NotImplementedError("norm=True: the next commit")
    with torch.no_grad():
        found = head_of(model, torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype))  # type: ignore
    to = partial(Tensor.to, device="cpu" if device is None else device)
    return CheckpointHead(
        weight=to(found.weight.detach()),
        bias=None if found.bias is None else to(found.bias.detach()),
        logit_scale=found.logit_scale,
        softcap=found.softcap,
        final_norm=None if final_norm is None else final_norm.to(device="cpu" if device is None else device),
        source=source,
        config=json.dumps(config.to_diff_dict(), sort_keys=True, default=str),
    )


# ------------------------------------------------------------------------------------------ the model, without weights


def _config(folder: Path, trust_remote_code: bool) -> Any:
    if not folder.is_dir():
        raise ValueError(f"path must be the folder of a model, with config.json and safetensors: there is no {folder}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is the folder of an adapter: give that of its base model if the adapter leaves the head alone, "
            "or else merge it, model.merge_and_unload().save_pretrained(folder)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"path must be the folder of a model: {folder} has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the config of {folder} cannot be read: {error}") from error


def _without_weights(config: Any, folder: Path, trust_remote_code: bool) -> PreTrainedModel:
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
        f"{folder} must be a causal language model, got model_type {config.model_type!r}, architectures {names}, which "
        f"transformers {transformers.__version__} does not have"
    )


# -------------------------------------------------------------------------------------------------------------- tensors


class _Folder:
    """The tensors of a folder by the names that the model has for them."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder, self.model = folder, model
        self.stored = self._files()  # the checkpoint's name -> the file that has it
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

    def _files(self) -> dict[str, Path]:
        index, single = self.folder / _INDEX, self.folder / _WEIGHTS
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.folder / str(file) for name, file in found.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from None
        if not single.is_file():
            pickled = sorted(x.name for x in self.folder.glob("*.bin"))
            also = f", but {pickled[0]}, which is pickled and not read: save it anew, model.save_pretrained(folder)"
            raise ValueError(f"{self.folder} has neither {_WEIGHTS} nor {_INDEX}{also if pickled else ''}")
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def fill(self, module: nn.Module) -> None:
        """Give a module on the meta device its stored parameters, in their own dtype."""
        (path,) = [name for name, m in self.model.named_modules() if m is module]
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
                f"{self.folder} has no tensor for {' or '.join(names)}: is it the folder of a part of the model, of "
                "another model, or one with a quantised head?"
            )
        stored = self.names[name]
        if name in self.converted:
            raise ValueError(f"{self.folder} has {stored}, from which transformers makes {name}: that is not done here")
        path = self.stored[stored]
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {path.name}, which holds {stored} according to {_INDEX}")
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
