"""Row statistics: what each token's vector holds."""

from __future__ import annotations

import enum

from ..rowops import Stat
from .divergences import Divergence


class TokenRow(enum.IntEnum):
    """Rows of the loop's statistics after those of :class:`Stat`."""

    ADVANTAGE = len(Stat)  # sampled: as the gradient uses it
    REPORTED_ADVANTAGE = len(Stat) + 1  # sampled: as the loss reports it, without the baseline
    TOPK_LOSS = len(Stat) + 2
    TOPK_KL = len(Stat) + 3
    # of the sampled token, where models are taken together (not in topk) and any is made of several
    TEACHER_LOGPROB = TOPK_LOSS
    REF_LOGPROB = TOPK_KL
    GRADIENT_WEIGHT = len(Stat) + 4  # topk: of the logit gradient outside its token ids, see LogitGradient
    GRADIENT_ELSEWHERE = len(Stat) + 5
    LOGPROB_LABEL = len(Stat) + 6  # of the supervised term
    REWARD_SCALE = len(Stat) + 7  # lambda, of a reward_scale_fn


STATISTICS = len(Stat) + len(TokenRow)


def statistics_rows(estimator: str, joint: bool, passes: int = 0) -> int:
    """Rows of the statistics of all tokens, with ``passes`` terms beside the loss that have a row pass of their own.

    Where models are scored one by one, each frozen one has some of its own.
    """
    alone = 2 if estimator == "sampled" and not joint else 0
    return STATISTICS + (alone + passes) * len(Stat)


def pass_rows(before: int, i: int) -> slice:
    """Those of the i-th such term, which come after the ``before`` rows of the estimator."""
    start = before + i * len(Stat)
    return slice(start, start + len(Stat))


def merged_statistics(
    has: tuple[bool, bool], divergence: Divergence | type[Divergence] | None, tokens: bool
) -> list[Stat]:
    """What a merge of statistics reads of a part; ``tokens`` says whether there are sampled tokens."""
    models = [(Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)]
    models += [(Stat.MAX_TEACHER, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER)] if has[0] else []
    models += [(Stat.MAX_REF, Stat.LOGSUM_REF, Stat.LOGIT_REF)] if has[1] else []
    stats = [stat for model in models for stat in (model if tokens else model[:2])] + [Stat.MEAN_LOGIT]
    stats += [Stat.MEAN_GAP] if any(has) else []
    stats += [Stat.LOGSUM_TARGET, Stat.ORIGIN_TARGET] if all(has) else []
    return stats + ([Stat.MEAN_TARGET_GAP] if divergence is not None and divergence.target_gap else [])
