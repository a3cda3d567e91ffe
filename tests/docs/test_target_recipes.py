"""The recipes and identities of docs/targets.md, against formulas written out here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmarks.frozen_head import functions
from torch import Tensor

import fused_gopd as fg
from builders import assert_all_close, assert_close, linear_head, make_batch, run

SHAPE = (2, 5)


def model(seed: int, width: int) -> fg.LinearHead:
    return linear_head(seed, SHAPE, 37, width, torch.float64)


def log(head: fg.LinearHead) -> Tensor:
    return (head.hidden @ head.weight.T).log_softmax(-1).detach()


def assert_is(batch, target, log_target: Tensor) -> None:
    """``full`` is sum p (log p - log g) and ``sampled`` -A log p, with log g as given."""
    batch = batch.replaced(teacher=target)
    log_p = (batch.student.hidden @ batch.student.weight.T).log_softmax(-1)
    at = lambda x: x.gather(-1, batch.token_ids[..., None])[..., 0]  # noqa: E731
    divisor = batch.mask.sum()
    full = ((log_p.exp() * (log_p - log_target)).sum(-1) * batch.mask).sum() / divisor
    advantage = at(log_target - log_p).detach()
    sampled = -(advantage * at(log_p) * batch.mask).sum() / divisor
    for estimator, value in (("full", full), ("sampled", sampled)):
        out, grads = run(batch, estimator=estimator)
        assert_all_close(grads, torch.autograd.grad(value, batch.leaves, retain_graph=True), 1e-12)
        assert_close(out.advantages, advantage * batch.mask, 1e-12)
    assert_close(run(batch, estimator="full")[0].loss, full, 1e-12)


def test_weak_to_strong():
    base, trained, weak = model(1, 9), model(2, 4), model(3, 5)
    target = fg.LogLinear([base, trained, weak], [1.0, 1.0, -1.0])
    assert_is(make_batch(), target, log(base) + log(trained) - log(weak))


def test_reward_correction_with_the_students_own_base():
    """The optimum of E[lam (log q - log r_q)] - KL(p || r) is r (q / r_q)^lam."""
    ref, teacher, base, lam = model(4, 9), model(5, 4), model(6, 5), 1.25
    target = fg.LogLinear([ref, teacher, base], [1.0, lam, -lam])
    assert_is(make_batch(), target, log(ref) + lam * (log(teacher) - log(base)))


def test_ensembles():
    a, b, gate = model(7, 9), model(8, 4), torch.rand(SHAPE, dtype=torch.float64)
    assert_is(make_batch(), fg.LogLinear([a, b]), (log(a) + log(b)) / 2)
    assert_is(make_batch(), fg.Mixture([a, b]), ((log(a).exp() + log(b).exp()) / 2).log())
    mixed = gate[..., None] * log(a).exp() + (1 - gate)[..., None] * log(b).exp()
    assert_is(make_batch(), fg.Mixture([a, b], [gate, 1 - gate]), mixed.log())


def test_skills_added_to_one_base():
    base, a, b = model(9, 9), model(10, 4), model(11, 5)
    target = fg.LogLinear([base, a, b], [1 - 0.7 - 0.6, 0.7, 0.6])
    assert_is(make_batch(), target, log(base) + 0.7 * (log(a) - log(base)) + 0.6 * (log(b) - log(base)))


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.25])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_kl_penalty_is_another_lambda(estimator, lam):
    """In ``sampled`` that with the score function's gradient: its term is A of the reference, b (log r - log p)."""
    batch, b = make_batch(12), 0.3
    weight = torch.full(SHAPE, 1 + b, dtype=torch.float64)
    out, grads = run(batch, estimator=estimator, reward_scale=lam / (1 + b), token_weight=weight)
    _, plain = run(batch, estimator=estimator, reward_scale=lam)
    _, penalty = run(batch, estimator=estimator, reward_scale=0.0)
    assert_all_close(grads, [x + b * y for x, y in zip(plain, penalty, strict=True)], 1e-11)
    if estimator == "full":
        terms, terms_grads = run(batch, estimator="full", reward_scale=lam, kl_ref="exact", kl_ref_weight=b)
        assert_close(out.loss, terms.loss, 1e-12)
        assert_all_close(grads, terms_grads, 1e-11)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_an_entropy_bonus_is_another_target(estimator):
    batch, b, lam = make_batch(13), 0.3, 1.25
    target = fg.LogLinear([batch.teacher, batch.ref], [lam / (1 + b), (1 - lam) / (1 + b)])
    weight = torch.full(SHAPE, 1 + b, dtype=torch.float64)
    out, grads = run(batch.replaced(teacher=target, ref=None), estimator=estimator, token_weight=weight)
    if estimator == "full":
        terms, terms_grads = run(batch, estimator="full", reward_scale=lam, entropy_weight=b)
        assert_close(out.loss, terms.loss, 1e-12)
        assert_all_close(grads, terms_grads, 1e-11)
    else:  # the bonus by its score function: A has b (0 - log p) more
        _, want = run(batch, reward_scale=lam, advantage_fn=lambda s: s.advantages - b * s.student_logprobs)
        assert_all_close(grads, want, 1e-11)


@pytest.mark.parametrize("lam", [1.0, 1.25, -0.5])
def test_the_expected_row_of_a_frozen_head(lam):
    """Value and gradient of the forward KL, also after the hidden states have moved; masked tokens may be NaN."""
    names = functions()
    batch = make_batch(5, dtype=torch.float64)
    student = dataclasses.replace(
        batch.student, weight=batch.student.weight.detach(), logit_scale=0.7, temperature=1.6, bias=None, softcap=None
    )
    teacher, ref, mask = model(9, 6), model(10, 4), batch.mask
    teacher.hidden[~mask] = float("nan")
    kept = names["expected"](student, teacher, ref, mask=mask, reward_scale=lam)
    log_t = (lam * log(teacher) + (1 - lam) * log(ref)).log_softmax(-1)
    for shift in (0.0, 0.3):
        hidden = (student.hidden.detach() + shift).requires_grad_()
        moved = dataclasses.replace(student, hidden=hidden)
        got = names["forward_kl"](moved, *kept, batch.token_ids, mask)
        log_p = (hidden[mask] @ student.weight.T * (0.7 / 1.6)).log_softmax(-1)
        want = (log_t[mask].exp() * (log_t[mask] - log_p)).sum(-1).mean()
        assert_close(got, want, 1e-12)
        assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (got, want)), 1e-12)
