"""Random calls, all options together: fused beside the dense reference, every field, metric and gradient in float64.

A new option belongs into ``options_of``. For more cases than CI has time for raise ``CASES``.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import generator

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = 30
FIELDS = [f.name for f in dataclasses.fields(fg.GOPDOutput) if f.name not in ("mask", "teachers", "joint")]
STATISTICS = {"token_ratio": (0.7, 1.4), "seq_max_ratio": (None, 1.4), "geometric_ratio": (0.9, 1.1)}


class Case:
    """One call: its models, options and tensors, made from a seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), generator(seed)
        self.shape = self.random.randint(1, 3), self.random.randint(1, 4)
        self.vocab = self.choice([7, 17])
        self.estimator = self.choice(["sampled", "full", "topk"])
        self.baseline = self.estimator == "sampled" and self.maybe(0.2)
        self.joint = self.estimator == "full" or self.baseline
        self.ids = torch.randint(self.vocab, self.shape, generator=self.generator)
        self.mask = torch.rand(self.shape, generator=self.generator) < 0.7 if self.maybe(0.4) else None
        self.student = self.head()
        count = self.choice([1, 1, 2])
        self.teacher, self.ref = ([self.frozen() for _ in range(count)] for _ in range(2))
        self.options = self.options_of()
        if count > 1:
            self.options["teacher_index"] = torch.randint(count, self.shape, generator=self.generator)
        else:
            (self.teacher,), (self.ref,) = self.teacher, self.ref

    def choice(self, values: list[Any]) -> Any:
        return self.random.choice(values)

    def maybe(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def head(self) -> Any:
        transform = self.choice([{}, {}, {"softcap": 5.0}, {"temperature": 0.7, "logit_scale": 1.5}])
        if self.maybe(0.5):
            return fg.LinearHead(self.normal(*self.shape, 4), self.normal(self.vocab, 4), **transform)
        z = 2 * self.normal(*self.shape, self.vocab)
        for mask in (-math.inf, -1e9, -math.inf, -60.0)[: self.choice([0, 0, 3, 4])]:
            row, column = (self.random.randrange(n) for n in (z[..., 0].numel(), self.vocab))
            z.view(-1, self.vocab)[row, column] = mask
        return fg.Logits(z, **transform)

    def frozen(self) -> Any:
        if self.maybe(0.25):
            weights = [self.choice([0.5, 1.0, 1.5, torch.rand(self.shape, generator=self.generator)]) for _ in range(2)]
            return self.choice([fg.LogLinear, fg.Mixture])([self.head(), self.head()], weights)
        if self.estimator == "sampled" and not self.baseline and self.maybe(0.2):
            return fg.TokenLogProbs(-self.normal(*self.shape).abs())
        return self.head()

    def options_of(self) -> dict[str, Any]:
        made: dict[str, Any] = {"estimator": self.estimator, "reduction": self.choice(["token-mean", "sum", "none"])}
        scale = self.choice([0.0, 1.0, 1.25, -3.0, 10.0, "tensor", "tensor", "function", "function"])
        if scale == "function":
            name = self.choice(["student_entropy", "teacher_logprobs", "kl_teacher", "kl_ref"])
            made["reward_scale_fn"] = lambda s: (
                1 + getattr(s, name if getattr(s, name) is not None else "student_entropy").clamp(-9, 9).tanh()
            )
        else:
            made["reward_scale"] = 1 + self.normal(*self.shape).round() if scale == "tensor" else scale
        if self.maybe(0.3):
            made |= {"sft_labels": self.ids.masked_fill(self.ids % 3 == 0, -100), "sft_weight": 0.3}
        if self.maybe(0.25):
            made["entropy_weight"] = 0.1
        if self.maybe(0.3):
            made["token_weight"] = torch.rand(self.shape, generator=self.generator)
        if self.maybe(0.2):
            made["loss_max"] = 0.5
        if self.estimator != "topk" and not self.baseline and self.maybe(0.25):
            made["kl_ref"] = "exact" if self.joint else self.choice(["k1", "k2", "k3"])
        if self.estimator != "full" and self.maybe(0.5):
            made["logprob_min"] = self.choice([-1.5, -20.0])
        made |= getattr(self, f"_{self.estimator}")()
        near = fg.token_logprobs(self.student, self.ids)
        old, rollout = ((near + 0.4 * self.normal(*self.shape)).clamp(-30, 0) for _ in range(2))
        if "ratio" in made or self.maybe(0.2):
            made |= {"old_logprobs": old, "rollout_logprobs": rollout, "rollout_is_cap": self.choice([1.5, (0.8, 1.5)])}
            statistic = self.choice(list(STATISTICS))
            made["rollout_mask"] = {statistic: STATISTICS[statistic]}
            made["log_ratio_max"] = self.choice([0.2, 20.0])
        return made

    def _divergence(self) -> dict[str, Any]:
        kinds = [{}, {"divergence": "jsd", "beta": 0.1}, {"divergence": "alpha"}, {"divergence": "skew_kl"}]
        return dict(self.choice([*kinds, {"divergence": "forward_kl"}, {"divergence": "mixed", "forward_weight": 0.3}]))

    def _full(self) -> dict[str, Any]:
        return self._divergence()

    def _topk(self) -> dict[str, Any]:
        tail = self.choice(["bucket", "drop", "renormalize", "sampled"])
        made = {"tail": tail, "support_ids": torch.randint(-1, self.vocab, (*self.shape, 4), generator=self.generator)}
        if tail == "drop" and self.maybe(0.5):
            made["student_logprob_min"] = -2.0
        return made if tail == "sampled" else made | self._divergence()

    def _sampled(self) -> dict[str, Any]:
        made: dict[str, Any] = {"baseline": "expected"} if self.baseline else {}
        if self.maybe(0.5):
            made["ratio"] = self.choice(["token", "sequence", "sequence-mean", "detached"])
            made |= self.choice([{}, {"clip": (0.2, 0.28)}, {"clip": (0.1, 0.1), "advantage_policy": "current"}])
        return made | self.choice([{}, {"advantage_clip": (-0.5, 2.0)}])

    def run(self, function: Any, **more: Any) -> tuple[fg.GOPDOutput, list[Tensor]]:
        named = {k: x.clone().requires_grad_() for k, x in self.student.tensors.items()}
        student = dataclasses.replace(self.student, **named)
        out = function(student, self.teacher, self.ref, self.ids, mask=self.mask, **self.options, **more)
        return out, list(torch.autograd.grad(out.loss.sum(), list(named.values())))


def differs(got: Tensor, want: Tensor, least: float | Tensor = 1e-2) -> bool:
    """An entry differs by more than 1e-7 of itself, or of ``least``: masks of 1e9 leave no more digits."""
    same = (got == want) | (got.isnan() & want.isnan())
    got, want = got.double(), want.double()
    return bool((~same & ~((got - want).abs() <= 1e-7 * (least + want.abs()))).any())


def gradient_differs(got: Tensor, want: Tensor) -> bool:
    return differs(got, want, 1e-2 + want.nan_to_num(0, 0, 0).abs().max())


@pytest.mark.parametrize("part", range(4))
def test_fused_is_dense(part: int) -> None:
    compared = 0
    for seed in range(part * CASES, (part + 1) * CASES):
        case = Case(seed)
        calls = ((fg.reference.gopd_loss, {}), (fg.gopd_loss, {"backend": "torch", "chunk_size": 1 + seed % 5}))
        results: list[Any] = []
        for function, more in calls:
            try:
                results.append(case.run(function, **more))
            except ValueError as error:  # options that exclude each other
                results.append(str(error))
        if any(isinstance(x, str) for x in results):
            assert results[0] == results[1], f"seed {seed}"
            continue
        (want, want_grads), (got, grads) = results
        there = [name for name in FIELDS if isinstance(getattr(want, name), Tensor)]
        wrong = [name for name in there if differs(getattr(got, name).detach(), getattr(want, name).detach())]
        wrong += [
            f"gradient {i}" for i, pair in enumerate(zip(grads, want_grads, strict=True)) if gradient_differs(*pair)
        ]
        of_got, of_want = got.metrics(), want.metrics()
        assert list(of_got) == list(of_want), f"seed {seed}"
        wrong += [name for name in of_want if differs(of_got[name].detach(), of_want[name].detach())]
        assert not wrong, f"seed {seed}: {wrong} of {case.options}"
        compared += 1
    assert compared > 0.5 * CASES
