"""Large finite masks, -1e4 to the smallest float, in any subset of the models: finite, and as good as the naive path.

The target's logits u = lambda z_q + (1 - lambda) z_r are then far from 0, or would be beyond the largest float.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import expect, generator, in_parts, make_batch, relative_error
from combinations import pairwise
from fused_gopd.objective.divergences import divergence_value, kl_to_target, make
from fused_gopd.objective.statistics import entropy
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, RowOps, RowProblem, Stat, select_backend
from fused_gopd.rowops.torch import TorchRowOps

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
SMALLEST = torch.finfo(torch.float32).min
FILLS = (-1e4, -1e5, -1e9, -3e38, SMALLEST)
LAMBDAS = (-0.5, 0.0, 0.3, 1.0, 1.25, 4.0, "per token")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
COMPARED = 1e37  # from here on float32 has no room for a sum of two


def masked_logits(seed: int, rows: int, V: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of three models, of which the bits of ``seed`` say who has a mask; its columns and number differ."""
    g = generator(seed)
    logits = [torch.randn(rows, V, generator=g, dtype=torch.float64).to(dtype) * 3 for _ in range(3)]
    for i, x in enumerate(logits):
        if seed >> i & 1:
            fill = FILLS[(seed // 8 + i * (seed // 40)) % len(FILLS)]
            overlap = torch.arange(5, 7) if seed % 3 else torch.arange(0)
            columns = torch.cat((overlap, torch.randperm(V, generator=g)[: 1 + seed % 4]))
            x[:, columns] = max(fill, torch.finfo(dtype).min)
    return logits


def scale_of(seed: int, rows: int) -> float | Tensor:
    lam = LAMBDAS[seed % len(LAMBDAS)]
    return torch.tensor(LAMBDAS[:-1])[torch.arange(rows) % 6] if isinstance(lam, str) else lam


def problem_of(seed: int, divergence: Any, V: int = 40, device: str = "cpu") -> RowProblem:
    logits, lam = masked_logits(seed, 6, V), scale_of(seed, 6)
    z, q, r = (ModelRows(x.to(device), LogitTransform()) for x in logits)
    lam = lam.to(device) if isinstance(lam, Tensor) else lam
    ids = torch.arange(6, device=device)
    return RowProblem(V, z, teacher=q, ref=r, reward_scale=lam, token_ids=ids, divergence=make(divergence, beta=0.3))


def dense(problem: RowProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Value, KL(p || target) and gradient of each row, as autograd makes them of the dense formulas in a dtype."""
    lam = problem.reward_scale
    z, q, r = (m.raw.cpu().to(dtype, copy=True) for m in (problem.student, problem.teacher, problem.ref))
    z.requires_grad_()
    out = fg.reference.gopd_loss(
        fg.Logits(z), fg.Logits(q), fg.Logits(r), reward_scale=lam.cpu().to(dtype) if isinstance(lam, Tensor) else lam,
        estimator="full", divergence=problem.divergence.name, reduction="sum",
        **({"beta": problem.divergence.beta} if problem.divergence.name == "jsd" else {}),
    )  # fmt: skip
    out.loss.backward()
    return out.token_loss.double(), out.kl.double(), z.grad.double()


def allowed(naive: Tensor, want: Tensor, rounding: Tensor) -> Tensor:
    """Twice the naive path's error, a float32 sum's own, and what rounding u at the size of its maximum makes.

    That changes t by a factor of exp(rounding): where it is large the naive path can still be right by chance.
    """
    size = 1 + want.abs()
    return 2 * (naive - want).abs() + 1e-5 * size + rounding * size


def check_rows(
    ops: RowOps, problem: RowProblem, parts: list[tuple[int, int]] | None = None, compare: bool = True
) -> None:
    """Statistics and gradient, of the whole rows or of parts of the vocabulary merged."""
    weights = GradientWeights(torch.ones(problem.rows, device=problem.student.raw.device))
    if parts is None:
        gradient = torch.empty_like(problem.student.raw)
        statistics = ops.statistics_and_gradient(problem, weights, gradient)
        again = torch.empty_like(gradient)
        ops.gradient(problem, statistics, weights, again)
        assert torch.equal(again, gradient)
    else:
        statistics, gradient = in_parts(ops, problem, parts, weights)
    lam = problem.reward_scale
    has = lam != 0 if isinstance(lam, float) else True, lam != 1 if isinstance(lam, float) else True
    value, kl = divergence_value(problem.divergence, lam, statistics, has), kl_to_target(statistics)
    value, kl, gradient = (x.cpu().double() for x in (value, kl, gradient))
    assert all(x.isfinite().all() for x in (value, kl, gradient, entropy(statistics)))
    if problem.divergence.name != "reverse_kl":  # p and at most one t for every entry
        assert gradient.abs().sum(1).max() <= 2 + problem.vocab_size
    if not compare:
        return
    want, want_kl, want_gradient = dense(problem, torch.float64)
    naive, naive_kl, naive_gradient = (x.nan_to_num(math.inf) for x in dense(problem, torch.float32))
    target = statistics[Stat.ORIGIN_TARGET].cpu().double().abs()
    rounding = (8 * EPS * target).clamp_max(1)
    if problem.divergence.name == "forward_kl":
        # t below the normal numbers is 0, and the student's mask a factor of it
        rounding = rounding + 1.2e-38 * problem.student.raw.cpu().double().abs().amax(1)
    compared = (want.abs() < COMPARED) & (want_gradient.abs().amax(1) < COMPARED)
    assert ((value - want).abs() <= allowed(naive, want, rounding))[compared].all()
    known = compared & (want_kl < COMPARED)
    assert ((kl - want_kl).abs() <= allowed(naive_kl, want_kl, rounding))[known].all()
    error, base, size = (
        (x).norm(dim=1) for x in (gradient - want_gradient, naive_gradient - want_gradient, want_gradient)
    )
    assert (error <= 2 * base + 1e-5 * (1 + size) + 2 * rounding)[compared].all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_with_masks_are_as_good_as_the_naive_path(backend: str, divergence: str) -> None:
    ops = select_backend(backend, torch.device("cpu"), {torch.float32})
    for seed in range(1, 84):
        problem = problem_of(seed, divergence)
        check_rows(ops, problem)
        # of larger masks the parts' rounding is another one than that of the whole row, by more than t itself
        exact = all(m.raw.min() >= -1e5 for m in (problem.student, problem.teacher, problem.ref))
        check_rows(ops, problem, [(0, 6), (6, 7), (7, 40)], compare=exact)
    for seed in range(2, 40, 5):
        check_rows(ops, problem_of(seed, divergence, V=2600))


def test_masks_of_float64s_smallest_number_are_finite() -> None:
    x = [m.double() for m in masked_logits(7, 3, 11)]
    for m in x:
        m[:, 5] = torch.finfo(torch.float64).min
    for who in range(1, 8):
        models = [m if who >> i & 1 else m.clamp_min(-9) for i, m in enumerate(x)]
        for divergence in DIVERGENCES:
            for lam in (0.3, 4.0):
                rows = [ModelRows(m, LogitTransform()) for m in models]
                problem = RowProblem(11, rows[0], teacher=rows[1], ref=rows[2], reward_scale=lam,
                                     token_ids=torch.arange(3), divergence=make(divergence))  # fmt: skip
                gradient = torch.empty(3, 11, dtype=torch.float64)
                statistics = TorchRowOps().statistics_and_gradient(
                    problem, GradientWeights(torch.ones(3, dtype=torch.float64)), gradient
                )
                assert statistics.isfinite().all()
                assert gradient.isfinite().all()


OPTIONS: dict[str, dict[str, Any]] = {
    **{f"topk {tail}": {"estimator": "topk", "k": 9, "tail": tail} for tail in ("bucket", "drop", "renormalize")},
    "sampled": {},
    "sampled, expected": {"baseline": "expected"},
    "full, softcap": {"estimator": "full", "transform": {"softcap": 30.0}},
    "full, bfloat16": {"estimator": "full", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_models_with_masks_are_as_good_as_the_naive_path(backend: str, name: str) -> None:
    options = dict(OPTIONS[name])
    transform, dtype = options.pop("transform", {}), options.pop("dtype", torch.float32)
    for seed in range(1, 60):
        logits, lam, ids = masked_logits(seed, 6, 40, dtype), scale_of(seed, 6), torch.arange(6)
        if options.get("estimator") in ("full", "topk"):
            options["divergence"] = DIVERGENCES[seed % 3]

        def losses(function: Any, dtype: torch.dtype | None = None, **more: Any) -> tuple[Tensor, Tensor]:
            z, q, r = (x.to(dtype or x.dtype, copy=True) for x in logits)  # noqa: B023 called at once
            z.requires_grad_()
            scale = lam.to(dtype) if isinstance(lam, Tensor) and dtype else lam  # noqa: B023
            heads = (fg.Logits(x, **transform) for x in (z, q, r))
            out = function(*heads, ids, reward_scale=scale, reduction="sum", **options, **more)  # noqa: B023
            out.loss.backward()
            return out.token_loss.double(), z.grad.double()

        value, gradient = losses(fg.gopd_loss, backend=backend)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        want, want_gradient = losses(fg.reference.gopd_loss, torch.float64)
        naive, naive_gradient = (x.nan_to_num(math.inf) for x in losses(fg.reference.gopd_loss))
        target = torch.zeros(6, dtype=torch.float64)
        for i in range(2):
            for m in logits[1 + i :]:
                target = torch.maximum(target, m.double().abs().amax(1))
        mixed = max(abs(float(x)) + 1 for x in (lam if isinstance(lam, Tensor) else [lam]))
        # a sampled token's and a topk row's largest log-probs are not known here: of the largest mask that there is
        rounding = (2 * EPS * mixed * target).clamp_max(1)
        rounding = rounding + 1.2e-38 * logits[0].double().abs().amax(1)
        last = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0
        compared = (want.abs() < COMPARED) & (want_gradient.abs().amax(1) < COMPARED)
        assert ((value - want).abs() <= allowed(naive, want, rounding))[compared].all()
        error, base = ((x - want_gradient).norm(dim=1) for x in (gradient, naive_gradient))
        size = want_gradient.norm(dim=1)
        assert (error <= 2 * base + (1e-5 + last) * (1 + size) + 2 * rounding * (1 + size))[compared].all()
        with torch.no_grad():
            head = fg.Logits(logits[0], **transform)
            scores, entropy = fg.token_logprobs(head, ids, return_entropy=True, backend=backend)
        assert scores.isfinite().all()
        assert (scores <= 0).all()
        assert entropy.isfinite().all()


@pairwise(backend=["torch", "native"], divergence=DIVERGENCES, fill=FILLS)
def test_equal_models_with_masks_have_loss_and_gradient_0(backend: str, divergence: str, fill: float) -> None:
    logits = masked_logits(0, 6, 40)[0]
    logits[:, [2, 3, 19]] = fill
    for lam in (*LAMBDAS[:-1], torch.tensor(LAMBDAS[:-1])):
        for estimator in ({"estimator": "full"}, {"estimator": "topk", "k": 39}):
            z = logits.clone().requires_grad_()
            out = fg.gopd_loss(
                fg.Logits(z), fg.Logits(logits), fg.Logits(logits), reward_scale=lam, divergence=divergence,
                reduction="sum", backend=backend, **estimator,
            )  # fmt: skip
            out.loss.backward()
            assert not out.token_loss.any()
            assert not z.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_with_masks_is_the_oracle(divergence: str) -> None:
    """Both in float64, written apart."""
    batch = make_batch(5, shape=(6,), vocab=(23,) * 3, kinds=("logits",) * 3, dtype=torch.float64, masked=False)
    for seed, estimator in (
        (4, {"estimator": "full"}),
        (15, {"estimator": "topk", "k": 9}),
        (30, {"estimator": "full"}),
    ):
        for model, logits in zip(batch.models, masked_logits(seed, 6, 23, torch.float64), strict=True):
            model.logits.data.copy_(logits.clamp_min(-1e9))
        options = {**estimator, "divergence": divergence, "reward_scale": 1.25, "reduction": "sum"}
        want, (want_gradient,) = expect(batch, **options)
        batch.student.logits.grad = None
        out = fg.reference.gopd_loss(batch.student, batch.teacher, batch.ref, batch.token_ids, **options)
        out.loss.backward()
        assert relative_error(out.token_loss, want.token_loss) <= 1e-7  # 1e-16 of a target 2.5e8 from 0
        assert relative_error(batch.student.logits.grad, want_gradient) <= 1e-7
