"""The rules of docs/per-token.md, run as they stand there, against their formulas."""

from __future__ import annotations

import ast
import functools
import math
import re
from pathlib import Path

import pytest
import torch

import fused_gopd as fg
from builders import assert_close, generator, make_batch, run

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "per-token.md"


def recipe(name: str):
    """A function or class of the page, executed from its text, without what follows its definition."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tree,) = [ast.parse(x) for x in blocks if f"def {name}(" in x or f"class {name}:" in x]
    (node,) = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name == name]
    namespace = {"torch": torch, "math": math, "fg": fg}
    exec(compile(ast.Module([node], []), PAGE.name, "exec"), namespace)
    return namespace[name]


@pytest.fixture
def batch():
    return make_batch(91, shape=(3, 5))


def logprobs(batch):
    out, _ = run(batch, reward_scale=1.25)
    return out.student_logprobs, out.teacher_logprobs, out.ref_logprobs


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_bounded_rewards(batch, backend, alpha):
    p, q, _ = logprobs(batch)
    narrow = make_batch(91, shape=(3, 5), dtype=torch.float32)
    hook = functools.partial(recipe("power"), alpha=alpha)
    out, _ = run(narrow, backend=backend, reward_scale=1.25, advantage_fn=hook)
    want = (q.exp() ** alpha - p.exp() ** alpha) / alpha
    assert_close(out.advantages, want * batch.mask, 1e-5)
    assert out.advantages.abs().max() <= 1 / alpha


def test_bounded_rewards_become_the_log_ratio(batch):
    p, q, _ = logprobs(batch)
    out, _ = run(batch, reward_scale=1.0, advantage_fn=functools.partial(recipe("power"), alpha=1e-7))
    assert_close(out.advantages, (q - p) * batch.mask, 1e-5)


@pytest.mark.parametrize("options", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 5}])
def test_sign_gate_is_a_lambda_per_token(batch, options):
    _, q, r = logprobs(batch)
    verdict = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 5)
    gate = functools.partial(recipe("sign_gate"), verdict=verdict)
    got, grads = run(batch, reward_scale_fn=gate, **options)
    lam = torch.where((q - r).sign() == verdict, 1.25, 0.5).double()
    want, want_grads = run(batch, reward_scale=lam, **options)
    assert set(lam[batch.mask].tolist()) == {0.5, 1.25}
    assert_close(got.token_loss, want.token_loss, 1e-12)
    assert_close(grads[0], want_grads[0], 1e-12)


@pytest.mark.parametrize("options", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 5}])
def test_reopd_is_its_formula(batch, options):
    """lambda = 1 + gamma q of the batches before; and gamma from the batch itself where that is scored first."""
    p, q, r = logprobs(batch)
    x, live = (q - p)[batch.mask], batch.mask
    weight = torch.exp(-(x.exp() - 1 - x) / 0.5)
    rule = recipe("Reopd")(tau=0.5, budget=0.5)
    first, grads = run(batch, reward_scale_fn=rule, chunk_size=4, **options)
    assert rule.sums[3] == batch.mask.sum()
    rule.sums = 0
    assert_close(first.reward_scale[live], 1 + 0.25 * weight, 1e-10)
    want, want_grads = run(batch, reward_scale=first.reward_scale, **options)
    assert_close(first.token_loss, want.token_loss, 1e-12)
    assert_close(grads[0], want_grads[0], 1e-12)
    reward = (q - r)[live]
    share = (reward.abs() * weight).sum() / reward.abs().sum()
    size = ((weight * reward) ** 2).mean() ** 0.5
    for _ in range(2):  # the second batch has the same statistics: their means stay, the budget moves on
        before = float(rule.gamma)
        run(batch, reward_scale_fn=rule, **options)
        rule.update()
        target = min(max(float(0.5 * share / size), 0), 1)
        assert float(rule.gamma) == pytest.approx(0.9 * before + 0.1 * target, rel=1e-6)
    second, _ = run(batch, reward_scale_fn=rule, **options)
    assert_close(second.reward_scale[live], 1 + float(rule.gamma) * weight, 1e-6)
    assert (second.reward_scale[live] >= 1).all()
    assert (second.reward_scale <= 2).all()


def test_reopd_leaves_an_impossible_token_at_1():
    batch = make_batch(92, shape=(4,), kinds=("logits",) * 3, masked=False)
    with torch.no_grad():
        batch.teacher.logits[1, batch.token_ids[1]] = -math.inf
    rule = recipe("Reopd")(tau=0.5)
    out, _ = run(batch, reward_scale_fn=rule)
    assert out.reward_scale[1] == 1
    rule.update()
    assert math.isfinite(rule.gamma)


def test_a_nearby_teacher_is_the_mixture_of_both(batch):
    p, q, _ = logprobs(batch)
    old = (p - 0.2 * torch.rand(3, 5, dtype=torch.float64)).clamp_max(0)
    for given, behaviour in (({}, p), ({"old_logprobs": old}, old)):
        out, _ = run(batch.replaced(ref=None), advantage_fn=recipe("nearby"), **given)
        want = torch.log((0.2 * q.exp() + 0.8 * behaviour.exp()) / behaviour.exp())
        assert_close(out.advantages, want * batch.mask, 1e-12)
    assert out.advantages.min() >= math.log(0.8)


def test_top_d_is_its_formula():
    """Token by token: the reward and the mean of what follows, normalised over the tokens of a prompt."""
    g = generator(93)
    q, old = (-3 * torch.rand(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    group = torch.tensor([7, 7, 2, 2])
    got = recipe("top_d")(q, old, mask, group, alpha=0.3)
    reward = torch.log(0.3 * (q - old).exp() + 0.7)
    returns = torch.zeros_like(q)
    for b, length in enumerate([6, 3, 1, 5]):
        for t in range(length):
            after = reward[b, t + 1 : length]
            returns[b, t] = reward[b, t] + (after.mean() if len(after) else 0)
    for one in (7, 2):
        own = mask & (group == one)[:, None]
        x = returns[own]
        assert_close(got[own], (x - x.mean()) / x.std(correction=0), 1e-12)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_tide_is_its_formula(weight):
    """Both branches and their gates, dense in float64: value, gradient, and no gradient in the tokens between."""
    batch = make_batch(94, shape=(4, 8))
    mask = batch.mask
    loss = recipe("tide")(batch.student, batch.teacher, batch.token_ids, mask, k=5, keep=0.25, weight=weight)
    grads = torch.autograd.grad(loss, batch.leaves)
    own, other = ((m.hidden @ m.weight.T).log_softmax(-1) for m in (batch.student, batch.teacher))
    p, q = (x.gather(2, batch.token_ids[..., None])[..., 0] for x in (own, other))
    top, ids = other.detach().topk(5)
    likely = top - top.logsumexp(-1, keepdim=True)
    lack = (likely.exp() * (likely - own.gather(2, ids))).sum(-1).clamp_min(0)

    def worst(x):
        return (x >= torch.quantile(x[mask], 0.75)) & mask

    a = (q - p).detach()
    excess, deficit = worst((-a).clamp_min(0)) & (a < 0), worst(lack.detach())
    shaped = 2 * ((a / 2).exp() - 1)
    assert (shaped[excess] > -2).all()
    policy = -(shaped * p)[excess].sum() / mask.sum()
    want = policy + weight * lack[deficit].sum() / mask.sum()
    want_grads = torch.autograd.grad(want, batch.leaves)
    assert_close(grads[0], want_grads[0], 1e-11)
    assert_close(grads[1], want_grads[1], 1e-11)
    between = mask & ~excess & ~deficit
    assert between.any()
    assert (grads[0][between] == 0).all()
    # the value of the policy gradient is -A, without log p
    assert_close(loss, (-shaped[excess].sum() + weight * lack[deficit].sum()) / mask.sum(), 1e-11)


def test_calibrated_is_its_formula(batch):
    p, q, _ = logprobs(batch)
    g = generator(95)
    praised, blamed = (q + 0.3 * torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    hook = functools.partial(recipe("calibrated"), praised=praised, blamed=blamed, width=6.0)
    out, _ = run(batch.replaced(ref=None), advantage_fn=hook)
    seen = set()
    for t in batch.mask.reshape(-1).nonzero()[:, 0].tolist():
        own, told = float(p.reshape(-1)[t]), float(q.reshape(-1)[t])
        shifts = [float(x.reshape(-1)[t]) - told for x in (praised, blamed)]
        low, high = told - 6 * max(0, *(-x for x in shifts)), told + 6 * max(0, *shifts)
        want = max(low - own, 0) - max(own - high, 0)
        assert float(out.advantages.reshape(-1)[t]) == pytest.approx(want, abs=1e-12)
        seen.add((want > 0) - (want < 0))
    assert seen == {-1, 0, 1}


def test_entropy_selection(batch):
    plain, _ = run(batch, reward_scale=1.25)
    median = float(plain.entropy[batch.mask].median())
    hook = functools.partial(recipe("undecided"), least_entropy=median)
    out, _ = run(batch, reward_scale=1.25, advantage_fn=hook)
    kept = (plain.entropy >= median) & batch.mask
    assert (out.advantages[~kept] == 0).all()
    assert_close(out.advantages[kept], plain.advantages[kept].clamp_min(math.log(0.2)), 1e-12)
    assert (out.advantages[kept] == math.log(0.2)).any()
