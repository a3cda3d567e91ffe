"""The row operations as C++ kernels for CPU (``csrc/``): float32, bfloat16 and float16, accumulated in float32.

One call walks each row twice (three times for a divergence of two rounds): statistics, then the gradient while the
row is still in the cache. The kernels exist once per instruction set and the best that the machine has is taken;
``FUSED_GOPD_ISA`` (``baseline``, ``avx2`` or ``avx512``), read at the first use in a process, asks for another one.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import GradientWeights, LogitTransform, ModelRows, RowProblem, Stat
from .torch import scale_

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType in csrc/rowops.h

# From this size on a float32 ``out`` is stored past the caches: nothing of it would still be there for the GEMM that
# reads it next, and the stores need not fetch what they overwrite. 1.1 times faster at 256 x 151936 on two Sapphire
# Rapids cores; the threshold is a common share of a last-level cache, not tuned.
_STREAM_BYTES = 1 << 24


def _load() -> Any:
    return importlib.import_module("fused_gopd._native")


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used in this installation; None if they can."""
    try:
        _load()
    except ImportError as error:
        return (
            f"the compiled extension fused_gopd._native could not be imported ({error}); "
            "installing the package with pip builds it and needs a C++17 compiler"
        )
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


class NativeRowOps:
    """See :class:`fused_gopd.rowops.RowOps` for the formulas. Uses ``torch.get_num_threads()`` threads."""

    name = "native"

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(_kinds())

    def statistics(self, problem: RowProblem) -> Tensor:
        with _Job(problem) as job:
            job.handle.request_statistics()
        return job.statistics

    def gradient(self, problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor) -> None:
        with _Job(problem, statistics) as job:
            job.request_gradient(weights, out)

    def second_round(self, problem: RowProblem, statistics: Tensor) -> Tensor:
        if problem.divergence is None or not problem.divergence.second_round:
            name = None if problem.divergence is None else problem.divergence.name
            raise ValueError(f"second_round needs a divergence that has one, got {name!r}")
        with _Job(problem, statistics, writes=True) as job:
            job.handle.request_second_round()
        return job.statistics[Stat.CENTRE : Stat.VALUE + 1]

    def statistics_and_gradient(self, problem: RowProblem, weights: GradientWeights, out: Tensor) -> Tensor:
        with _Job(problem) as job:
            job.handle.request_statistics()
            job.request_gradient(weights, out)
        return job.statistics

    def linear_statistics(
        self, hidden: Tensor, weight: Tensor, transform: LogitTransform, vocab_size: int, token_ids: Tensor
    ) -> Tensor | None:
        return None

    def scale_(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return scale_(gradient, factor)


class _Job:
    """A validated problem as addresses, and the tensors that keep the addresses alive. Runs on leaving the context.

    The one place where buffers are checked: what the kernels are given is a plain address, which they trust.
    """

    def __init__(self, problem: RowProblem, statistics: Tensor | None = None, *, writes: bool = False) -> None:
        """``statistics`` that were computed before, of which a copy is used if the kernels write to them."""
        self._native = _load()
        self._problem = problem
        self._alive: list[Tensor] = []
        student = self._model("student", problem.student)
        rows = (problem.rows,)
        if problem.vocab_size < 0:
            raise ValueError(f"vocab_size must not be negative, got {problem.vocab_size}")
        divergence = problem.divergence
        if divergence is not None:
            if divergence.kind not in _kinds():
                kinds = ", ".join(_kinds())
                raise ValueError(f"the kind of a divergence must be one of {kinds}, got {divergence.kind!r}")
            if problem.teacher is None and problem.ref is None:
                raise ValueError(f"divergence={divergence.name!r} needs a teacher or a reference")
        weight: Any = getattr(divergence, "forward_weight", 0.0)
        per_row = isinstance(weight, Tensor)
        weights = _vector("forward_weight", weight, rows) if per_row else None
        scale, scales = 1.0, None
        if isinstance(problem.reward_scale, Tensor):
            scales = _vector("reward_scale", problem.reward_scale, rows)
            if problem.teacher is None or problem.ref is None:
                raise ValueError("a reward_scale tensor needs both teacher and ref")
        else:
            scale = float(problem.reward_scale)
            if float(np.float32(scale)) in (0.0, 1.0):  # as the kernels see it: 1 + 1e-9 cancels the reference
                scale = float(np.float32(scale))
            only_teacher = problem.teacher is not None and problem.ref is None
            only_ref = problem.ref is not None and problem.teacher is None
            if (only_teacher and scale == 0) or (only_ref and scale == 1):
                raise ValueError(f"reward_scale={scale} cancels the only model besides the student")
        ids = None if problem.token_ids is None else _vector("token_ids", problem.token_ids, rows, torch.int64)
        shape = (len(Stat), problem.rows)
        if statistics is None:
            self.statistics = torch.empty(shape, dtype=torch.float32, device="cpu")
        else:
            self.statistics = _vector("statistics", statistics, shape)
            self.statistics = self.statistics.clone() if writes else self.statistics
        self.handle = self._native.Job(
            rows=problem.rows,
            vocab=problem.vocab_size,
            student=student,
            teacher=self._model("teacher", problem.teacher),
            ref=self._model("ref", problem.ref),
            reward_scale=scale,
            reward_scales=self._address(scales),
            token_ids=self._address(ids),
            divergence=0 if divergence is None else _kinds()[divergence.kind],
            constants=() if divergence is None else divergence.constants,
            forward_weight=0.0 if per_row else weight,
            forward_weights=self._address(weights),
            statistics=self._address(self.statistics),
        )

    def request_gradient(self, weights: GradientWeights, out: Tensor) -> None:
        problem = self._problem
        _check_rows("out", out, problem)
        if out.stride(0) < problem.vocab_size and problem.rows > 1:
            raise ValueError(f"the rows of out overlap: row stride {out.stride(0)}, vocabulary {problem.vocab_size}")
        if weights.token is not None and problem.token_ids is None:
            raise ValueError("token weights need token_ids")
        vectors = (("weights.divergence", weights.divergence), ("weights.token", weights.token))
        divergence, token = (None if w is None else _vector(name, w, (problem.rows,)) for name, w in vectors)
        in_place = out.data_ptr() == problem.student.raw.data_ptr()
        size = problem.rows * problem.vocab_size * out.element_size()
        self._alive.append(out)
        self.handle.request_gradient(
            divergence_weights=self._address(divergence),
            token_weights=self._address(token),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            out_dtype=_DTYPES[out.dtype],
            stream=size >= _STREAM_BYTES and not in_place,
        )
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # autograd cannot see the kernel's stores

    def _model(self, name: str, model: ModelRows | None) -> Any:
        if model is None:
            return None
        raw, transform = model.raw, model.transform
        _check_rows(name, raw, self._problem)
        bias = transform.bias
        if bias is not None:
            V = self._problem.vocab_size
            if bias.dim() != 1 or bias.shape[0] < V:
                raise ValueError(f"the bias of {name} must be (>= {V},), got {tuple(bias.shape)}")
            if not bias.is_floating_point():
                raise TypeError(f"the bias of {name} must be floating, got {bias.dtype}")
            _check_memory(f"the bias of {name}", bias)
            bias = _aligned(bias.detach()[:V].to(torch.float32))
        softcap = transform.softcap
        return self._native.Model(
            # an empty tensor has no address, and none is the mark of a model that is not there
            raw=self._address(raw) or 1,
            row_stride=raw.stride(0),
            dtype=_DTYPES[raw.dtype],
            bias=self._address(bias),
            input_scale=transform.scale / (transform.temperature if softcap is None else softcap),
            output_scale=1.0 if softcap is None else softcap / transform.temperature,
            softcap=softcap is not None,
        )

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._alive.append(tensor)
        return tensor.data_ptr()

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._native.run(self.handle, threads=torch.get_num_threads())


def _check_memory(name: str, x: Tensor) -> None:
    """The tensor has CPU memory of the size that its shape and strides need."""
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU for backend='native', got {x.device}")
    if x.layout != torch.strided or x.is_neg():
        raise ValueError(f"{name} must be dense, got {'a lazily negated view' if x.is_neg() else x.layout}")
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.element_size() if x.numel() else 0
    if needed > x.untyped_storage().nbytes():
        raise ValueError(
            f"{name} must have its memory: it needs {needed} bytes of a storage that has "
            f"{x.untyped_storage().nbytes()}, as one that was freed"
        )


def _check_rows(name: str, x: Tensor, problem: RowProblem) -> None:
    """(C, >= V) of a dtype that the kernels have, with unit stride along the vocabulary."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 for backend='native', got {x.dtype}")
    if x.dim() != 2 or x.shape[0] != problem.rows or x.shape[1] < problem.vocab_size:
        rows = problem.rows if problem.student.raw.dim() else "rows"
        raise ValueError(f"{name} must be ({rows}, >= {problem.vocab_size}), got {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along the vocabulary, got {x.stride(1)}")
    _check_memory(name, x)


def _vector(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` as contiguous memory; the caller's own where it is that already."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for backend='native', got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    _check_memory(name, x)
    return _aligned(x.detach())


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and at an address that its dtype divides, as the kernels read single numbers.

    Logits may begin anywhere: they are read by vectors, whole rows at a time.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % x.element_size() else x
