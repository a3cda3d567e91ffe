"""``fused_gopd.graphed``: its bookkeeping with a recorder for the CPU, and on a GPU (tests/core/test_gpu.py) for real.

The recorder here replays by running the function again and writing the results into the tensors of the recording, as
the kernels of a CUDA graph do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import OBJECTIVES, Batch, assert_close, make_batch
from fused_gopd.graphs import Graphed, Recorder, Tensors
from fused_gopd.tokens import fixed_shapes

F32 = torch.float32


class Eager(Recorder):
    def __init__(self) -> None:
        self.replays = self.warm_ups = 0

    def warm_up(self, run: Callable[[], object]) -> None:
        run()
        self.warm_ups += 1

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        assert self.warm_ups
        static = run()

        def replay() -> None:
            self.replays += 1
            with torch.enable_grad(), fixed_shapes():
                for old, new in zip(static, run(), strict=True):
                    if old is not None:
                        old.copy_(new)

        return replay, static

    def nbytes(self) -> int:
        return 1000


def inputs_of(batch: Batch) -> Tensors:
    scale = torch.full(batch.token_ids.shape, 1.25)
    return *(m.hidden for m in batch.models), batch.token_ids, batch.mask, scale


def step_of(batch: Batch, **options: Any) -> Callable[..., Tensors]:
    """Hidden states, ids, mask and lambda are inputs; the heads' weights are those of the batch."""

    def step(*inputs: Tensor) -> Tensors:
        *hidden, ids, mask, scale = inputs
        heads = [fg.LinearHead(h, m.weight) for h, m in zip(hidden, batch.models, strict=True)]
        out = fg.gopd_loss(*heads, ids, mask=mask, reward_scale=scale, **options)
        return out.loss, out.entropy

    return step


def captured(batch: Batch, **options: Any) -> Graphed:
    return Graphed(step_of(batch, **options), inputs_of(batch), tuple(m.weight for m in batch.models), Eager())


def with_weights_of(batch: Batch, seed: int) -> Batch:
    """Other tokens for the same heads."""
    other = make_batch(seed, dtype=F32)
    heads = [fg.LinearHead(new.hidden, old.weight) for old, new in zip(batch.models, other.models, strict=True)]
    return Batch(*heads, other.token_ids, other.mask)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_replays_on_new_values_are_the_eager_step(objective: dict[str, Any], reduction: str) -> None:
    batch = make_batch(0, dtype=F32)
    weight = batch.student.weight
    options = {"reduction": reduction, **objective}
    step = captured(batch, **options)
    for seed in (1, 2):
        fresh = with_weights_of(batch, seed)
        hidden, *rest = inputs_of(fresh)
        body = hidden.detach().clone().requires_grad_()
        loss, entropy = step(body * 1, *rest)
        upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
        got = torch.autograd.grad(loss, (body, weight), upstream)
        with fixed_shapes():
            want, want_entropy = step_of(batch, **options)(body, *rest)
            want_grads = torch.autograd.grad(want, (body, weight), upstream)
        assert torch.equal(loss, want)
        assert torch.equal(entropy, want_entropy)
        assert not entropy.requires_grad
        assert all(map(torch.equal, got, want_grads))
        with torch.no_grad():
            weight += 0.1  # an optimizer's step


def test_a_captured_step_is_the_one_that_drops_masked_rows() -> None:
    batch = make_batch(0, dtype=F32)
    loss, _ = captured(batch)(*inputs_of(batch))
    want, _ = step_of(batch)(*inputs_of(batch))
    leaves = batch.leaves
    assert_close(loss, want, 2e-6)
    for got, grad in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_close(got, grad, 2e-6)


def test_results_of_a_call_outlive_the_next() -> None:
    """Losses are copies, and ``.grad`` accumulates outside of the static memory."""
    batch = make_batch(0, dtype=F32)
    weight, hidden = batch.student.weight, batch.student.hidden
    step, inputs = captured(batch), inputs_of(batch)
    first, _ = step(*inputs)
    value = first.item()
    first.backward()
    grads = weight.grad.clone(), hidden.grad.clone()
    second, _ = step(*(x * 0.5 if x is hidden else x for x in inputs))
    assert first.item() == value != second.item()
    assert torch.equal(weight.grad, grads[0])
    assert torch.equal(hidden.grad, grads[1])
    (0 * second).backward()
    assert torch.equal(weight.grad, grads[0])
    step(*inputs)[0].backward()
    assert torch.equal(weight.grad, 2 * grads[0])
    static = {x.untyped_storage().data_ptr() for x in step._gradients}
    assert weight.grad.untyped_storage().data_ptr() not in static
    assert hidden.grad.untyped_storage().data_ptr() not in static


def test_capturing_leaves_examples_and_gradients_alone() -> None:
    batch = make_batch(0, dtype=F32)
    before = [x.clone() for x in inputs_of(batch)]
    step = captured(batch)
    assert batch.student.weight.grad is None
    step(*inputs_of(with_weights_of(batch, 3)))
    assert all(map(torch.equal, inputs_of(batch), before))


