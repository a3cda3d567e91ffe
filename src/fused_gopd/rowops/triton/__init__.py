"""The row operations as Triton kernels, for NVIDIA and AMD GPUs.

``rows.py`` holds the kernel over rows of logits, ``segments.py`` the one with several programs a row, ``linear.py``
the one that takes the statistics from hidden states, ``policy.py``, ``losses.py`` and ``scale.py`` those over vectors;
this file decides what they are launched with. Importing it needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import inspect
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ...installing import extra
from .. import (
    GradientWeights,
    LinearExponentials,
    LogitTransform,
    ModelRows,
    Policy,
    PolicyRule,
    PolicyStat,
    RowDivergence,
    RowProblem,
    Stat,
    SumTerm,
)
from ..torch import scale_

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)

_launches = 0


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were first imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from . import rows

    return not isinstance(rows.row_kernel, importlib.import_module("triton").JITFunction)


def unavailable_reason() -> str | None:
    """Why this backend cannot be used here; None if it can."""
    gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        if gpu or os.environ.get("TRITON_INTERPRET") == "1":
            return f"the package triton is not installed: {extra('triton')}"
    elif gpu or interpreted():
        return None
    return "PyTorch sees no GPU, and TRITON_INTERPRET=1 is not set"  # installing triton would not help


def launches() -> int:
    """How many kernels this process has launched, so that a test can see that they ran."""
    return _launches


@dataclass(frozen=True)
class Device:
    """What the choice of tiles may depend on: properties of the device model, never its state."""

    warp_size: int = 32
    multiprocessors: int = 132
    amd: bool = False
    capability: int = 90  # CUDA compute capability, major * 10 + minor; 0 on AMD
    interpreted: bool = False
    l2_bytes: int = 50 * 2**20

    @property
    def flush(self) -> bool:
        """Whether the kernels may ask for NVIDIA's exponential, see ``rows.exp``."""
        return not self.amd and not self.interpreted

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Device:
        if device.type != "cuda":  # the interpreter: any number will do, a small one makes fewer programs
            return Device(multiprocessors=4, interpreted=True)
        properties = torch.cuda.get_device_properties(device)
        amd = torch.version.hip is not None
        return Device(
            warp_size=getattr(properties, "warp_size", 64 if amd else 32),
            multiprocessors=properties.multi_processor_count,
            amd=amd,
            capability=0 if amd else 10 * properties.major + properties.minor,
            l2_bytes=properties.L2_cache_size,
        )


@dataclass(frozen=True)
class Tiles:
    """The tile of the row kernel: [repeat, lanes, vector] columns, lanes being the threads of a program.

    With ``segments`` > 1 programs share rows (``segments.py``), which reads a logit from memory once where a gradient
    is made with the statistics. No hardware has run that yet, so `tiles` does not choose it.
    """

    repeat: int
    lanes: int
    vector: int
    num_warps: int
    stages: int
    max_registers: int | None = None  # per thread; None leaves the choice to the compiler
    segments: int = 1  # of a row, a power of two
    programs: int = 2  # on a multiprocessor, of segments > 1
    lag_bytes: int | None = None  # logits between the two readings of a row; None is a third of L2


