"""The row operations as C++ kernels for CPU (``csrc/``): float32, bfloat16 and float16, accumulated in float32.

One call walks each row twice (three times for a divergence of two rounds): statistics, then the gradient while the
row is still in the cache. The kernels exist once per instruction set and the best that the machine has is taken;
``FUSED_GOPD_ISA`` (``baseline``, ``avx2`` or ``avx512``), read at the first use in a process, asks for another one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..installing import rebuild
from . import (
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
from .torch import scale_

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType in csrc/rowops.h
_INT64 = 3  # after these, in csrc/bind.cpp


# From this size on a float32 ``out`` is stored past the caches: nothing of it would still be there for the GEMM that
# reads it next, and the stores need not fetch what they overwrite. 1.1 times faster at 256 x 151936 on two Sapphire
# Rapids cores; the threshold is a common share of a last-level cache, not tuned.
_STREAM_BYTES = 1 << 24


@functools.cache
def _load() -> Any:
    """The extension, which shares out rows over the threads that PyTorch's own operators use.

    A pool of its own, or a second OpenMP runtime, would have as many threads again, and would not know of
    ``torch.set_num_threads``. Nor is PyTorch's library linked: its C++ interface changes with each version.
    torch_parallel_for is of its stable C interface, since PyTorch 2.10.
    """
    native = importlib.import_module("fused_gopd._native")
    library = ctypes.CDLL(torch._C.__file__)  # loaded already; its symbols include those of the libraries that it needs
    try:
        function = library.torch_parallel_for
    except AttributeError as error:
        raise ImportError(f"PyTorch {torch.__version__} has no torch_parallel_for") from error
    native.set_parallel_for(ctypes.cast(function, ctypes.c_void_p).value)
    return native


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used in this installation; None if they can."""
    try:
        _load()
    except ModuleNotFoundError:
        return (
            "the compiled extension, fused_gopd._native, is missing: this copy was not built, or without a C++17 "
            f"compiler. With one, this builds it: {rebuild()}"
        )
    except ImportError as error:
        return f"the compiled extension, fused_gopd._native, could not be imported: {error}"
    return None


def wrong_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    return None if device.type == "cpu" else f"backend='native' runs on CPU tensors, got tensors on {device}"


def row_ops() -> NativeRowOps:
    return NativeRowOps()


@functools.cache
def _kinds() -> dict[str, int]:
    """The number of each kind of divergence in the kernels, whose number for none is 0."""
    return {name: i for i, name in enumerate(_load().KINDS) if i}


@functools.cache
def _kind_names() -> frozenset[str]:
    return frozenset(_kinds())


