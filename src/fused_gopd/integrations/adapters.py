"""Frozen models made of the student's own modules: ``"adapter:PATH"`` and ``"student"`` in the place of a model's path.

A student with a PEFT adapter has a frozen base. Another adapter on that base is another model whose only new memory is
its own: :func:`with_adapter` copies the student's modules (not its tensors), takes the student's adapter off the copy,
and puts the other one on. The student is not touched: nothing is switched, saved or hooked, and gradient checkpointing
recomputes what it computed.

:func:`frozen_copy` is the student as it is now: its modules are copied, and of its tensors those that are trained. Of a
student with an adapter these are the adapter's, of any other student all.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import isinstance_if_imported
from ..installing import packages
from . import needs
from .hub import ADAPTER


def _place(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


def require_adapter(name: str, path: str, base: str = "") -> Any:
    """Read an adapter's configuration; raise for one that is no frozen addition to the base.

    Args:
        name: of the model that the adapter makes, for messages.
        path: a folder or a name on the hub.
        base: the path or hub name of the student's base, "" if it is not known.

    Raises:
        ValueError: no adapter, one of another base, or one that changes weights of the base when it is loaded.
    """
    with needs(__name__, "peft", install=partial(packages, "peft>=0.18")):
        from peft import PeftConfig
    place = _place(path)
    if Path(place).is_dir() and not Path(place, "adapter_config.json").is_file():  # peft would ask the hub, and wait
        raise ValueError(
            f"{name} must be {ADAPTER} and a PEFT adapter, and the folder {path} has no adapter_config.json"
        )
    try:
        config: Any = PeftConfig.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} must be {ADAPTER} and a PEFT adapter, and {path} is none: {error}") from None
    own = str(config.base_model_name_or_path or "")
    if base and own and Path(own).name != Path(base).name:
        raise ValueError(
            f"{name}, {path}, is an adapter of {own}, and the student's base is {base}: on another base it is another "
            "model. If they are one, write its name into base_model_name_or_path of adapter_config.json"
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"{name}, {path}, has bias={config.bias!r}: it changes biases of the base, which the student has, too. "
            "Merge it into a model of its own (merge_and_unload)"
        )
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"{name}, {path}, has init_lora_weights={start!r}: it changes weights of the base, which the student has, "
            "too. Save it as a plain LoRA (path_initial_model_for_weight_conversion), or merge it (merge_and_unload)"
        )
    return config


def base_of(student: Any) -> str:
    """The path or hub name of the base of a PEFT model, "" if it is not known."""
    active = student.peft_config.get(student.active_adapter) if isinstance(student.active_adapter, str) else None
    return str(getattr(active, "base_model_name_or_path", None) or getattr(student.config, "_name_or_path", "") or "")


def with_adapter(name: str, student: Any, path: str) -> nn.Module:
    """The student's base with another adapter, frozen, in evaluation mode; its tensors are the base's own.

    Raises:
        TypeError: the student is no PEFT model.
        ValueError: as :func:`require_adapter`; the student trains parameters of its base, which this model would share;
            the adapter's weights are not all there, or do not fit.
    """
    if not isinstance_if_imported(student, "peft", "PeftModel"):
        raise TypeError(
            f"{name} is an adapter on the student's base, and the student, {type(student).__name__}, has no PEFT "
            "adapter, so that its training changes that base: pass peft_config, or the path of a whole model"
        )
    config = require_adapter(name, path, base_of(student))
    base = _base(student)
    trained = next((n for n, p in base.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise ValueError(
            f"{name} is an adapter on the student's base, and the student trains {trained} of that base: it would "
            "change with it. Train adapters alone (bias='none'; modules_to_save trains copies)"
        )
    before = _versions(base)
    model = _loaded(name, base, path, config)
    if {k: v for k, v in _versions(model.get_base_model()).items() if k in before} != before:
        raise RuntimeError(f"{name}, {path}, has changed tensors of the student's base while it was loaded")
    frozen: nn.Module = model.requires_grad_(False).eval()  # those of the base are frozen already
    return frozen


def frozen_copy(student: nn.Module) -> nn.Module:
    """The student as it is now, frozen, in evaluation mode: its trained parameters are copied, its frozen ones shared.

    Floating-point buffers are copied, too, since a forward in training mode may write to them (running means).
    """
    shared: list[Tensor] = [x for x in student.parameters() if not x.requires_grad]
    shared += [x for x in student.buffers() if not x.is_floating_point()]  # quantised weights, masks
    shared += _tensors_in_attributes(student)
    memo: dict[int, Any] = {id(x): x for x in shared}
    made = copy.deepcopy(student, memo)
    for module in made.modules():
        if isinstance(module, nn.Linear) and "forward" in vars(module):  # GRPOTrainer's, which has the weight's owner
            module.forward = _rebound(module.forward, memo)  # type: ignore[method-assign]
    _put_back_forwards(made, set(student.modules()))
    return made.requires_grad_(False).eval()  # what is shared is frozen already


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """A function whose closure has the copies in place of the modules that were copied; ``memo`` is of deepcopy."""
    if not isinstance(function, FunctionType):
        return function
    cells = tuple(CellType(memo.get(id(cell.cell_contents), cell.cell_contents)) for cell in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _tensors_in_attributes(model: nn.Module) -> list[Tensor]:
    """Tensors that are neither parameters nor buffers, such as the scales of quantised weights."""
    return [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)]


def _base(student: Any) -> nn.Module:
    """The base of a PEFT model without its adapters: other modules, with the same parameters and buffers."""
    from peft.utils.other import ModulesToSaveWrapper

    tensors = [*student.parameters(), *student.buffers(), *_tensors_in_attributes(student)]
    whole: Any = copy.deepcopy(student, {id(x): x for x in tensors})
    for module in list(whole.modules()):
        for child_name, child in list(module._modules.items()):
            if isinstance(child, ModulesToSaveWrapper):  # whose unloading leaves the trained copy
                module._modules[child_name] = child.original_module
    base: nn.Module = whole.get_base_model() if whole.active_peft_config.is_prompt_learning else whole.unload()
    _put_back_forwards(base, set(student.modules()))
    return base


def _put_back_forwards(base: nn.Module, of_student: set[nn.Module]) -> None:
    """Remove replaced forwards that would run the student's: a copied function has the closure of its original."""
    for module in base.modules():
        forward = vars(module).get("forward")
        function: Any = getattr(forward, "__func__", forward)
        held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        owners = [getattr(x, "__self__", x) for x in held]
        if not any(isinstance(x, nn.Module) and x in of_student for x in owners):
            continue
        if isinstance(module, nn.Linear):  # GRPOTrainer's, which multiplies with its own weight in float32
            continue
        home = function.__globals__["__name__"]  # not its name, which may be that of the function that it wraps
        if not home.startswith("trl."):
            raise TypeError(
                f"the student's forward was replaced by one of {home}, which runs the student whatever model it is "
                "called on: no other model can be made of its modules. Pass the path of a whole model"
            )
        del module.forward  # log-probs in place of logits, which a teacher has no use for


def _versions(model: nn.Module) -> dict[int, tuple[int, int]]:
    """By tensor: where its memory is, and how often it was written."""
    return {id(x): (x.data_ptr(), x._version) for x in (*model.parameters(), *model.buffers())}


def _loaded(name: str, base: Any, path: str, config: Any) -> Any:
    from peft import get_peft_model

    config.inference_mode = True
    device = next(base.parameters()).device
    try:
        # PEFT initialises an adapter before it loads it: the student's random numbers stay those of a run without it
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model: Any = get_peft_model(base, config)
            found = model.load_adapter(_place(path), "default", torch_device=str(device))
    except Exception as error:  # damaged files make PEFT raise many types of exceptions
        raise ValueError(f"{name}, {path}, does not fit the student's base, or cannot be read: {error}") from error
    wrong = [*found.missing_keys, *found.unexpected_keys]
    if wrong:
        what = "lacks" if found.missing_keys else "has for no layer of the student's base"
        raise ValueError(f"{name}, {path}, {what} {len(wrong)} of its weights, such as {wrong[0]}")
    return model