def test_an_input_may_lie_in_its_buffer() -> None:
    batch = make_batch(0, dtype=F32)
    step = captured(batch)
    with torch.no_grad():
        step.inputs[0].mul_(2)
    want, _ = step_of(batch)(2 * batch.student.hidden, *inputs_of(batch)[1:])
    loss, _ = step(step.inputs[0], *inputs_of(batch)[1:])
    assert_close(loss, want, 2e-6)


def test_inputs_of_other_strides_are_copied() -> None:
    batch = make_batch(0, dtype=F32)
    hidden, *rest = inputs_of(batch)
    step = captured(batch)
    want = step(hidden, *rest)[0]
    assert torch.equal(step(hidden.detach().transpose(0, 1).contiguous().transpose(0, 1), *rest)[0], want)


def test_memory_is_the_pool_and_the_buffers() -> None:
    batch = make_batch(0, dtype=F32)
    assert captured(batch).memory == 1000 + sum(x.nbytes for x in inputs_of(batch))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_tensors_off_the_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="on one CUDA device, got cpu"):
        fg.graphed(lambda x: x.sum(), torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="on one CUDA device, got cpu, meta"):
        fg.graphed(lambda x: x.sum(), torch.ones(2), weights=[torch.ones(2, device="meta")])
    with pytest.raises(TypeError, match="all of them tensors"):
        fg.graphed(lambda: torch.ones(()))
    with pytest.raises(TypeError, match="all of them tensors"):
        fg.graphed(lambda x: x, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], "input 0 must have the shape of its example"),
        (lambda x: x.double(), "input 0 must have the dtype of its example, torch.float32, got torch.float64"),
        (lambda x: x.to("meta"), "input 0 must have the device of its example, cpu, got meta"),
    ],
)
def test_other_inputs_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    batch = make_batch(0, dtype=F32)
    hidden, *rest = inputs_of(batch)
    step = captured(batch)
    with pytest.raises(ValueError, match=message):
        step(change(hidden), *rest)
    with pytest.raises(ValueError, match="input 1 requires a gradient, which its example did not"):
        step(hidden, rest[0].clone().requires_grad_(), *rest[1:])
    with pytest.raises(TypeError, match="captured with 6 inputs, got 1"):
        step(hidden)


def test_a_weight_that_moved_is_refused() -> None:
    batch = make_batch(0, dtype=F32)
    step, inputs = captured(batch), inputs_of(batch)
    batch.student.weight.data = batch.student.weight.data.clone()
    with pytest.raises(RuntimeError, match="weight 0 is not what was captured"):
        step(*inputs)
    batch = make_batch(0, dtype=F32)
    step = captured(batch)
    batch.ref.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="weight 2 is not what was captured"):
        step(*inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mode_without_gradients_is_refused(mode: Any) -> None:
    batch = make_batch(0, dtype=F32)
    step = captured(batch)
    with mode(), pytest.raises(RuntimeError, match="computes gradients: not under"):
        step(*inputs_of(batch))
    with mode(), pytest.raises(RuntimeError, match="computes gradients: not under"):
        captured(batch)


def test_a_backward_that_comes_too_late_is_refused() -> None:
    batch = make_batch(0, dtype=F32)
    step, inputs = captured(batch), inputs_of(batch)
    first, second = step(*inputs)[0], step(*inputs)[0]
    with pytest.raises(RuntimeError, match="one backward a call, before the next call"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward a call"):
        second.backward()
    third = step(*inputs)[0]
    third.backward()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_index": torch.zeros(2, dtype=torch.int64)}, "teacher_index"),
        ({"grad_filter": 1e-6}, "grad_filter"),
        ({"ratio": "sequence", "old_logprobs": torch.full((2, 5), -1.0)}, "ratio='sequence' with mask"),
        ({"advantage_fn": lambda stats: stats.student_logprobs}, "advantage_fn with mask"),
    ],
)
def test_options_that_wait_for_the_device_are_refused_before_the_capture(options: dict[str, Any], named: str) -> None:
    batch = make_batch(0, dtype=F32)
    teacher = [batch.teacher] if named == "teacher_index" else batch.teacher

    def step(hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        student = fg.LinearHead(hidden, batch.student.weight)
        return fg.gopd_loss(student, teacher, None, ids, mask=mask, **options).loss

    inputs = (batch.student.hidden, batch.token_ids, batch.mask)
    with pytest.raises(ValueError, match=f"{named} waits for the device"):
        Graphed(step, inputs, (batch.student.weight,), Eager())


def test_functions_that_cannot_be_captured_are_refused() -> None:
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def refuse(function: Callable[..., Any], error: type[Exception], message: str, *weights: Tensor) -> None:
        with pytest.raises(error, match=message):
            Graphed(function, (x,), weights, Eager())

    refuse(lambda x: (x * w).sum(), ValueError, r"weights must hold all that the loss depends on; shape \(3,\) is not")
    refuse(lambda x: (x.detach() * 2).sum(), ValueError, "depends on no example and no weight")
    refuse(lambda x: {"loss": x.sum()}, TypeError, "must return the loss .* got dict")
    refuse(lambda x: x.sum(), ValueError, "weights must be leaf tensors", w * 2)
    step = Graphed(lambda x: (x * 2).sum(), (x,), (w,), Eager())  # a weight that is not used has no gradient
    step(x).backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert w.grad is None
