"""A step of fixed shapes as CUDA graphs: its forward and backward are recorded once and replayed without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tokens import fixed_shapes

Tensors = tuple[Tensor, ...]


class Recorder:
    """What calls torch.cuda: graphs that share a private memory pool. A test has another for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, run: Callable[[], object]) -> None:
        """Three runs on the side, as ``torch.cuda.make_graphed_callables`` does: libraries and kernels load."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """How to replay what ``run`` does, and the tensors that each replay writes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = run()
        return graph.replay, found

    def nbytes(self) -> int:
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))


def _place(x: Tensor) -> tuple[object, ...]:
    """What a recorded kernel knows of a tensor."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.requires_grad


def _leaves(*todo: Any) -> Iterator[Tensor]:
    """The leaf tensors that an autograd graph ends in, from its last nodes."""
    seen, waiting = set(), list(todo)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield from [node.variable] if hasattr(node, "variable") else []
            waiting += [before for before, _ in node.next_functions]


def _require_autograd() -> None:
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError("a graphed step computes gradients: not under torch.no_grad() or torch.inference_mode()")


class Graphed:
    """What :func:`graphed` returns, called with new inputs.

    Attributes:
        inputs: the static buffers, one for each example; an input that lies there is not copied.
        memory: bytes that the graphs hold, measured after the capture: their private pool, and ``inputs``.
    """

    def __init__(self, loss_fn: Callable[..., Any], examples: Tensors, weights: Tensors, recorder: Recorder) -> None:
        _require_autograd()
        if bad := [w for w in weights if w.requires_grad and not w.is_leaf]:
            raise ValueError(f"weights must be leaf tensors, got a result of {bad[0].grad_fn}")
        self.inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in examples)
        self._weights, self._places = weights, [_place(w) for w in weights]
        self._loss_fn, self._calls = loss_fn, 0
        self._trained = [x for x in (*self.inputs, *weights) if x.requires_grad]
        self._loss: Tensor | None = None  # with its autograd graph, from a run of the forward to one of the backward
        self._upstream = torch.empty(())
        self._waiting = False  # whether the backward of the last call may run
        with fixed_shapes():
            recorder.warm_up(lambda: (self._run_forward(), self._run_backward()))
            self._forward, self._outputs = recorder.record(self._run_forward)
            self._backward, self._gradients = recorder.record(self._run_backward)
        self._loss = None
        self.memory = recorder.nbytes() + sum(x.nbytes for x in self.inputs)

    def _run_forward(self) -> Tensors:
        found = self._loss_fn(*self.inputs)
        outputs: Tensors = found if isinstance(found, tuple) else (found,)
        if wrong := [type(x).__name__ for x in outputs if not isinstance(x, Tensor)]:
            raise TypeError(f"the function must return the loss (out.loss), or a tuple of tensors, got {wrong[0]}")
        self._loss = outputs[0]
        known = {id(x) for x in self._trained}
        if unknown := [x for x in _leaves(self._loss.grad_fn) if id(x) not in known]:
            raise ValueError(f"weights must hold all that the loss depends on; shape {tuple(unknown[0].shape)} is not")
        if not self._loss.requires_grad:
            raise ValueError("the loss depends on no example and no weight that requires a gradient")
        if self._upstream.shape != self._loss.shape or self._upstream.device != self._loss.device:
            self._upstream = torch.ones_like(self._loss)  # in the warm-up, so outside of the pool
        return tuple(x.detach() for x in outputs)

    def _run_backward(self) -> Tensors:
        assert self._loss is not None
        return torch.autograd.grad(self._loss, self._trained, self._upstream, allow_unused=True)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns for new inputs: the loss, or a tuple of it and detached tensors."""
        _require_autograd()
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the step was captured with {len(self.inputs)} inputs, got {len(inputs)}")
        for i, (x, static) in enumerate(zip(inputs, self.inputs, strict=True)):
            for what in ("shape", "dtype", "device"):
                want, got = getattr(static, what), getattr(x, what)
                if got != want:
                    raise ValueError(f"input {i} must have the {what} of its example, {want}, got {got}")
            if x.requires_grad and not static.requires_grad:
                raise ValueError(f"input {i} requires a gradient, which its example did not")
        for i, (w, place) in enumerate(zip(self._weights, self._places, strict=True)):
            if _place(w) != place:
                was = f"(address, shape, strides, dtype, requires_grad) was {place}, is {_place(w)}"
                raise RuntimeError(f"weight {i} is not what was captured, {was}: update it in place or capture again")
        outputs = _Replay.apply(self, *inputs, *self._weights)  # type: ignore[no-untyped-call]
        return outputs if len(outputs) > 1 else outputs[0]

    def replay_forward(self, inputs: Tensors) -> tuple[int, Tensors]:
        """The number of this call, and copies of the outputs, which the next replay overwrites."""
        for static, x in zip(self.inputs, inputs, strict=True):
            if _place(x)[:3] != _place(static)[:3]:
                static.detach().copy_(x)
        self._forward()
        self._calls, self._waiting = self._calls + 1, True
        return self._calls, tuple(x.clone() for x in self._outputs)

    def replay_backward(self, call: int, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and weights, in static memory; autograd copies what it keeps, as this object has them."""
        if call != self._calls or not self._waiting:
            raise RuntimeError("a graphed step has one backward a call, before the next call: its buffers are reused")
        self._waiting = False
        self._upstream.copy_(upstream)
        self._backward()
        gradients = iter(self._gradients)
        return tuple(next(gradients) if x.requires_grad else None for x in (*self.inputs, *self._weights))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Graphed, *tensors: Tensor) -> Tensors:
        ctx.step = step
        ctx.call, outputs = step.replay_forward(tensors[: len(step.inputs)])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.step.replay_backward(ctx.call, upstream)


def graphed(loss_fn: Callable[..., Tensor | Tensors], *examples: Tensor, weights: Iterable[Tensor] = ()) -> Graphed:
    """Forward and backward of ``loss_fn`` as CUDA graphs: for small batches, where the host is slower than the GPU.

    NOT YET RUN ON A GPU: only the bookkeeping has been tested. Compare the first steps with those of ``loss_fn``. ::

        def loss_fn(hidden, teacher_hidden, ids):
            return fg.gopd_loss(fg.LinearHead(hidden, W), fg.LinearHead(teacher_hidden, W_teacher), None, ids).loss

        step = fg.graphed(loss_fn, hidden, teacher_hidden, ids, weights=[W, W_teacher])
        step(hidden, teacher_hidden, ids).backward()  # each step, values of the same shapes

    A call copies its inputs into static buffers and replays the forward, ``backward()`` the backward with the upstream
    gradient (a loss scale, say). Results are autograd's as without graphs: the loss, gradients that flow into what
    computed ``hidden``, and ``.grad`` of leaves, which accumulates in tensors outside of the graphs' memory.

    Args:
        loss_fn: builds the heads and returns the loss, or a tuple of it and more to read (``out.entropy``). What it
            reads besides tensors (options, a float lambda) is fixed. Never called again after the capture.
        examples: tensors on one GPU, of the shapes and dtypes of all calls, with valid values.
        weights: all other tensors that ``loss_fn`` uses, frozen ones too. They stay where they are: an optimizer may
            write to them, nothing may replace them or their storage, which is checked where it can be.

    A mask is data: all rows are computed. ``teacher_index``, ``grad_filter``, and with a mask ``ratio="sequence"`` and
    ``advantage_fn`` or ``reward_scale_fn`` raise, since they wait for the device; so do other shapes, dtypes or devices
    than the examples', a weight that moved, a call without autograd, and a second backward of a call, or one after the
    next call.
    """
    kept = tuple(weights)
    if not examples or not all(isinstance(x, Tensor) for x in (*examples, *kept)):
        raise TypeError("graphed takes a function, one or more examples and weights, all of them tensors")
    devices = sorted({str(x.device) for x in (*examples, *kept)})
    if len(devices) > 1 or not examples[0].is_cuda:
        raise ValueError(f"graphed needs examples and weights on one CUDA device, got {', '.join(devices)}")
    return Graphed(loss_fn, examples, kept, Recorder(examples[0].device))