@dataclass(frozen=True)
class LinearTiles:
    """The tile of the linear kernel: rows, vocabulary entries and hidden units; up to ``group`` row tiles share L2."""

    rows: int
    vocabulary: int
    hidden: int
    group: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None leaves the choice to the compiler
    descriptors: bool = False  # the copy engine of Hopper and later fetches the operands
    # Two choices that `linear_tiles` never makes: they compile, no GPU has run them (docs/gpu-kernels.md).
    warp_specialize: bool = False  # copies and products in warps of their own, on Hopper
    flatten: bool = False  # the loops over tiles and hidden units as one


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of a matrix: rows that start on multiples of 16 bytes."""
    row_bytes = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row_bytes > 0 and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0


def tiles(problem: RowProblem, device: Device) -> Tiles:
    """The row kernel's tile, from the problem alone and not the operation: `statistics` and `gradient` agree on it.

    Where every row starts on a multiple of 16 elements a thread loads 16 bytes at a time, single elements otherwise.
    256 threads leave registers for several programs on a multiprocessor. The statistics passes fetch tiles ahead into
    shared memory.

    On Hopper a thread has one such load per model and tile, and up to three tiles are ahead: measured on an H200 and an
    H100 (1024 rows of 151936, see docs/performance-log.md), a second load takes 3 to 40 % longer in float32 and other
    numbers of threads up to 25 %. Elsewhere, not measured, it is 8 columns and one tile ahead, from compile-time
    resources (tests/helpers/triton_resources.py): with Hopper's tiles the jsd would spill on other GPUs.

    Three models with a softcap, a second round with lambda per token, and a mixture with kappa near an end, keep too
    much per column: half the columns; in 16 bits, where that is one load still, one tile ahead.

    Left alone, NVIDIA's compilers spill some of these kernels to fit one more program on a multiprocessor, each version
    others (seen in 3.6 to 3.9; tables in tests/data). Told how many registers it may take none of them does: 128 are
    two programs; with single loads, whose addresses are all live, 255 are one. So several models are told; on Hopper,
    whose tiles were measured left alone, only the demanding ones, since what is allowed is taken: `full` in float32
    would have 74 registers for 40, three programs for six.
    """
    given = [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    raws = [m.raw for m in given]
    itemsize = max(raw.element_size() for raw in raws)
    aligned = all(map(_aligned, raws))
    vector = 16 // itemsize if aligned else 1
    softcap = any(m.transform.softcap is not None for m in given)
    divergence = problem.divergence
    second_round = divergence is not None and divergence.second_round
    per_token = isinstance(problem.reward_scale, Tensor)
    kind, constants = (None, ()) if divergence is None else (divergence.kind, divergence.constants)
    skewed = kind == "mixture" and constants[6] != 0  # kappa; constants[3] is near_end
    heavy = len(given) == 3 and (softcap or (second_round and per_token) or (skewed and constants[3] != 0))
    repeat, stages = max(1, (4 if heavy else 8) // vector), 2
    if aligned and device.capability == 90:
        repeat = 1
        if itemsize == 4:
            stages = 4
        elif len(given) > 1 and not heavy:
            stages = 3
    demanding = (heavy and (second_round or per_token or not aligned)) or kind == "alpha" or skewed
    demanding = demanding or (kind == "mixed" and itemsize == 2)
    limited = len(given) > 1 and not device.amd and (demanding or device.capability != 90)
    max_registers = (128 if aligned else 255) if limited else None
    threads = 256
    return Tiles(
        repeat=repeat,
        lanes=threads,
        vector=vector,
        num_warps=threads // device.warp_size,
        stages=stages,
        max_registers=max_registers,
    )


def linear_tiles(
    hidden: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    input_precision: str,
    device: Device,
    out: Tensor | None = None,
) -> LinearTiles:
    """The linear kernel's tile, the largest that compiles without spills for what the epilogue and operands need.

    ``out`` is where it stores exponentials; None is statistics alone.

    Hopper's tensor cores want 256 columns (with 128, the operands' traffic through shared memory exceeds its
    bandwidth): 128 x 256 accumulators over 8 warps leave registers for an epilogue without softcap and bias. Elsewhere
    such an epilogue gets fewer accumulators per thread. That, group and stages were measured on an H200; what other
    devices get, and the tiles of ``out``, is from compile-time resources (triton_resources.py), not measured yet.
    """
    rows, H = hidden.shape
    eight_warps = 256 // device.warp_size  # the threads of 8 NVIDIA warps
    plain_epilogue = transform.softcap is None and transform.bias is None
    if input_precision == "ieee" and hidden.dtype == torch.float32:
        # No tensor core: the operands pass through registers. A limit of registers as in `tiles`.
        narrow = H % 16 == 0 and device.capability < 100
        limit = None if plain_epilogue or device.amd else 128 if narrow else 255
        return LinearTiles(
            rows=64,
            vocabulary=64 if plain_epilogue else 32,
            hidden=16,
            group=16,
            num_warps=eight_warps,
            num_stages=2,
            max_registers=limit,
        )
    # Left alone, NVIDIA's compilers spill on Blackwell to fit two programs on a multiprocessor, as in `tiles`, those
    # of Triton 3.8 and 3.9 also if told 128 registers: one program.
    blackwell = 255 if device.capability >= 100 else None
    matrices = [hidden, weight] if out is None else [hidden, weight, out]
    aligned = all(x.stride(0) % 16 == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0 for x in matrices)
    descriptors = device.capability >= 90 and all(map(_copyable, matrices))
    if not descriptors and (not aligned or H % 64 != 0):
        # Loads narrower than 16 bytes, or masked, keep their addresses and values in registers.
        return LinearTiles(
            rows=64,
            vocabulary=64,
            hidden=32,
            group=16,
            num_warps=eight_warps,
            num_stages=2,
            max_registers=blackwell,
        )
    depth = 128 // hidden.element_size()  # 128 bytes of a row: the widest swizzle of shared memory
    stages = 2 if device.amd else 3
    if rows <= 16:
        return LinearTiles(
            rows=16, vocabulary=64, hidden=depth, group=16, num_warps=4, num_stages=stages, descriptors=descriptors
        )
    if rows <= 64:
        # 4 warps have too few registers for softcap or bias, and on Ampere for any epilogue beside addresses.
        ampere = not device.amd and device.capability < 90
        return LinearTiles(
            rows=64,
            vocabulary=128,
            hidden=depth,
            group=16,
            num_warps=8 if ampere or not (plain_epilogue or device.amd) else 4,
            num_stages=stages,
            max_registers=255 if ampere else None,
            descriptors=descriptors,
        )
    if device.amd:
        return LinearTiles(rows=128, vocabulary=128, hidden=depth, group=16, num_warps=4, num_stages=stages)
    width = 256 if device.capability == 90 and plain_epilogue else 128
    if width == 256 and descriptors and rows <= 1024 and H >= 2048 and hidden.element_size() == 2:
        # Measured for 1024 rows: 0.78 to 1.01 times the time of the tile below at H = 2048, 0.92 to 1.06 at H = 4096,
        # 1.02 to 1.04 at H = 1024.
        depth, stages = depth // 2, 4
    return LinearTiles(
        rows=128,
        vocabulary=width,
        hidden=depth,
        group=24,
        num_warps=8,
        num_stages=stages,
        max_registers=blackwell,
        descriptors=descriptors,
    )


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything but the device. Tests compile these for GPUs that are not there.

    Attributes:
        hold: whether launches on NVIDIA's GPUs go through compiled kernels that are kept. ``JITFunction.run`` binds,
            specialises and looks up each argument anew, which takes the host two to four times as long. Triton's
            environment variables are then read at the first launch alone. Off: it has not run on a GPU.
    """

    hold: ClassVar[bool] = False

    kernel: Any
    grid: int
    arguments: dict[str, Any]  # tensors, numbers and None
    constants: dict[str, Any]  # tl.constexpr parameters
    options: dict[str, Any] = field(default_factory=dict)
    workspace: bool = False  # whether the kernel makes descriptors, in memory that Triton asks of an allocator

    def run(self, device: torch.device) -> None:
        global _launches
        _launches += 1
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            self._start(device)
        else:
            with torch.cuda.device(device):  # Triton launches on the current device
                self._start(device)

    def _start(self, device: torch.device) -> None:
        if self.workspace:
            context = contextvars.copy_context()  # the caller's allocator stays what it is
            context.run(importlib.import_module("triton").set_allocator, _workspace)
            context.run(self._launch, device)
        else:
            self._launch(device)

    def _launch(self, device: torch.device) -> None:
        if self.hold and device.type == "cuda" and torch.version.hip is None:
            self.start_held(device)
        else:
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)

    def start_held(self, device: torch.device) -> None:
        """Launch the kernel that was compiled for these arguments, which goes by all that Triton may compile in."""
        key = (
            self.kernel,
            device,
            *self.arguments,
            *[None if x is None else _compiled_in(x) for x in self.arguments.values()],
            *self.constants,
            *self.constants.values(),
            *map(type, self.constants.values()),  # 1, 1.0 and True are one key
            *self.options.items(),
        )
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = self.kernel.warmup(grid=(1,), **self.arguments, **self.constants, **self.options)
            compiled = _compiled[key] = compiled.result() if hasattr(compiled, "result") else compiled
        compiled[self.grid, 1, 1](*_in_order(self.kernel)({**self.arguments, **self.constants}))


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # the current device's; aligned to 512 bytes


