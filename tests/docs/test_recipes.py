"""The advantages of docs/objectives.md, run as they stand there."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import pytest
import torch

from builders import assert_close, make_batch, run

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def recipe(name: str):
    """A function of the page, executed from its text."""
    (source,) = [x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if f"def {name}(" in x]
    namespace = {"torch": torch, "math": math}
    exec(source, namespace)
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


def test_sign_gate_is_a_lambda_per_token(batch):
    _, q, r = logprobs(batch)
    verdict = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 5)
    hook = functools.partial(recipe("sign_gate"), verdict=verdict)
    got, grads = run(batch, reward_scale=1.25, advantage_fn=hook)
    lam = torch.where((q - r).sign() == verdict, 1.25, 0.5).double()
    want, want_grads = run(batch, reward_scale=lam)
    assert set(lam[batch.mask].tolist()) == {0.5, 1.25}
    assert_close(got.advantages, want.advantages, 1e-12)
    assert_close(grads[0], want_grads[0], 1e-12)


def test_entropy_selection(batch):
    plain, _ = run(batch, reward_scale=1.25)
    median = float(plain.entropy[batch.mask].median())
    hook = functools.partial(recipe("undecided"), least_entropy=median)
    out, _ = run(batch, reward_scale=1.25, advantage_fn=hook)
    kept = (plain.entropy >= median) & batch.mask
    assert (out.advantages[~kept] == 0).all()
    assert_close(out.advantages[kept], plain.advantages[kept].clamp_min(math.log(0.2)), 1e-12)
    assert (out.advantages[kept] == math.log(0.2)).any()
