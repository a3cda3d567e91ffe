"""What a type checker sees of the public calls: checked with the package, by mypy, never run.

A line with an ignored error is a wrong call that has to be one: mypy reports an ignore that nothing needs.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

import fused_gopd as fg
from fused_gopd import reference
from fused_gopd.graphs import Graphed


def right(student: fg.LinearHead, teacher: fg.Logits, ids: Tensor) -> None:
    assert_type(fg.gopd_loss(student, teacher, None, ids, estimator="full", beta=0.5, mask=None), fg.GOPDOutput)
    assert_type(fg.gopd_loss(student, [teacher, teacher], teacher_index=ids, reward_scale=1.25), fg.GOPDOutput)
    assert_type(reference.gopd_loss(student, teacher, token_ids=ids, clip=(0.2, 0.28)), fg.GOPDOutput)
    made = fg.LogLinear([student, teacher, fg.TokenLogProbs(ids)], [1, ids, -0.5])
    assert_type(fg.gopd_loss(student, made, [fg.Mixture([student, teacher]), made], ids), fg.GOPDOutput)
    out = fg.gopd_loss(student, teacher)
    assert_type(out.metrics(), fg.Metrics)
    assert_type(out.metrics(by="teacher"), list[fg.Metrics])
    step = fg.graphed(lambda x: x.sum(), ids, weights=[ids])
    assert_type(step, Graphed)
    assert_type(step.memory, int)


def wrong(student: fg.LinearHead, teacher: fg.Logits, ids: Tensor) -> None:
    fg.gopd_loss(student)  # type: ignore[call-arg]
    fg.gopd_loss(student, teacher, None, ids, None)  # type: ignore[call-arg, arg-type]
    fg.gopd_loss(student, teacher, lam=1.25)  # type: ignore[call-arg]
    fg.gopd_loss(student, teacher, estimator="some")  # type: ignore[arg-type]
    fg.gopd_loss(ids, teacher)  # type: ignore[arg-type]
    fg.gopd_loss(fg.LogLinear([student]), teacher)  # type: ignore[arg-type]
    fg.LogLinear([fg.Mixture([student])])  # type: ignore[list-item]
    fg.graphed(lambda x: x.sum(), weights=3)  # type: ignore[arg-type]
    reference.gopd_loss(student, teacher, clip_dual="3")  # type: ignore[arg-type]