_compiled: dict[tuple[Any, ...], Any] = {}


@functools.cache
def _in_order(kernel: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Arguments by name -> in the order of the kernel's parameters, in which a compiled kernel takes them."""
    return operator.itemgetter(*inspect.signature(kernel.fn).parameters)


def _compiled_in(x: Any) -> Any:
    """What of an argument that is no constant Triton may specialise a kernel for, on NVIDIA's GPUs; not less."""
    kind = type(x)
    if kind is int:
        return 1 if x == 1 else (x % 16 == 0, -(1 << 31) <= x < 1 << 31, x < 1 << 63)
    if kind is float:
        return kind
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    fields = dict(vars(x))  # of a TensorDescriptor: its block, how it is padded, ...
    base, shape, strides = (fields.pop(name) for name in ("base", "shape", "strides"))
    return kind, _compiled_in(base), *map(_compiled_in, (*shape, *strides)), repr(fields)


def _transform_arguments(transform: LogitTransform) -> tuple[int, float, float]:
    """(kind, pre, post) of a transform, see rows.py. With a softcap tanh's argument and result absorb the constants."""
    from . import rows

    if transform.softcap is not None:
        pre, post = transform.scale / transform.softcap, transform.softcap / transform.temperature
        return rows.SOFTCAPPED.value, pre, post
    scale = transform.scale / transform.temperature
    return (rows.PLAIN.value if scale == 1.0 else rows.SCALED.value), scale, 1.0


def _bias(transform: LogitTransform) -> Tensor | None:
    return None if transform.bias is None else transform.bias.detach().contiguous()


class _ModelArguments(NamedTuple):
    """What the row kernel takes of one model, made once per ``ModelRows``."""

    arguments: dict[str, Any]
    kind: int
    facts: tuple[int, bool, bool] | None  # all that `tiles` looks at


@functools.cache
def _absent(name: str) -> _ModelArguments:
    """None and neutral numbers."""
    absent: dict[str, Any] = {f"{name}_ptr": None, f"{name}_stride": 0, f"{name}_bias": None}
    return _ModelArguments(absent | {f"{name}_pre": 1.0, f"{name}_post": 1.0}, 0, None)


def _model_arguments(name: str, model: ModelRows | None) -> _ModelArguments:
    if model is None:
        return _absent(name)
    kept = model.kept.get(name)
    if kept is not None:
        return cast("_ModelArguments", kept)
    raw, transform = model.raw, model.transform
    if raw.dtype not in _FLOATING:
        raise ValueError(f"backend='triton' takes float32, bfloat16 and float16 logits, got {raw.dtype}")
    if raw.shape[1] > 1 and raw.stride(1) != 1:
        raise ValueError(f"logits must have unit stride along the vocabulary, got strides {raw.stride()}")
    kind, pre, post = _transform_arguments(transform)
    arguments = {
        f"{name}_ptr": raw.detach(),
        f"{name}_stride": raw.stride(0),
        f"{name}_bias": _bias(transform),
        f"{name}_pre": pre,
        f"{name}_post": post,
    }
    made = _ModelArguments(arguments, kind, (raw.element_size(), _aligned(raw), transform.softcap is not None))
    model.kept[name] = made
    return made


def _aligned(raw: Tensor) -> bool:
    """Whether every row starts on a multiple of 16 elements."""
    return raw.stride(0) % 16 == 0 and raw.data_ptr() % 16 == 0


def _vector(x: Tensor) -> Tensor:
    """(C,) float32 of any stride."""
    x = x.detach() if x.requires_grad else x
    return x if x.dtype is torch.float32 else x.to(torch.float32)


def _options(num_warps: int, max_registers: int | None) -> dict[str, Any]:
    limit = {} if max_registers is None else {"maxnreg": max_registers}  # AMD's compiler does not know the option
    return {"num_warps": num_warps} | limit


_DIVERGENCE_NUMBERS = ("a", "one_minus_a", "turn", "c_t", "c_p", "kappa", "forward_weight_ptr")
# The largest exponent of a product in alpha, that of objective.divergences.finite_exp: a sum of them over a vocabulary
# is a float32.
_LARGEST_EXPONENT = math.log(torch.finfo(torch.float32).max) - 24.0


@functools.lru_cache
def _divergence_numbers(kind: str, constants: tuple[float, ...], weight: float | None) -> tuple[dict[str, Any], bool]:
    """The row kernel's numbers for a divergence, None where it takes none, and its NEAR_END."""
    numbers: dict[str, Any] = dict.fromkeys(_DIVERGENCE_NUMBERS)
    if kind == "alpha":
        (alpha,) = constants
        # below |alpha| = 4e-7 the largest exponent is smaller, since h~ is the product divided by alpha
        largest = min(_LARGEST_EXPONENT, math.log(abs(alpha)) + 80.0)
        found = (alpha, 1.0 - alpha, largest, 1.0 / (alpha * (alpha - 1.0)), -1.0 / alpha, None, None)
        return dict(zip(_DIVERGENCE_NUMBERS, found, strict=True)), alpha > 0.5
    if kind == "mixture":
        b, rest, turn, near_end, c_t, c_p, kappa = constants
        numbers |= {"a": b, "turn": turn, "c_t": c_t, "c_p": c_p, "one_minus_a": rest}
        return numbers | {"kappa": None if kappa == 0 else kappa}, bool(near_end)
    return numbers | {"a": weight}, False


def _divergence_arguments(divergence: RowDivergence | None) -> tuple[str, dict[str, Any], bool]:
    """DIVERGENCE, with what :func:`_divergence_numbers` gives."""
    if divergence is None:
        return "none", *_divergence_numbers("none", (), None)
    kind = divergence.kind
    if kind != "mixed":
        return kind, *_divergence_numbers(kind, divergence.constants, None)
    weight: float | Tensor = divergence.forward_weight  # type: ignore[attr-defined]
    if not isinstance(weight, Tensor):
        return kind, *_divergence_numbers(kind, (), float(weight))
    numbers, near_end = _divergence_numbers(kind, (), None)
    return kind, numbers | {"forward_weight_ptr": _vector(weight).contiguous()}, near_end


_POLICY_TENSORS = ("policy_teacher_ptr", "policy_ref_ptr", "policy_scale_ptr", "old_ptr", "rollout_ptr")
_NO_POLICY: dict[str, Any] = {
    **dict.fromkeys((*_POLICY_TENSORS, "policy_share", *PolicyRule().numbers)),
    "policy_teacher_stride": 0,
    "policy_ref_stride": 0,
}


@functools.lru_cache
def _rule_numbers(rule: PolicyRule) -> dict[str, float]:
    return rule.numbers


def _unit_stride(statistics: Tensor | None) -> Tensor | None:
    return statistics if statistics is None or statistics.stride(1) == 1 else statistics.contiguous()


def _policy_arguments(policy: Policy | None) -> tuple[dict[str, Any], bool]:
    """Arguments of ``policy_term``, and its NEAR_TEACHER."""
    if policy is None:
        return _NO_POLICY, False
    lam, teacher, ref = policy.reward_scale, _unit_stride(policy.teacher), _unit_stride(policy.ref)
    if teacher is None and ref is None:
        raise ValueError("a policy needs a teacher or a reference")
    near_teacher = not isinstance(lam, Tensor) and lam > 0.5
    given = (lam if isinstance(lam, Tensor) else None, policy.old_logprobs, policy.rollout_logprobs)
    scale, old, rollout = (None if x is None else _vector(x).contiguous() for x in given)
    return {
        "policy_teacher_ptr": teacher,
        "policy_teacher_stride": 0 if teacher is None else teacher.stride(0),
        "policy_ref_ptr": ref,
        "policy_ref_stride": 0 if ref is None else ref.stride(0),
        "policy_share": 0.0 if isinstance(lam, Tensor) else float(lam - near_teacher),
        "policy_scale_ptr": scale,
        "old_ptr": old,
        "rollout_ptr": rollout,
        **_rule_numbers(policy.rule),
    }, near_teacher


def policy_launch(policy: Policy, statistics: Tensor, out: Tensor) -> Launch:
    """The rows of PolicyStat into ``out`` (len(PolicyStat), C)."""
    from . import policy as kernels

    arguments, near_teacher = _policy_arguments(policy)
    rows, block = out.shape[1], 128
    student = {"student_ptr": statistics, "student_stride": statistics.stride(0)}
    return Launch(
        kernel=kernels.policy_kernel,
        grid=math.ceil(rows / block),
        arguments={**student, "out_ptr": out, "out_stride": out.stride(0), "C": rows, **arguments},
        constants={"POLICY_NEAR_TEACHER": near_teacher, "BLOCK_C": block},
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


def losses_launch(
    divergence: RowDivergence, reward_scale: float | Tensor, has: tuple[bool, bool], statistics: Tensor, out: Tensor
) -> Launch:
    """The token losses into ``out`` (C,)."""
    from . import losses as kernels

    if not any(has):
        raise ValueError(f"divergence={divergence.name!r} needs a teacher or a reference")
    kind = "second round" if divergence.second_round else divergence.kind
    weight: float | Tensor | None = divergence.forward_weight if kind == "mixed" else None  # type: ignore[attr-defined]
    near_teacher = not isinstance(reward_scale, Tensor) and reward_scale > 0.5
    rows, block = out.shape[0], 128
    return Launch(
        kernel=kernels.losses_kernel,
        grid=math.ceil(rows / block),
        arguments={
            "stats_ptr": statistics,
            "stats_stride": statistics.stride(0),
            "out_ptr": out,
            "C": rows,
            "share": 0.0 if isinstance(reward_scale, Tensor) else float(reward_scale - near_teacher),
            "reward_scale_ptr": _vector(reward_scale).contiguous() if isinstance(reward_scale, Tensor) else None,
            "weight": None if weight is None or isinstance(weight, Tensor) else float(weight),
            "weight_ptr": _vector(weight).contiguous() if isinstance(weight, Tensor) else None,
        },
        constants={
            "DIVERGENCE": kind,
            "HAS_TEACHER": has[0],
            "HAS_REF": has[1],
            "NEAR_TEACHER": near_teacher,
            "BLOCK_C": block,
        },
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


def _row_arguments(
    problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor | None, tile: Tiles, flush: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments, constants and options that the row kernel has with one program a row and with several."""
    lam = problem.reward_scale
    teacher, ref = problem.teacher, problem.ref
    if not isinstance(lam, Tensor) and teacher is not None and ref is not None:
        # cancelled models are not read, as with a tensor
        teacher, ref = (None if lam == 0 else teacher), (None if lam == 1 else ref)
    models = (
        _model_arguments("student", problem.student),
        _model_arguments("teacher", teacher),
        _model_arguments("ref", ref),
    )
    transform = problem.student.transform
    kind, numbers, near_end = _divergence_arguments(problem.divergence)
    near_teacher = not isinstance(lam, Tensor) and lam > 0.5
    policy = None if out is None else weights.policy
    policy_arguments, policy_near_teacher = _policy_arguments(policy)
    w_d, w_y = (None if out is None or w is None else _vector(w) for w in (weights.divergence, weights.token))
    aliased = False
    if out is not None:
        memory = out.untyped_storage().data_ptr()  # 0 on the meta device
        given = (problem.student, teacher, ref)
        aliased = any(m is not None and m.raw.untyped_storage().data_ptr() == memory != 0 for m in given)
    arguments: dict[str, Any] = {
        **models[0].arguments,
        **models[1].arguments,
        **models[2].arguments,
        **numbers,
        **policy_arguments,
        "share": 0.0 if isinstance(lam, Tensor) else float(lam - near_teacher),
        "reward_scale_ptr": _vector(lam).contiguous() if isinstance(lam, Tensor) else None,
        "token_ptr": None if problem.token_ids is None else problem.token_ids.contiguous(),
        "stats_ptr": statistics,
        "stats_stride": statistics.stride(0),
        "divergence_weight_ptr": w_d,
        "divergence_weight_stride": 0 if w_d is None else w_d.stride(0),
        "token_weight_ptr": w_y,
        "token_weight_stride": 0 if w_y is None else w_y.stride(0),
        "out_ptr": out,
        "out_stride": 0 if out is None else out.stride(0),
        "slope": transform.scale / transform.temperature,
        "tanh_of_z": 0.0 if transform.softcap is None else transform.temperature / transform.softcap,
        "V": problem.vocab_size,
    }
    constants = {
        "POLICY": policy is not None,
        "POLICY_NEAR_TEACHER": policy_near_teacher,
        "STUDENT_KIND": models[0].kind,
        "TEACHER_KIND": models[1].kind,
        "REF_KIND": models[2].kind,
        "NEAR_TEACHER": near_teacher,
        "NEAR_END": near_end,
        "DIVERGENCE": kind,
        "ALIASED": aliased,
        "REPEAT": tile.repeat,
        "LANES": tile.lanes,
        "VECTOR": tile.vector,
        "STAGES": tile.stages,
        "FLUSH": flush,
    }
    # Without FMA contraction, see rows.py.
    return arguments, constants, {**_options(tile.num_warps, tile.max_registers), "enable_fp_fusion": False}


def row_launch(
    problem: RowProblem,
    statistics: Tensor,
    write_statistics: bool,
    weights: GradientWeights,
    out: Tensor | None,
    tile: Tiles,
    flush: bool,
    redo: Tensor | None = None,
) -> Launch:
    """The row kernel for a problem; ``out`` None leaves out the gradient, and with neither it makes a second round.

    ``redo`` (C,) int32 leaves out the rows where it is 0.
    """
    from . import rows

    arguments, constants, options = _row_arguments(problem, statistics, weights, out, tile, flush)
    return Launch(
        kernel=rows.row_kernel,
        grid=problem.rows,
        arguments={**arguments, "redo_ptr": redo},
        constants={**constants, "STATISTICS": write_statistics},
        options=options,
    )


def lag_rows(problem: RowProblem, tile: Tiles, device: Device) -> int:
    """Rows between the first and the second reading of a row: L2 has room for twice their logits, and gradients.

    Their segments should be more than the programs that run at a time, or programs wait for one another.
    """
    given = [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    row_bytes = problem.vocab_size * sum(m.raw.element_size() for m in given)
    return max(1, min(problem.rows, (tile.lag_bytes or device.l2_bytes // 3) // row_bytes))


def segment_launches(
    problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor | None, tile: Tiles, device: Device
) -> tuple[Launch, Launch]:
    """Statistics, and with an ``out`` the gradient, by several programs a row; then the rows that need a second look.

    ``out`` may be the student's logits, but not of a narrower dtype over them: it would lie over logits of other
    segments, which are still to be read.
    """
    from . import segments

    if tile.segments & (tile.segments - 1):
        raise ValueError(f"segments must be a power of two, got {tile.segments}")
    arguments, constants, options = _row_arguments(problem, statistics, weights, out, tile, device.flush)
    raw = problem.student.raw
    if constants["ALIASED"] and out is not None and (out.dtype, out.stride()) != (raw.dtype, raw.stride()):
        raise ValueError(
            f"with segments={tile.segments} a gradient over the logits must have their dtype and strides, {raw.dtype} "
            f"and {raw.stride()}, got {out.dtype} and {out.stride()}: give it memory of its own"
        )
    rows = problem.rows
    counters = torch.zeros(1 + 3 * rows, dtype=torch.int32, device=raw.device)
    scanned, second, redo = counters[1:].view(3, rows)
    launch = Launch(
        kernel=segments.segments_kernel,
        grid=device.multiprocessors * tile.programs,
        arguments={
            **arguments,
            "partial_ptr": raw.new_empty((rows, segments.FIELDS.value, tile.segments), dtype=torch.float32),
            "ticket_ptr": counters,
            "scanned_ptr": scanned,
            "second_ptr": second,
            "redo_ptr": redo,
            "C": rows,
            "lag": lag_rows(problem, tile, device),
        },
        constants={**constants, "SEGMENTS": tile.segments},
        options=options,
    )
    return launch, row_launch(problem, statistics, True, weights, out, tile, device.flush, redo)


# Triton's default until 3.9, and the other from 3.10 on.
_FUSED = {"enable_fp_fusion": True}


def _gemm_launch(
    hidden: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    vocab_size: int,
    token_ids: Tensor,
    partial: Tensor,
    tile: LinearTiles,
    input_precision: str,
    widen: bool,
    flush: bool,
    offset: Tensor | None = None,
    first: Tensor | None = None,
    out: Tensor | None = None,
) -> Launch:
    """The linear kernel; ``partial`` is (splits, 4, C). ``offset``, ``first`` and ``out`` as its pointers."""
    from . import linear

    kind, pre, post = _transform_arguments(transform)
    rows, splits = hidden.shape[0], partial.shape[0]
    operands: list[Any] = [hidden.detach(), weight.detach(), out]
    if tile.warp_specialize:
        _check_specializable(tile, hidden, weight, transform, out)
    elif tile.descriptors:
        descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
        operands[0] = descriptor(operands[0], [tile.rows, tile.hidden])
        operands[1] = descriptor(operands[1], [tile.vocabulary, tile.hidden])
        if out is not None:
            operands[2] = descriptor(out[:, :vocab_size], [tile.rows, tile.vocabulary // 2])
    return Launch(
        kernel=linear.linear_kernel,
        grid=math.ceil(rows / tile.rows) * splits,
        arguments={
            "hidden_ptr": operands[0],
            "hidden_stride": hidden.stride(0),
            "hidden_stride_h": hidden.stride(1),
            "weight_ptr": operands[1],
            "weight_stride": weight.stride(0),
            "weight_stride_h": weight.stride(1),
            "bias_ptr": _bias(transform),
            "pre": pre,
            "post": post,
            "token_ptr": token_ids.contiguous(),
            "partial_ptr": partial,
            "offset_ptr": offset,
            "first_ptr": first,
            "out_ptr": operands[2],
            "out_stride": 0 if out is None else out.stride(0),
            "C": rows,
            "V": vocab_size,
            "H": hidden.shape[1],
            "splits": splits,
            "group": group_size(rows, tile),
        },
        constants={
            "KIND": kind,
            "INPUT_PRECISION": input_precision,
            "WIDEN": widen,
            "EVEN_H": hidden.shape[1] % tile.hidden == 0,
            "DESCRIPTORS": tile.descriptors,
            "BLOCK_C": tile.rows,
            "BLOCK_V": tile.vocabulary,
            "BLOCK_H": tile.hidden,
            "FLUSH": flush,
            "WARP_SPECIALIZE": tile.warp_specialize,
            "FLATTEN": tile.flatten,
        },
        options=_options(tile.num_warps, tile.max_registers) | {"num_stages": tile.num_stages} | _FUSED,
        workspace=tile.warp_specialize,
    )


def _check_specializable(
    tile: LinearTiles, hidden: Tensor, weight: Tensor, transform: LogitTransform, out: Tensor | None
) -> None:
    """Compilers would ignore the wish in silence, spill, or copy from addresses that the copy engine cannot take."""
    if not (tile.descriptors and tile.num_warps == 4 and tile.rows == 128):
        raise ValueError(f"warp_specialize takes descriptors, num_warps=4 and rows=128, got {tile}")
    if transform.softcap is not None or transform.bias is not None:
        raise ValueError("warp_specialize takes a transform without softcap and bias: others spill")
    for name, x in (("hidden", hidden), ("weight", weight), ("out", out)):
        if x is not None and not _copyable(x):
            raise ValueError(f"warp_specialize: rows of {name} must have unit stride and start on 16 bytes")


_MERGE_ROWS = 128  # rows per program of a merge: C * splits * 16 bytes in all, too little to matter


def linear_launches(
    hidden: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    vocab_size: int,
    token_ids: Tensor,
    partial: Tensor,
    statistics: Tensor,
    tile: LinearTiles,
    input_precision: str,
    widen: bool,
    flush: bool,
) -> tuple[Launch, Launch]:
    """The linear kernel with the kernel that merges its splits; ``partial`` is (splits, 4, C)."""
    from . import linear

    gemm = _gemm_launch(
        hidden, weight, transform, vocab_size, token_ids, partial, tile, input_precision, widen, flush
    )  # fmt: skip
    merge = Launch(
        kernel=linear.merge_kernel,
        grid=math.ceil(hidden.shape[0] / _MERGE_ROWS),
        arguments={
            "partial_ptr": partial,
            "stats_ptr": statistics,
            "stats_stride": statistics.stride(0),
            "C": hidden.shape[0],
            "splits": partial.shape[0],
        },
        constants={"STATS": len(Stat), "BLOCK_C": _MERGE_ROWS},
        options={"num_warps": 4} | _FUSED,
    )
    return gemm, merge


def exponential_launches(
    hidden: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    vocab_size: int,
    token_ids: Tensor,
    vectors: Tensor,
    partial: Tensor,
    out: Tensor,
    statistics: Tensor,
    tile: LinearTiles,
    input_precision: str,
    widen: bool,
    flush: bool,
) -> tuple[Launch, Launch, Launch, Launch]:
    """``linear_exponentials``; ``partial`` is (2, splits, 4, C), ``vectors`` (3, C): z[token], factor, entry."""
    from . import linear

    kind, pre, post = _transform_arguments(transform)
    rows = hidden.shape[0]
    token_ids, (logit, factor, entry) = token_ids.contiguous(), vectors
    block = 8
    token_logit = Launch(
        kernel=linear.token_logit_kernel,
        grid=math.ceil(rows / block),
        arguments={
            "hidden_ptr": hidden.detach(),
            "hidden_stride": hidden.stride(0),
            "hidden_stride_h": hidden.stride(1),
            "weight_ptr": weight.detach(),
            "weight_stride": weight.stride(0),
            "weight_stride_h": weight.stride(1),
            "bias_ptr": _bias(transform),
            "pre": pre,
            "post": post,
            "token_ptr": token_ids,
            "logit_ptr": logit,
            "C": rows,
            "V": vocab_size,
            "H": hidden.shape[1],
        },
        constants={"KIND": kind, "BLOCK_C": block, "BLOCK_H": 256},
        options={"num_warps": 4} | _FUSED,
    )
    redo = tile
    if tile.warp_specialize:  # compilers fail on what the second round reads of the first, and few programs have work
        redo = replace(tile, warp_specialize=False, num_warps=2 * tile.num_warps)
    rounds = [
        _gemm_launch(
            hidden, weight, transform, vocab_size, token_ids, written, chosen, input_precision, widen, flush,
            logit, first, out,
        )
        for written, first, chosen in ((partial[0], None, tile), (partial[1], partial[0], redo))
    ]  # fmt: skip
    merge = Launch(
        kernel=linear.merge_exponentials_kernel,
        grid=math.ceil(rows / _MERGE_ROWS),
        arguments={
            "partial_ptr": partial,
            "offset_ptr": logit,
            "token_ptr": token_ids,
            "stats_ptr": statistics,
            "stats_stride": statistics.stride(0),
            "factor_ptr": factor,
            "entry_ptr": entry,
            "slope": transform.scale / transform.temperature,
            "C": rows,
            "V": vocab_size,
            "splits": partial.shape[1],
        },
        constants={"STATS": len(Stat), "BLOCK_C": _MERGE_ROWS},
        options={"num_warps": 4} | _FUSED,
    )
    return token_logit, rounds[0], rounds[1], merge


def scale_launch(x: Tensor, factor: Tensor, out: Tensor) -> Launch:
    """``out = x * factor`` for contiguous ``x`` and ``out`` of its size, and a float32 factor ()."""
    from . import scale

    block, blocks = 4096, 8  # four 16-byte loads of float32 a thread; few programs to start where nothing is to do
    arguments = {"x_ptr": x, "factor_ptr": factor, "out_ptr": out, "size": x.numel()}
    return Launch(
        kernel=scale.scale_kernel,
        grid=math.ceil(x.numel() / (block * blocks)),
        arguments=arguments,
        constants={"IN_PLACE": out is x, "BLOCK": block, "BLOCKS": blocks},
        options={"num_warps": 8, "enable_fp_fusion": False},
    )


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * factor).to(dtype)``, rounded once, for contiguous ``x`` and a float32 factor (); over x if it may be."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        scale_launch(x, factor, out).run(x.device)
    return out


def group_size(rows: int, tile: LinearTiles) -> int:
    """Row tiles of a group: groups are alike, or the last one would leave most of the device without work."""
    row_tiles = math.ceil(rows / tile.rows)
    return math.ceil(row_tiles / math.ceil(row_tiles / tile.group))


def splits(rows: int, vocab_size: int, tile: LinearTiles, device: Device) -> int:
    """Slices of the vocabulary in :func:`linear_launches`: enough that a group of row tiles fills the device."""
    slices = device.multiprocessors // group_size(rows, tile)
    return max(1, min(slices, math.ceil(vocab_size / tile.vocabulary)))


def _input_precision(dtype: torch.dtype, device: Device) -> str:
    """float32 products are float32 unless the user's PyTorch settings allow TF32. AMD's TF32 is left out."""
    if dtype != torch.float32 or device.amd:
        return "ieee"
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    # where the newer setting exists, reading the older one raises once the user has set the newer
    allowed = torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def wrong_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    if device.type == "cuda" or interpreted():
        return None
    return f"backend='triton' runs on GPU tensors, got tensors on {device} (set TRITON_INTERPRET=1 to interpret)"


def row_ops() -> TritonRowOps:
    return TritonRowOps()


class TritonRowOps:
    """See :class:`fused_gopd.rowops.RowOps` for the formulas; ``tile`` and ``linear_tile`` override the tables."""

    name = "triton"

    def __init__(self, tile: Tiles | None = None, linear_tile: LinearTiles | None = None) -> None:
        self._tile = tile
        self._linear_tile = linear_tile

    @property
    def kinds(self) -> frozenset[str]:
        from . import rows

        return rows.KINDS

    def statistics(self, problem: RowProblem, out: Tensor | None = None) -> Tensor:
        statistics = self._statistics(problem.student.raw, out)
        self._launch(problem, statistics, True, _NO_WEIGHTS, None)
        return statistics

    def gradient(self, problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor) -> None:
        if statistics.stride(1) != 1:
            statistics = statistics.contiguous()
        self._launch(problem, statistics, False, weights, out)

    def second_round(self, problem: RowProblem, statistics: Tensor) -> Tensor:
        statistics = statistics.clone(memory_format=torch.contiguous_format)
        self._launch(problem, statistics, False, _NO_WEIGHTS, None)
        return statistics[Stat.CENTRE : Stat.VALUE + 1]

    def statistics_and_gradient(
        self, problem: RowProblem, weights: GradientWeights, out: Tensor, statistics: Tensor | None = None
    ) -> Tensor:
        statistics = self._statistics(problem.student.raw, statistics)
        self._launch(problem, statistics, True, weights, out)
        return statistics

    def policy(self, policy: Policy, statistics: Tensor) -> Tensor:
        if statistics.stride(1) != 1:
            statistics = statistics.contiguous()
        out = torch.empty((len(PolicyStat), statistics.shape[1]), dtype=torch.float32, device=statistics.device)
        if statistics.shape[1]:
            policy_launch(policy, statistics, out).run(statistics.device)
        return out

    def losses(
        self, divergence: RowDivergence, reward_scale: float | Tensor, has: tuple[bool, bool], statistics: Tensor
    ) -> Tensor:
        if divergence.kind not in self.kinds:
            raise ValueError(f"backend='triton' has no kernel for divergence={divergence.name!r}")
        if statistics.stride(1) != 1:
            statistics = statistics.contiguous()
        out = torch.empty(statistics.shape[1], dtype=torch.float32, device=statistics.device)
        if statistics.shape[1]:
            losses_launch(divergence, reward_scale, has, statistics, out).run(statistics.device)
        return out

    def linear_statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """None where the dtypes differ or are not float32, bfloat16 or float16, and below compute capability 8.0."""
        if hidden.dtype != weight.dtype or hidden.dtype not in _FLOATING:
            return None
        device = Device.of(hidden.device)
        if not device.amd and device.capability < 80:  # no bfloat16, and not a target the tiles were compiled for
            return None
        statistics = self._statistics(hidden, out)
        if hidden.shape[0] == 0:
            return statistics
        precision = _input_precision(hidden.dtype, device)
        tile = self._linear_tile or linear_tiles(hidden, weight, transform, precision, device)
        parts = splits(hidden.shape[0], vocab_size, tile, device)
        partial = torch.empty(parts, 4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        widen = interpreted() and hidden.dtype == torch.bfloat16
        for launch in linear_launches(
            hidden, weight, transform, vocab_size, token_ids, partial, statistics, tile, precision, widen, device.flush
        ):
            launch.run(hidden.device)
        return statistics

    def linear_exponentials(
        self,
        hidden: Tensor,
        weight: Tensor,
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,
        exponentials: Tensor,
        out: Tensor | None = None,
    ) -> LinearExponentials | None:
        """None with a softcap, for other operands than bfloat16, and where ``linear_statistics`` is None."""
        if transform.softcap is not None or {hidden.dtype, weight.dtype, exponentials.dtype} != {torch.bfloat16}:
            return None
        device = Device.of(hidden.device)
        if not device.amd and device.capability < 80:
            return None
        rows = hidden.shape[0]
        statistics = self._statistics(hidden, out)
        vectors = torch.empty(3, rows, dtype=torch.float32, device=hidden.device)
        if rows > 0:
            tile = self._linear_tile or linear_tiles(hidden, weight, transform, "ieee", device, exponentials)
            parts = splits(rows, vocab_size, tile, device)
            partial = torch.empty(2, parts, 4, rows, dtype=torch.float32, device=hidden.device)
            for launch in exponential_launches(
                hidden, weight, transform, vocab_size, token_ids, vectors, partial, exponentials, statistics, tile,
                "ieee", interpreted(), device.flush,
            ):  # fmt: skip
                launch.run(hidden.device)
        return LinearExponentials(statistics, vectors[1], vectors[2])

    def add_logprobs(self, out: Tensor, model: ModelRows, vocab_size: int, statistics: Tensor, term: SumTerm) -> bool:
        return False

    def scale_(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return scaled(gradient, factor, dtype) if factor.dtype == torch.float32 else scale_(gradient, factor)

    @staticmethod
    def _statistics(like: Tensor, out: Tensor | None) -> Tensor:
        """Memory of the statistics of C rows: the caller's, or new."""
        shape = (len(Stat), like.shape[0])
        if out is None:
            return torch.empty(shape, dtype=torch.float32, device=like.device)
        if out.shape != shape or out.dtype is not torch.float32 or out.device != like.device:
            raise ValueError(
                f"statistics must be float32 {shape} on {like.device}, "
                f"got {out.dtype} {tuple(out.shape)} on {out.device}"
            )
        row_stride, stride = out.stride()
        if shape[1] > 1 and (stride != 1 or row_stride < shape[1]):
            raise ValueError(f"statistics must be rows of unit stride, got strides {(row_stride, stride)}")
        return out

    def _launch(
        self, problem: RowProblem, statistics: Tensor, write: bool, weights: GradientWeights, out: Tensor | None
    ) -> None:
        if problem.rows == 0:
            return
        raw = problem.student.raw
        device = Device.of(raw.device)
        tile = self._tile or _tile_of(problem, device)
        if write and tile.segments > 1:
            for launch in segment_launches(problem, statistics, weights, out, tile, device):
                launch.run(raw.device)
        else:
            row_launch(problem, statistics, write, weights, out, tile, device.flush).run(raw.device)


_NO_WEIGHTS = GradientWeights()
_tiles: dict[Any, Tiles] = {}


def _tile_of(problem: RowProblem, device: Device) -> Tiles:
    """`tiles`, worked out once for what they depend on: ``key`` has all that `tiles` reads of a problem."""
    divergence = problem.divergence
    key = (
        _model_arguments("student", problem.student).facts,
        _model_arguments("teacher", problem.teacher).facts,
        _model_arguments("ref", problem.ref).facts,
        None if divergence is None else (divergence.kind, divergence.second_round, divergence.constants),
        isinstance(problem.reward_scale, Tensor),
        device,
    )
    tile = _tiles.get(key)
    if tile is None:
        tile = _tiles[key] = tiles(problem, device)
    return tile