class NativeRowOps:
    """See :class:`fused_gopd.rowops.RowOps` for the formulas. Rows are computed by PyTorch's threads.

    What the kernels are given are plain addresses, which they trust. A buffer of logits and its bias are checked when
    their ``ModelRows`` is used first, and again when their address has changed or another problem has other rows or
    columns. What the chunks of a walk have in common is held by the student's ``ModelRows``. All other tensors are
    checked in every call.
    """

    name = "native"

    @property
    def kinds(self) -> frozenset[str]:
        return _kind_names()

    def statistics(self, problem: RowProblem, out: Tensor | None = None) -> Tensor:
        statistics = _new_statistics(problem) if out is None else out
        _run(problem, _load().STATISTICS, statistics)
        return statistics

    def gradient(self, problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor) -> None:
        _run(problem, _load().GRADIENT, statistics, weights, out)

    def second_round(self, problem: RowProblem, statistics: Tensor) -> Tensor:
        if problem.divergence is None or not problem.divergence.second_round:
            name = None if problem.divergence is None else problem.divergence.name
            raise ValueError(f"second_round needs a divergence that has one, got {name!r}")
        _check_statistics("statistics", statistics, _rows(problem))
        statistics = statistics.detach().clone(memory_format=torch.contiguous_format)
        _run(problem, _load().SECOND_ROUND, statistics)
        return statistics[Stat.CENTRE : Stat.VALUE + 1]

    def statistics_and_gradient(
        self, problem: RowProblem, weights: GradientWeights, out: Tensor, statistics: Tensor | None = None
    ) -> Tensor:
        native = _load()
        statistics = _new_statistics(problem) if statistics is None else statistics
        _run(problem, native.STATISTICS | native.GRADIENT, statistics, weights, out)
        return statistics

    def policy(self, policy: Policy, statistics: Tensor) -> Tensor:
        rows = statistics.shape[-1] if statistics.dim() else 0
        alive: list[Tensor] = []
        address, stride = _statistics("statistics", statistics, rows, alive)
        out = torch.empty((len(PolicyStat), rows), dtype=torch.float32, device="cpu")
        _load().policy(
            policy=_policy(policy, rows, alive),
            rows=rows,
            statistics=address,
            statistics_stride=stride,
            out=out.data_ptr(),
            out_stride=rows,
        )
        return out

    def losses(
        self, divergence: RowDivergence, reward_scale: float | Tensor, has: tuple[bool, bool], statistics: Tensor
    ) -> Tensor:
        rows = statistics.shape[-1] if statistics.dim() else 0
        alive: list[Tensor] = []
        address, stride = _statistics("statistics", statistics, rows, alive)
        kind, weight = _kind(divergence)
        forward_weight, forward_weights = weight, 0
        if isinstance(weight, Tensor):
            forward_weight, forward_weights = 0.0, _vector("forward_weight", weight, rows, alive)
        if not any(has):
            raise ValueError(f"divergence={divergence.name!r} needs a teacher or a reference")
        scale, scales = 1.0, 0
        if isinstance(reward_scale, Tensor):
            scales = _vector("reward_scale", reward_scale, rows, alive)
        else:
            scale = reward_scale
        out = torch.empty(rows, dtype=torch.float32, device="cpu")
        _load().losses(
            divergence=kind,
            reward_scale=scale,
            reward_scales=scales,
            has_teacher=has[0],
            has_ref=has[1],
            forward_weight=forward_weight,
            forward_weights=forward_weights,
            rows=rows,
            statistics=address,
            statistics_stride=stride,
            out=out.data_ptr(),
        )
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
        return None

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
        return None

    def add_logprobs(self, out: Tensor, model: ModelRows, vocab_size: int, statistics: Tensor, term: SumTerm) -> bool:
        rows = model.raw.shape[0] if model.raw.dim() else 0
        if out.dtype is not torch.float32:
            raise TypeError(f"out must be torch.float32 for backend='native', got {out.dtype}")
        alive: list[Tensor] = []
        address, stride = _statistics("statistics", statistics, rows, alive)
        out_address, out_stride = _out(out, rows, vocab_size)
        weight, weights = _number_or_vector("weight", term.weight, rows, alive)
        total_weight, total_weights = _number_or_vector("total_weight", term.total_weight, rows, alive)
        _load().add(
            model=_model("model", model, rows, vocab_size),
            rows=rows,
            vocab=vocab_size,
            maximum=address + 4 * stride * Stat.MAX_STUDENT,
            logsum=address + 4 * stride * Stat.LOGSUM_STUDENT,
            weight=weight,
            weights=weights,
            total_weight=total_weight,
            total_weights=total_weights,
            mixture=term.mixture,
            first=term.first,
            last=term.last,
            out=out_address,
            out_stride=out_stride,
        )
        if not out.is_inference():
            increment_version(out)
        return True

    def scale_(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return scale_(gradient, factor)


def _rows(problem: RowProblem) -> int:
    """C, of a student that is not checked yet."""
    raw = problem.student.raw
    return raw.shape[0] if raw.dim() else 0


def _new_statistics(problem: RowProblem) -> Tensor:
    return torch.empty((len(Stat), _rows(problem)), dtype=torch.float32, device="cpu")


def _run(
    problem: RowProblem,
    steps: int,
    statistics: Tensor,
    weights: GradientWeights | None = None,
    out: Tensor | None = None,
) -> None:
    """The one place where a problem's tensors become addresses: in C++, or here if one needs a copy or is wrong."""
    native, token_ids = _load(), problem.token_ids
    job, rows, forward_weights = _job(problem)
    scales = problem.reward_scale if isinstance(problem.reward_scale, Tensor) else None
    w_d = w_y = policy = None
    alive: list[Tensor] = []  # copies that the kernels read
    dtype = 0
    if weights is not None and out is not None:
        w_d, w_y, dtype = weights.divergence, weights.token, _DTYPES.get(out.dtype, 0)
        if token_ids is None and (w_y is not None or weights.policy is not None):
            raise ValueError(f"{'token weights need' if weights.policy is None else 'a policy needs'} token_ids")
        if weights.policy is not None:
            policy = _policy(weights.policy, rows, alive)
    writes = steps != native.GRADIENT
    if not native.run_plain(job, steps, scales, forward_weights, token_ids, statistics, w_d, w_y, out, dtype, policy):
        forward_address = 0 if forward_weights is None else _vector("forward_weight", forward_weights, rows, alive)
        scales_address = 0 if scales is None else _vector("reward_scale", scales, rows, alive)
        ids_address = 0 if token_ids is None else _vector("token_ids", token_ids, rows, alive, _INT64)
        statistics_address, statistics_stride = _statistics("statistics", statistics, rows, alive, writes=writes)
        out_address, out_stride = (0, 0) if out is None else _out(out, rows, problem.vocab_size)
        d_address, d_stride = (0, 0) if w_d is None else _weight("weights.divergence", w_d, rows, alive)
        y_address, y_stride = (0, 0) if w_y is None else _weight("weights.token", w_y, rows, alive)
        native.run(
            job=job,
            steps=steps,
            reward_scales=scales_address,
            forward_weights=forward_address,
            token_ids=ids_address,
            statistics=statistics_address,
            statistics_stride=statistics_stride,
            divergence_weights=d_address,
            divergence_weight_stride=d_stride,
            token_weights=y_address,
            token_weight_stride=y_stride,
            out=out_address,
            out_stride=out_stride,
            out_dtype=dtype,
            policy=policy,
        )
    # autograd cannot see the kernel's stores
    if writes and not statistics.is_inference():
        increment_version(statistics)
    if out is not None and not out.is_inference():
        increment_version(out)


def _job(problem: RowProblem) -> tuple[Any, int, Tensor | None]:
    """What the chunks of a walk have in common: the kernels' ``Job``, its rows, and of ``mixed`` weights (C,).

    From an earlier call where that was for the same student and for all that is compared here.
    """
    student, teacher, ref, divergence = problem.student, problem.teacher, problem.ref, problem.divergence
    scale = problem.reward_scale
    key = (
        problem.vocab_size,
        student.raw.data_ptr(),
        None if teacher is None else (id(teacher), teacher.raw.data_ptr()),
        None if ref is None else (id(ref), ref.raw.data_ptr()),
        id(divergence),
        None if isinstance(scale, Tensor) else scale,
    )
    held = student.kept.get("native job")
    if held is None or held[0] != key:
        # with all whose ids are compared, so that nothing else can have them
        held = student.kept["native job"] = key, _new_job(problem), (teacher, ref, divergence)
    return held[1]


def _new_job(problem: RowProblem) -> tuple[Any, int, Tensor | None]:
    V, rows, scale, divergence = problem.vocab_size, _rows(problem), problem.reward_scale, problem.divergence
    if V < 0:
        raise ValueError(f"vocab_size must not be negative, got {V}")
    model = _model("student", problem.student, rows, V)
    teacher = None if problem.teacher is None else _model("teacher", problem.teacher, rows, V)
    ref = None if problem.ref is None else _model("ref", problem.ref, rows, V)
    kind, forward_weight = (0, 0.0) if divergence is None else _kind(divergence)
    if divergence is not None and teacher is None and ref is None:
        raise ValueError(f"divergence={divergence.name!r} needs a teacher or a reference")
    if isinstance(scale, Tensor):
        scale = 1.0
        if teacher is None or ref is None:
            raise ValueError("a reward_scale tensor needs both teacher and ref")
    else:
        scale = _as_the_kernels_see_it(scale)
        if (scale == 0 and teacher is not None and ref is None) or (scale == 1 and ref is not None and teacher is None):
            raise ValueError(f"reward_scale={scale} cancels the only model besides the student")
    forward_weights = forward_weight if isinstance(forward_weight, Tensor) else None
    job = _load().Job(
        rows=rows,
        vocab=V,
        student=model,
        teacher=teacher,
        ref=ref,
        reward_scale=scale,
        divergence=kind,
        constants=() if divergence is None else divergence.constants,
        forward_weight=0.0 if isinstance(forward_weight, Tensor) else forward_weight,
        stream_out=rows * V * 4 >= _STREAM_BYTES,
    )
    return job, rows, forward_weights


def _kind(divergence: RowDivergence) -> tuple[int, float | Tensor]:
    """The number of its kind, and of ``mixed`` the weight of the forward KL, which may be (C,)."""
    kind = _kinds().get(divergence.kind)
    if kind is None:
        kinds = ", ".join(_kinds())
        raise ValueError(f"the kind of a divergence must be one of {kinds}, got {divergence.kind!r}")
    return kind, divergence.forward_weight if divergence.kind == "mixed" else 0.0  # type: ignore[attr-defined]


@functools.lru_cache
def _as_the_kernels_see_it(reward_scale: float) -> float:
    """1 + 1e-9 cancels the reference."""
    rounded = float(np.float32(reward_scale))
    return rounded if rounded in (0.0, 1.0) else float(reward_scale)


def _model(name: str, model: ModelRows, rows: int, V: int) -> Any:
    """The kernels' ``Model``, from the checks of an earlier call where these were of the same memory."""
    raw, kept = model.raw, model.kept.get("native")
    key = (rows, V, raw.data_ptr())
    if kept is not None and kept[0] == key:
        return kept[1]
    dtype = _DTYPES.get(raw.dtype, 0)
    if not _load().matrix_address(raw, dtype, rows, V, True):
        _check_rows(name, raw, rows, V)
    transform, bias = model.transform, model.transform.bias
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] < V:
            raise ValueError(f"the bias of {name} must be (>= {V},), got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise TypeError(f"the bias of {name} must be floating, got {bias.dtype}")
        _check_memory(f"the bias of {name}", bias, (bias.shape[0] - 1) * bias.stride(0) + 1)
        bias = _aligned(bias.detach()[:V].to(torch.float32))
        # its address is in the kernels' Model, which a held Job may have copied: one for each V, as long as the rows
        model.kept[f"native bias {V}"] = bias
    softcap = transform.softcap
    handle = _load().Model(
        # an empty tensor has no address, and none is the mark of a model that is not there
        raw=key[2] or 1,
        row_stride=raw.stride(0),
        dtype=dtype,
        bias=0 if bias is None else bias.data_ptr(),
        input_scale=transform.scale / (transform.temperature if softcap is None else softcap),
        output_scale=1.0 if softcap is None else softcap / transform.temperature,
        softcap=softcap is not None,
    )
    model.kept["native"] = key, handle
    return handle


def _check_rows(name: str, x: Tensor, rows: int, V: int) -> None:
    """(C, >= V) of a dtype that the kernels have, with unit stride along the vocabulary."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 for backend='native', got {x.dtype}")
    shape = x.shape
    if len(shape) != 2 or shape[0] != rows or shape[1] < V:
        raise ValueError(f"{name} must be ({rows}, >= {V}), got {tuple(shape)}")
    row_stride, stride = x.stride()
    if shape[1] > 1 and stride != 1:
        raise ValueError(f"{name} must have unit stride along the vocabulary, got {stride}")
    _check_memory(name, x, (rows - 1) * row_stride + shape[1])


@functools.lru_cache
def _rule(rule: PolicyRule) -> Any:
    """The kernels' ``PolicyRule``."""
    return _load().PolicyRule(**rule.numbers)


def _policy(policy: Policy, rows: int, alive: list[Tensor]) -> Any:
    """The kernels' ``Policy``."""
    if policy.teacher is None and policy.ref is None:
        raise ValueError("a policy needs a teacher or a reference")
    teacher = teacher_stride = ref = ref_stride = scales = old = rollout = 0
    if policy.teacher is not None:
        teacher, teacher_stride = _statistics("the policy's teacher statistics", policy.teacher, rows, alive)
    if policy.ref is not None:
        ref, ref_stride = _statistics("the policy's ref statistics", policy.ref, rows, alive)
    scale = 1.0
    if isinstance(policy.reward_scale, Tensor):
        scales = _vector("the policy's reward_scale", policy.reward_scale, rows, alive)
    else:
        scale = policy.reward_scale
    if policy.old_logprobs is not None:
        old = _vector("old_logprobs", policy.old_logprobs, rows, alive)
    if policy.rollout_logprobs is not None:
        rollout = _vector("rollout_logprobs", policy.rollout_logprobs, rows, alive)
    return _load().Policy(
        rule=_rule(policy.rule),
        reward_scale=scale,
        reward_scales=scales,
        teacher=teacher,
        teacher_stride=teacher_stride,
        ref=ref,
        ref_stride=ref_stride,
        old_logprobs=old,
        rollout_logprobs=rollout,
    )


def _out(out: Tensor, rows: int, V: int) -> tuple[int, int]:
    """Address and row stride of (C, >= V) numbers that may be written."""
    _check_rows("out", out, rows, V)
    if out.stride(0) < V and rows > 1:
        raise ValueError(f"the rows of out overlap: row stride {out.stride(0)}, vocabulary {V}")
    return out.data_ptr(), out.stride(0)


def _statistics(name: str, x: Tensor, rows: int, alive: list[Tensor], *, writes: bool = False) -> tuple[int, int]:
    """Address and row stride of (len(Stat), C) numbers of unit stride along the tokens.

    Those that are only read may be of any stride; a copy is made then, and put into ``alive``.
    """
    address = _load().matrix_address(x, 0, len(Stat), rows, False)
    if address:
        return address, x.stride()[0]
    _check_statistics(name, x, rows)
    row_stride, stride = x.stride()
    if writes and row_stride < rows:
        raise ValueError(f"the rows of {name} overlap: row stride {row_stride}, {rows} tokens")
    if x.data_ptr() % 4 or (stride != 1 and rows > 1):
        if writes:
            raise ValueError(f"{name} must have unit stride along the tokens, and the alignment of their dtype")
        x = _aligned(x)
        alive.append(x)
    return x.data_ptr(), x.stride()[0]


def _check_statistics(name: str, x: Tensor, rows: int) -> None:
    if x.dtype is not torch.float32:
        raise TypeError(f"{name} must be torch.float32 for backend='native', got {x.dtype}")
    if x.shape != (len(Stat), rows):
        raise ValueError(f"{name} must be {(len(Stat), rows)}, got {tuple(x.shape)}")
    row_stride, stride = x.stride()
    _check_memory(name, x, (len(Stat) - 1) * row_stride + (rows - 1) * stride + 1)


def _weight(name: str, x: Tensor, rows: int, alive: list[Tensor]) -> tuple[int, int]:
    """Address and stride of (C,) float32 numbers of any stride."""
    address = _load().vector_address(x, 0, rows, True)
    return (address, x.stride()[0]) if address else (_vector(name, x, rows, alive), 1)


def _vector(name: str, x: Tensor, rows: int, alive: list[Tensor], dtype: int = 0) -> int:
    """The address of contiguous (C,) float32 numbers, or ``_INT64`` ones.

    A copy of what cannot be read where it lies is put into ``alive``.
    """
    address: int = _load().vector_address(x, dtype, rows, False)
    if address:
        return address
    wanted = torch.int64 if dtype == _INT64 else torch.float32
    if x.dtype is not wanted:
        raise TypeError(f"{name} must be {wanted} for backend='native', got {x.dtype}")
    if x.shape != (rows,):
        raise ValueError(f"{name} must be {(rows,)}, got {tuple(x.shape)}")
    _check_memory(name, x, (rows - 1) * x.stride(0) + 1)
    x = _aligned(x)
    alive.append(x)
    return x.data_ptr()


def _number_or_vector(name: str, x: float | Tensor, rows: int, alive: list[Tensor]) -> tuple[float, int]:
    """A number of all rows and no address, or any number and the address of one (C,) float32 for each."""
    return (1.0, _vector(name, x, rows, alive)) if isinstance(x, Tensor) else (x, 0)


def _check_memory(name: str, x: Tensor, span: int) -> None:
    """The tensor has CPU memory of the size that its shape and strides need: ``span`` elements, first to last."""
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU for backend='native', got {x.device}")
    if x.layout is not torch.strided or x.is_neg():
        raise ValueError(f"{name} must be dense, got {'a lazily negated view' if x.is_neg() else x.layout}")
    needed, there = (x.storage_offset() + span) * x.dtype.itemsize, x.untyped_storage().nbytes()
    if needed > there and x.numel():
        raise ValueError(
            f"{name} must have its memory: it needs {needed} bytes of a storage that has {there}, as one that was freed"
        )


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and at an address that its dtype divides, as the kernels read single numbers.

    Logits may begin anywhere: they are read by vectors, whole rows at a time.
    """
    x = x.detach().contiguous()
    return x.clone() if x.data_ptr() % x.element_size() else x
