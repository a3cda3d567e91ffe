"""What CONTRIBUTING promises to code outside the package: a divergence is a class, a backend a module and a line."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import assert_all_close, assert_close, make_batch, run
from fused_gopd import rowops
from fused_gopd.objective.divergences import DIVERGENCES, Divergence, Outcomes, Parameter, register
from fused_gopd.rowops.torch import TorchRowOps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def jeffreys() -> Iterator[type[Divergence]]:
    """a KL(t || p) + (2 - a) KL(p || t), with the option alpha for a: sum p g with g = a e^d d - (2 - a) d."""

    @register
    @dataclass(frozen=True)
    class Jeffreys(Divergence):
        name = kind = "jeffreys"
        parameter = Parameter(option="alpha", default=1.0, holds=lambda a: 0 < a < 2, range="0 < alpha < 2")

        a: float

        @property
        def h0(self) -> float:
            return 2 - 2 * self.a

        def weighted(self, x: Outcomes) -> Tensor:
            p, t = x.log_p.exp(), x.log_t.exp()
            return self.a * (p - t) - (2 - self.a) * p * x.delta

        def terms(self, x: Outcomes) -> Tensor:
            return (self.a * x.log_t.exp() - (2 - self.a) * x.log_p.exp()) * x.delta

    yield Jeffreys
    del DIVERGENCES["jeffreys"]


def dense(batch, a: float, lam: float) -> tuple[Tensor, list[Tensor]]:
    """The sum over live tokens and its gradients, straight from the definition."""
    leaves = [x.detach().double().requires_grad_() for x in batch.leaves]
    log_p = (leaves[0] @ leaves[1].T).log_softmax(-1)
    log_q, log_r = ((m.hidden.double() @ m.weight.double().T).log_softmax(-1) for m in (batch.teacher, batch.ref))
    log_t = (lam * log_q + (1 - lam) * log_r).log_softmax(-1)
    forward, reverse = log_t.exp() * (log_t - log_p), log_p.exp() * (log_p - log_t)
    value = (a * forward + (2 - a) * reverse).sum(-1)[batch.mask].sum()
    return value, list(torch.autograd.grad(value, leaves))


@pytest.mark.usefixtures("jeffreys")
@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("estimator", [{"estimator": "full"}, {"estimator": "topk", "k": 37}], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_divergence_from_outside_is_computed(function, backend, estimator, reduction):
    """One class, registered: values and gradients of both estimators, with a parameter, in one pass or recomputed."""
    batch = make_batch(3, dtype=torch.float32)
    call = {"divergence": "jeffreys", "reward_scale": 1.25, "reduction": reduction, "backend": backend, **estimator}
    want, want_grads = dense(batch, 0.5, 1.25)
    out = function(*batch.models, batch.token_ids, mask=batch.mask, alpha=0.5, **call)
    assert_close(out.loss.sum(), want, 2e-5)
    assert_all_close(torch.autograd.grad(out.loss.sum(), batch.leaves), want_grads, 2e-5)


@pytest.mark.usefixtures("jeffreys")
def test_a_divergence_from_outside_has_its_own_rules():
    batch = make_batch(3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"alpha must satisfy 0 < alpha < 2, got 2.5"):
        run(batch, estimator="full", divergence="jeffreys", alpha=2.5)
    with pytest.raises(ValueError, match=r"beta is an option of divergence='jsd', got beta=0.25 with .*'jeffreys'"):
        run(batch, estimator="full", divergence="jeffreys", beta=0.25)
    with pytest.raises(ValueError, match=r"backend='native' has no kernel for divergence='jeffreys'; .*'torch'"):
        run(batch, estimator="full", divergence="jeffreys", backend="native")
    fg.GOPDLoss(estimator="full", divergence="jeffreys", alpha=0.5)


class CountedRowOps(TorchRowOps):
    """Another backend's row operations, of fewer divergences."""

    name = "counted"
    kinds = frozenset({"reverse_kl"})
    calls = 0

    def statistics_and_gradient(self, *arguments):
        CountedRowOps.calls += 1
        return super().statistics_and_gradient(*arguments)


@pytest.fixture
def counted(monkeypatch):
    module = types.ModuleType("counted_backend")
    module.unavailable_reason = lambda: None
    module.wrong_device = lambda device: (
        None if device.type == "cpu" else f"backend='counted' runs on a CPU, got {device}"
    )
    module.row_ops = CountedRowOps
    monkeypatch.setitem(sys.modules, "counted_backend", module)
    entry = rowops.Backend(name="counted", module="counted_backend", dtypes=(torch.float32,))
    monkeypatch.setitem(rowops.BACKENDS, "counted", entry)
    monkeypatch.setattr(CountedRowOps, "calls", 0)
    return module


def test_a_backend_from_outside_is_used(counted, monkeypatch):
    """One module and a line of the table: by its name, and by "auto" on the device that it is for."""
    batch = make_batch(4, dtype=torch.float32)
    want, want_grads = run(batch, estimator="full", reward_scale=1.25, backend="torch")
    got, grads = run(batch, estimator="full", reward_scale=1.25, backend="counted")
    assert CountedRowOps.calls == 1
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, grads, want_grads))
    preferred = rowops.Backend(name="counted", module="counted_backend", default_on="cpu")
    monkeypatch.setattr(rowops, "BACKENDS", {"counted": preferred, **rowops.BACKENDS})
    rowops.BACKENDS["counted"] = preferred
    run(batch, estimator="full")
    assert CountedRowOps.calls == 2


def test_a_backend_from_outside_is_refused_with_its_reason(counted):
    batch = make_batch(4, dtype=torch.float32)
    with pytest.raises(ValueError, match="backend='counted' has no kernel for divergence='jsd'; backend='torch'"):
        run(batch, estimator="full", divergence="jsd", backend="counted")
    with pytest.raises(ValueError, match="backend='counted' takes float32, got float64; backend='torch' takes any"):
        run(make_batch(4), estimator="full", backend="counted")
    counted.unavailable_reason = lambda: "its library is missing"
    with pytest.raises(RuntimeError, match="backend='counted' is not available: its library is missing"):
        run(batch, backend="counted")
    counted.unavailable_reason = lambda: None
    counted.wrong_device = lambda device: "backend='counted' runs elsewhere"
    with pytest.raises(ValueError, match="backend='counted' runs elsewhere"):
        run(batch, backend="counted")
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*'triton', 'counted', got 'x'"):
        run(batch, backend="x")
