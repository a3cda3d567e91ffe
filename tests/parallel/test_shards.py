"""Vocabularies that several ranks share: the same numbers as one process gets with whole heads.

Every test that needs ranks launches them once and lets them (functions with an underscore) check many cases.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fused_gopd as fg
from builders import Batch, assert_close, generator, linear_head, make_batch, relative_error, widened
from fused_gopd import agreement
from fused_gopd.cli.plan.call import PlannedCall
from fused_gopd.cli.plan.communication import collectives
from ranks import RankError, run_on_ranks

V = 1003
SHAPE = (4, 32)
EVEN = {2: ((0, 502), (502, 1003)), 4: ((0, 251), (251, 502), (502, 753), (753, 1003))}
# out of order, a rank with one row, ranks with none
UNEVEN = {2: ((700, 1003), (0, 700)), 4: ((0, 0), (1, 900), (0, 1), (900, 1003))}
OTHER = {2: ((0, 100), (100, 1003)), 4: ((900, 1003), (0, 300), (300, 900), (0, 0))}


def _lambda_of(stats: fg.TokenStats) -> torch.Tensor:
    """Between 0 and 2, from statistics that are merged over the ranks."""
    assert stats.kl_teacher is not None
    return 1 + (stats.student_entropy - stats.kl_teacher + 0.1 * stats.student_logprobs).tanh()


OF_STATISTICS: dict[str, Any] = {"reward_scale": 1.0, "reward_scale_fn": _lambda_of}
BOUNDS = {"divergence": "jsd", "logprob_min": -6.0, "student_logprob_min": -5.0}
# Options, and what differs from three linear heads that are all cut alike.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampled": ({}, {}),
    "sampled off policy": ({"clip": (0.2, 0.3), "old": True, "advantage_clip": 2.0}, {}),
    "sampled of whole sequences": ({"ratio": "sequence", "old": True}, {}),
    "sampled, weights of whole sequences": ({"rollout": True, "rollout_is": "geometric", "rollout_is_cap": 1.05}, {}),
    "full, weights": ({"estimator": "full", "rollout": True, "rollout_mask": {"token_ratio": (0.5, 2.0)}}, {}),
    "topk, weights": ({"estimator": "topk", "k": 9, "rollout": True, "loss_max": 0.5}, {}),
    "sampled with labels": ({"labels": True, "sft_weight": 0.5}, {}),
    "baseline": ({"baseline": "expected"}, {}),
    "cut in different ways": ({}, {"teacher": "other", "ref": "whole"}),
    "student whole": ({}, {"student": "whole", "ref": "other"}),
    "scored elsewhere": ({}, {"kinds": ("linear", "logprobs", "linear")}),
    "full": ({"estimator": "full"}, {}),
    "full, none": ({"estimator": "full", "reduction": "none"}, {}),
    "full forward": ({"estimator": "full", "divergence": "forward_kl"}, {}),
    "full jsd": ({"estimator": "full", "divergence": "jsd", "beta": 0.3}, {}),
    "full jsd, none, labels": ({"estimator": "full", "divergence": "jsd", "reduction": "none", "labels": True}, {}),
    "full, lambda per token": ({"estimator": "full", "reward_scale": "tensor"}, {}),
    "full jsd, lambda per token": ({"estimator": "full", "divergence": "jsd", "reward_scale": "tensor"}, {}),
    "full skew, none": ({"estimator": "full", "divergence": "skew_kl", "skew": 0.3, "reduction": "none"}, {}),
    "full alpha": ({"estimator": "full", "divergence": "alpha", "alpha": 1.5}, {}),
    "full mixed": ({"estimator": "full", "divergence": "mixed", "forward_weight": "tensor"}, {}),
    "full, teacher alone": ({"estimator": "full", "reward_scale": 1.0, "score_cancelled": True}, {}),
    "full, reference alone": ({"estimator": "full", "reward_scale": 0.0, "divergence": "forward_kl"}, {}),
    "full, frozen ones whole": ({"estimator": "full"}, {"teacher": "whole", "ref": "whole"}),
    "full, transforms": (
        {"estimator": "full"},
        {"transforms": ({"bias": True, "softcap": 5.0}, {"bias": True, "temperature": 0.7}, {"logit_scale": 1.5})},
    ),
    "full of logits": ({"estimator": "full"}, {"kinds": ("logits", "logits", "linear"), "teacher": "whole"}),
    "sampled of logits": ({}, {"kinds": ("logits", "linear", "logits")}),
    "full, smaller joint vocabulary": ({"estimator": "full", "vocab_size": 800}, {}),
    "topk": ({"estimator": "topk", "k": 9}, {}),
    "topk of the student": ({"estimator": "topk", "k": 9, "support": "student", "tail": "drop"}, {}),
    "topk, bounds": ({"estimator": "topk", "k": 9, "tail": "drop", **BOUNDS}, {}),
    "topk jsd": ({"estimator": "topk", "k": 9, "divergence": "jsd", "tail": "renormalize"}, {"ref": "whole"}),
    "topk skew": ({"estimator": "topk", "k": 9, "divergence": "skew_reverse_kl", "tail": "drop"}, {}),
    "topk forward, labels, none": (
        {"estimator": "topk", "k": 9, "divergence": "forward_kl", "labels": True, "reduction": "none"},
        {"transforms": ({"bias": True}, {"bias": True}, {})},
    ),
    "topk and the sampled token": ({"estimator": "topk", "k": 9, "tail": "sampled", "reward_scale": "tensor"}, {}),
    "no support, labels, none": (
        {"estimator": "topk", "k": 0, "tail": "sampled", "labels": True, "reduction": "none"},
        {"ref": "whole"},
    ),
    "topk of ids": ({"estimator": "topk", "support_ids": True, "tail": "sampled"}, {"teacher": "whole"}),
    "topk of logits": ({"estimator": "topk", "k": 9}, {"kinds": ("logits", "linear", "linear")}),
    "full, lambda of the statistics": ({"estimator": "full", **OF_STATISTICS}, {}),
    "full jsd, none, lambda of the statistics": (
        {"estimator": "full", "divergence": "jsd", "reduction": "none", **OF_STATISTICS},
        {"teacher": "whole"},
    ),
    "topk, lambda of the statistics": ({"estimator": "topk", "k": 9, **OF_STATISTICS}, {"ref": "whole"}),
    "full, weighted": ({"estimator": "full", "token_weight": "tensor"}, {}),
    "entropy and k3": ({"entropy_weight": 0.3, "kl_ref": "k3", "reward_scale": 1.0}, {}),
    "topk, entropy": ({"estimator": "topk", "k": 9, "entropy_weight": 0.3}, {}),
    "full, every term": (
        {"estimator": "full", "entropy_weight": 0.3, "kl_ref": "exact", "labels": True, "sft_temperature": 2.0},
        {},
    ),
    "sum of models": ({"reward_scale": "tensor", "score_cancelled": False}, {"made": fg.LogLinear}),
    "sum of models, cancelled": ({"reward_scale": 0.0, "score_cancelled": True}, {"made": fg.LogLinear}),
    "full, sum of models": ({"estimator": "full"}, {"made": fg.LogLinear}),
    "full jsd, mixture, none": ({"estimator": "full", "divergence": "jsd", "reduction": "none"}, {"made": fg.Mixture}),
    "baseline, sum of whole models": ({"baseline": "expected"}, {"made": fg.LogLinear, "teacher": "whole"}),
    "topk of a mixture": ({"estimator": "topk", "k": 9}, {"made": fg.Mixture}),
    "topk of a sum": ({"estimator": "topk", "k": 9, "tail": "renormalize"}, {"made": fg.LogLinear, "teacher": "whole"}),
    "full, a map": ({"estimator": "full"}, {"teacher": "whole", "map": True}),
    "full jsd, sums of maps": ({"estimator": "full", "divergence": "jsd"}, {"made": fg.LogLinear, "map": True}),
    "baseline, a map": ({"baseline": "expected"}, {"teacher": "whole", "map": True}),
    "sampled, a map": ({"logprob_min": -9.0}, {"teacher": "whole", "map": True}),
    "topk, a map": ({"estimator": "topk", "k": 9}, {"teacher": "whole", "map": True}),
    "topk of sums of maps": ({"estimator": "topk", "k": 9}, {"made": fg.Mixture, "map": True}),
    "nothing live": ({"estimator": "full"}, {"nothing": True}),
    "filtered": ({"estimator": "full", "grad_filter": 1e-12}, {}),
}


def _case(name: str, dtype: torch.dtype) -> tuple[Batch, dict[str, Any], dict[str, str]]:
    options, changes = (dict(x) for x in CASES[name])
    cuts = {model: changes.pop(model, "alike") for model in ("student", "teacher", "ref")}
    nothing, made, mapped = changes.pop("nothing", False), changes.pop("made", None), changes.pop("map", False)
    batch = make_batch(3, shape=SHAPE, vocab=(V, V, V), hidden=(32, 24, 16), dtype=dtype, **changes)
    if mapped:
        size = 1500
        rows = torch.randperm(size, generator=generator(9))[:V]
        rows = rows.masked_fill(rows < 300, -1)
        known = (rows >= 0).nonzero()[:, 0]  # other tokens have a log-prob of -inf
        batch.token_ids.copy_(known[batch.token_ids % len(known)])
        batch = batch.replaced(teacher=linear_head(32, SHAPE, size, 8, dtype, bias=True, vocab_map=rows))
    if made is not None:
        third = linear_head(31, SHAPE, V, 8, dtype, bias=True, softcap=5.0)
        weights = torch.rand(SHAPE, generator=generator(8)).to(dtype).masked_fill(batch.token_ids % 3 == 0, 0)
        batch = batch.replaced(teacher=made([batch.teacher, third], [1.5, weights]))
    assert batch.mask is not None
    if nothing:
        batch.mask.zero_()
    with torch.no_grad():  # nobody may look at what is masked
        batch.student.rows[~batch.mask] = math.nan
    batch.token_ids.remainder_(options.get("vocab_size", V))
    g = torch.Generator().manual_seed(5)
    if options.pop("old", False):
        noise = torch.randn(SHAPE, generator=g) * 0.1
        options["old_logprobs"] = fg.token_logprobs(batch.student, batch.token_ids, mask=batch.mask).detach() + noise
    if options.pop("rollout", False):
        noise = torch.randn(SHAPE, generator=g) * 0.3
        scored = fg.token_logprobs(batch.student, batch.token_ids, mask=batch.mask).detach()
        options["rollout_logprobs"] = scored + noise
    if options.pop("labels", False):
        options["sft_labels"] = torch.randint(0, V, SHAPE, generator=g).where(
            torch.rand(SHAPE, generator=g) < 0.5, -100
        )
    if options.pop("support_ids", False):
        options["support_ids"] = torch.randint(-1, V, (*SHAPE, 6), generator=g)
    if options.setdefault("reward_scale", 1.25) == "tensor":
        choices = torch.tensor([0.0, 1.0, 0.5, 1.25])
        options["reward_scale"] = choices[torch.randint(0, 4, SHAPE, generator=g)]
    for name in ("forward_weight", "token_weight"):
        if options.get(name) == "tensor":
            options[name] = torch.rand(SHAPE, generator=g)
    return batch, {"chunk_size": 16, **options}, cuts


def _local(head: Any, shard: fg.VocabShard) -> Any:
    """This rank's part of a whole head, with two rows of padding where there are any."""
    if isinstance(head, (fg.LogLinear, fg.Mixture)):
        return type(head)([_local(x, shard) for x in head.models], head.weights)
    if head.vocab_map is not None:  # whole on every rank
        return head
    cut = slice(shard.start, shard.stop + 2 if shard.count else shard.stop)
    own = {k: x.detach() for k, x in head.tensors.items()}
    if isinstance(head, fg.Logits):
        own["logits"] = own["logits"][..., shard.start : shard.stop].clone()
    else:
        own |= {k: x[cut].clone() for k, x in own.items() if k != "hidden"}
    for name, x in own.items():
        x.requires_grad_(head.tensors[name].requires_grad)
    return dataclasses.replace(head, **own, shard=shard)


FIELDS = ("token_loss", "advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "entropy", "kl",
          "label_logprobs")  # fmt: skip


def _values(batch: Batch, options: dict[str, Any], shard: fg.VocabShard | None = None) -> dict[str, torch.Tensor]:
    """Loss, fields and gradients; a shard's are those of its own rows."""
    upstream = {}
    if options.get("reduction") == "none":
        upstream = {"grad_outputs": torch.linspace(-1, 2, 128, dtype=torch.float64).reshape(SHAPE).float()}
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    if upstream:
        upstream["grad_outputs"] = upstream["grad_outputs"].to(out.loss.dtype)
    names = [k for k, x in batch.student.tensors.items() if x.requires_grad]
    grads = dict(zip(names, torch.autograd.grad(out.loss, batch.leaves, **upstream), strict=True))
    values = {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}
    # logits of masked tokens have gradients of 0, hidden states too
    return {"loss": out.loss.detach(), **values, **{f"gradient of {k}": x for k, x in grads.items()}}


def _sharded(batch: Batch, cuts: dict[str, str], layouts: dict[str, fg.VocabShard]) -> Batch:
    models = {}
    for name, how in cuts.items():
        model = getattr(batch, name)
        models[name] = model if how == "whole" or isinstance(model, fg.TokenLogProbs) else _local(model, layouts[how])
    return batch.replaced(**models)


OWN = ("gradient of weight", "gradient of bias", "gradient of logits")  # a rank has its own part of them


def _own_part(what: str, x: torch.Tensor, shard: fg.VocabShard) -> torch.Tensor:
    """What of a single process's value a shard's rank has."""
    if what == "gradient of logits":
        return x[..., shard.start : shard.stop]
    return x[shard.start : shard.stop] if what in OWN else x


def _error(got: torch.Tensor, want: torch.Tensor, cut: bool) -> float:
    """Norm-relative error of what each rank has, or of all that the ranks have together."""
    squares = torch.stack([(got.double() - want).square().sum(), want.double().square().sum()])
    if cut:
        dist.all_reduce(squares)
    return float((squares[0] / squares[1].clamp_min(1e-12)).sqrt())


def _everywhere(values: dict[str, torch.Tensor]) -> None:
    """What every rank has is the same, to the bit."""
    common = {
        k: x for k, x in values.items() if k not in ("gradient of weight", "gradient of bias", "gradient of logits")
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, common)
    for name, x in common.items():
        for other in every:
            assert torch.equal(
                other[name],
                x,
            ), f"{name} differs between ranks"


def _exact(batch: Batch, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The values in float64."""
    wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
    options = {
        k: x.double() if k in ("old_logprobs", "reward_scale") and isinstance(x, torch.Tensor) else x
        for k, x in options.items()
    }
    return _values(wide, {**options, "backend": "torch"})


def _check_case(name: str, dtype: torch.dtype, backend: str = "auto") -> float:
    """One case in both layouts against one process; returns the largest ratio of errors."""
    n, worst = dist.get_world_size(), 0.0
    batch, options, cuts = _case(name, dtype)
    options["backend"] = backend
    exact = _exact(batch, options)
    single = exact if dtype == torch.float64 else _values(batch, options)
    for kind, bounds in (("even", EVEN[n]), ("uneven", UNEVEN[n])):
        mine = [b[dist.get_rank()] for b in (bounds, OTHER[n])]
        layouts = {how: fg.VocabShard(None, *b) for how, b in zip(("alike", "other"), mine, strict=True)}
        sharded = _sharded(batch, cuts, layouts)
        got = _values(sharded, options)
        _everywhere(got)
        assert got.keys() == single.keys()
        own = None if cuts["student"] == "whole" else layouts["alike"]
        for what, x in got.items():
            where = f"{name}, {kind}: {what}"
            wanted, alone = exact[what], single[what]
            if own is not None:
                wanted, alone = (_own_part(what, y, own) for y in (wanted, alone))
                if what in ("gradient of weight", "gradient of bias"):
                    assert x.shape[0] == sharded.student.weight.shape[0]
                    assert not x[own.count :].any(), f"{where}: padding"
                    x = x[: own.count]
            if dtype == torch.float64:
                assert_close(x, wanted, 1e-12, where)
                continue
            error, single_error = (_error(y, wanted, cut=own is not None and what in OWN) for y in (x, alone))
            floor = torch.finfo(torch.float32).eps / 2  # of rounding the result itself
            if what == "loss":
                # one number, which may happen to be right: its error is that of the token losses
                scale = exact["token_loss"].double().norm().clamp_min(1e-6) / exact["loss"].double().norm()
                error, single_error = error / scale, 2 * relative_error(single["token_loss"], exact["token_loss"])
            assert error <= max(1.5 * single_error, floor), f"{where}: off by {error:.1e}, alone {single_error:.1e}"
            worst = max(worst, error / max(single_error, floor))
    return worst


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.ranks
def test_every_estimator_is_as_accurate_as_in_one_process(n):
    run_on_ranks("test_shards:_all_cases", n, timeout=180)


def _all_cases() -> None:
    for name in CASES:
        if dist.get_world_size() == 2:
            _check_case(name, torch.float64)
        _check_case(name, torch.float32)
    for name in ("sampled", "full", "full jsd", "topk"):
        _check_case(name, torch.float32, "torch")


# ---------------------------------------------------------------------------------------------- what else ranks can do


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.ranks
def test_vocabulary_parallel_calls(n):
    run_on_ranks("test_shards:_calls", n, timeout=120)


def _calls() -> None:
    for check in (
        _log_probs_and_topk,
        _cross_entropy,
        _lists_from_a_server,
        _several_teachers,
        _far_targets,
        _equal_models,
        _a_diverged_part,
        _low_precision,
        _mixed_dtypes,
        _ruled_out_tokens,
        _two_groups,
        _opting_out,
        _dtensors,
        _bad_dtensors,
        _bad_bounds,
        _disagreements,
        _bytes_on_the_wire,
        _under_a_compiler,
        _as_documented,
    ):
        check()


def _shard() -> fg.VocabShard:
    return fg.VocabShard(None, *UNEVEN[dist.get_world_size()][dist.get_rank()])


def _batch(dtype: torch.dtype = torch.float64, **changes: Any) -> Batch:
    return make_batch(3, shape=SHAPE, vocab=(V, V, V), hidden=(32, 24, 16), dtype=dtype, **changes)


def _log_probs_and_topk() -> None:
    batch, shard = _batch(), _shard()
    own = _local(batch.student, shard)
    got = fg.token_logprobs(own, batch.token_ids, mask=batch.mask, return_entropy=True)
    want = fg.token_logprobs(batch.student, batch.token_ids, mask=batch.mask, return_entropy=True)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-12)
    upstream = (torch.linspace(-1, 1, got[0].numel(), dtype=torch.float64).reshape(SHAPE), torch.ones(SHAPE))
    leaves = [own.hidden, own.weight], [batch.student.hidden, batch.student.weight]
    grads, wanted = (torch.autograd.grad(x, y, upstream) for x, y in zip((got, want), leaves, strict=True))
    assert_close(grads[0], wanted[0], 1e-12)
    assert_close(grads[1][: shard.count], wanted[1][shard.start : shard.stop], 1e-12)
    several = torch.randint(-1, V, (*SHAPE, 5), generator=torch.Generator().manual_seed(6))
    got, want = (fg.selected_logprobs(head, several, mask=batch.mask) for head in (own, batch.student))
    assert_close(got, want, 1e-12)
    upstream = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).reshape(got.shape)
    grads, wanted = (torch.autograd.grad(x, y, upstream) for x, y in zip((got, want), leaves, strict=True))
    assert_close(grads[0], wanted[0], 1e-12)
    assert_close(grads[1][: shard.count], wanted[1][shard.start : shard.stop], 1e-12)
    (ids, logprobs), (want_ids, want_logprobs) = (
        fg.token_topk(head, 300, mask=batch.mask, vocab_size=901) for head in (own, batch.student)
    )  # more than a rank with one row has
    assert torch.equal(ids, want_ids)
    assert_close(logprobs, want_logprobs, 1e-12)


def _cross_entropy() -> None:
    batch, shard = _batch(), _shard()
    own = _local(batch.student, shard)
    labels = batch.token_ids.masked_fill(~batch.mask, -100)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"label_smoothing": 0.1, "reduction": "none"}):
        got, want = (fg.linear_nll(head, labels, chunk_size=16, **options) for head in (own, batch.student))
        assert_close(got, want, 1e-12)
        leaves = [own.hidden, own.weight], [batch.student.hidden, batch.student.weight]
        grads, wanted = (torch.autograd.grad(x.sum(), y) for x, y in zip((got, want), leaves, strict=True))
        assert_close(grads[0], wanted[0], 1e-12)
        assert_close(grads[1][: shard.count], wanted[1][shard.start : shard.stop], 1e-12)
    with pytest.raises(ValueError, match=r"the same function, got .*z_loss=0.0 on rank 0 and .*z_loss=1.0 on rank 1"):
        fg.linear_nll(own, labels, z_loss=float(dist.get_rank()))


def _compare(batch: Batch, sharded: Batch, shard: fg.VocabShard, tolerance: float, **options: Any) -> None:
    got, want = _values(sharded, options), _values(batch, options)
    _everywhere(got)
    for what, x in got.items():
        x = x[: shard.count] if what in ("gradient of weight", "gradient of bias") else x
        assert_close(x, _own_part(what, want[what], shard), tolerance, what)


def _lists_from_a_server() -> None:
    batch, shard = _batch(), _shard()
    ids, logprobs = fg.token_topk(batch.teacher, 7)
    sampled = fg.token_logprobs(batch.teacher, batch.token_ids)
    teacher = fg.TopKLogProbs(ids, logprobs)
    for ref in (batch.ref, _local(batch.ref, shard)):
        batch, whole = batch.replaced(teacher=teacher, ref=ref), batch.replaced(teacher=teacher)
        sharded = batch.replaced(student=_local(batch.student, shard))
        _compare(whole, sharded, shard, 1e-12, estimator="topk", reward_scale=1.25)
    teacher = fg.TopKLogProbs(ids, logprobs, sampled)
    _compare(whole.replaced(teacher=teacher), sharded.replaced(teacher=teacher), shard, 1e-12, estimator="topk",
             tail="sampled", reward_scale=1.25)  # fmt: skip


def _far_targets() -> None:
    """A mask of the reference alone that rounding would show in is refused on all ranks; a smaller one is right."""
    rank, n = dist.get_rank(), dist.get_world_size()
    start = 16 // n * rank
    shard = fg.VocabShard(dist.group.WORLD, start, start + 16 // n)
    z, q, r = (torch.randn(1, 16, generator=generator(i)) * 4 for i in range(3))
    for fill in (-1e4, -1e9, torch.finfo(torch.float32).min):
        r[:, 5:9] = fill
        whole = [fg.Logits(x) for x in (z, q, r)]
        parts = [model.part(shard) for model in whole]
        for divergence in ("forward_kl", "jsd", "skew_kl", "alpha", "mixed"):
            options: dict[str, Any] = {"reward_scale": 1.25, "estimator": "full", "divergence": divergence}
            if fill < -1e4:
                with pytest.raises(ValueError, match=r"over a shared vocabulary needs a target .* a larger mask"):
                    fg.gopd_loss(*parts, **options)
            else:
                want = fg.gopd_loss(*whole, **options).loss
                torch.testing.assert_close(fg.gopd_loss(*parts, **options).loss, want, rtol=2e-3, atol=0)


def _several_teachers() -> None:
    batch, shard = _batch(), _shard()
    teachers = [batch.teacher, make_batch(4, shape=SHAPE, vocab=(V, V, V), dtype=torch.float64).teacher]
    index = torch.arange(SHAPE[0]) % 2
    whole, sharded = (
        batch.replaced(teacher=teachers),
        _sharded(batch, {"student": "alike", "ref": "alike"}, {"alike": shard}),
    )
    sharded = sharded.replaced(teacher=[_local(t, shard) for t in teachers])
    seen = []

    def own_advantage(stats: fg.TokenStats) -> torch.Tensor:
        seen.append(stats.index)
        return stats.advantages.tanh()

    def own_scale(stats: fg.TokenStats) -> torch.Tensor:
        seen.append(stats.index)
        scale = 1 + (stats.teacher_entropy - stats.ref_entropy + 0.1 * stats.student_logprobs).tanh()
        return scale if stats.kl_teacher is None else scale * (stats.kl_ref - stats.kl_teacher).sigmoid()

    topk = {"estimator": "topk", "k": 9}
    for more in ({}, {"baseline": "expected"}, {"estimator": "full", "divergence": "jsd"}, topk):
        _compare(whole, sharded, shard, 1e-11, teacher_index=index, reward_scale_fn=own_scale, **more)
    for options in ({"estimator": "full"}, {"advantage_fn": own_advantage}):
        _compare(whole, sharded, shard, 1e-12, teacher_index=index, reward_scale=1.25, **options)
    assert seen
    alone = (x.replaced(teacher=None, ref=None) for x in (whole, sharded))
    _compare(*alone, shard, 1e-12, advantage_fn=lambda stats: stats.student_logprobs.tanh())


def _equal_models() -> None:
    for dtype in (torch.float32, torch.float64):
        batch, shard = _batch(dtype), _shard()
        student = _local(batch.student, shard)
        frozen = dataclasses.replace(student, **{k: x.detach() for k, x in student.tensors.items()})
        same = batch.replaced(student=student, teacher=frozen, ref=frozen)
        for options in ({}, {"estimator": "full"}, {"estimator": "full", "divergence": "forward_kl"},
                        {"estimator": "topk", "k": 5}):  # fmt: skip
            values = _values(same, {"reward_scale": 1.25, **options})
            assert values["loss"] == 0, options
            for what, x in values.items():
                assert not what.startswith("gradient") or not x.any(), (options, what)


def _a_diverged_part() -> None:
    """NaN in one rank's rows is seen on all ranks, in that token and in no other."""
    batch, shard = _batch(torch.float32), _shard()
    batch = batch.replaced(
        student=fg.Logits(torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(1))), mask=None
    )
    for model, where in (("student", (0, 3, 5)), ("teacher", (1, 2, 800))):
        whole = _batch(torch.float32, kinds=("logits", "logits", "linear")).replaced(mask=None)
        with torch.no_grad():
            getattr(whole, model).logits[where] = math.nan
        sharded = _sharded(whole, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
        for divergence in ("reverse_kl", "forward_kl", "jsd"):
            values = _values(sharded, {"estimator": "full", "divergence": divergence, "reward_scale": 1.25})
            bad = torch.zeros(SHAPE, dtype=torch.bool)
            bad[where[:2]] = True
            assert torch.equal(values["token_loss"].isnan(), bad)
            gradient = values["gradient of logits"]
            assert gradient[bad].isnan().all()
            assert gradient[~bad].isfinite().all()


def _low_precision() -> None:
    """A low-precision weight: the hidden states' gradient is summed before it is rounded."""
    shard = _shard()
    for dtype in (torch.bfloat16, torch.float16):
        for options in ({}, {"estimator": "full"}, {"estimator": "full", "divergence": "jsd"},
                        {"estimator": "topk", "k": 9}):  # fmt: skip
            batch = _batch(dtype)
            wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
            options = {"reward_scale": 1.25, **options}
            exact = _values(wide, options)["gradient of hidden"]
            alone = _values(batch, options)["gradient of hidden"]
            sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
            got = _values(sharded, options)
            _everywhere(got)
            error, single = (relative_error(x, exact) for x in (got["gradient of hidden"], alone))
            assert error <= 1.5 * single, (dtype, options, error, single)


def _mixed_dtypes() -> None:
    """A frozen model wider than the student, where one rank has no columns."""
    n, rank = dist.get_world_size(), dist.get_rank()
    shard = fg.VocabShard(None, *((0, V) if rank == n - 1 else (0, 0)))
    batch = _batch(torch.float32)
    batch = batch.replaced(teacher=widened(batch.teacher))
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    for divergence in ("reverse_kl", "jsd"):
        _compare(batch, sharded, shard, 1e-5, estimator="full", divergence=divergence, reward_scale=1.25)


def _ruled_out_tokens() -> None:
    """A rank that has fewer tokens than are asked for leaves them to the ranks that have more, of logit -inf too."""
    logits, shard = torch.full((3, V), -math.inf), _shard()
    logits[:, 800], logits[:, 2] = 1, 0
    ids, logprobs = fg.token_topk(fg.Logits(logits[:, shard.start : shard.stop], shard=shard), 900)
    assert torch.equal(ids[:, :2], torch.tensor([[800, 2]] * 3))
    assert all(len(row.unique()) == 900 and row.min() >= 0 for row in ids)
    assert logprobs[:, 2:].isneginf().all()


def _two_groups() -> None:
    """Student and teacher cut over different ranks, the teacher not alike everywhere."""
    n, rank = dist.get_world_size(), dist.get_rank()
    if n != 4:
        return
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    batch, bound = _batch(), 300 + rank % 2
    shard = fg.VocabShard(groups[rank // 2], *((0, 700) if rank % 2 else (700, V)))
    other = fg.VocabShard(groups[2 + rank % 2], *((0, bound) if rank // 2 else (bound, V)))
    sharded = _sharded(batch, {"student": "alike", "teacher": "other"}, {"alike": shard, "other": other})
    got, want = _values(sharded, {"reward_scale": 1.25}), _values(batch, {"reward_scale": 1.25})
    for what, x in got.items():
        x = x[: shard.count] if what in OWN else x
        assert_close(x, _own_part(what, want[what], shard), 1e-12, what)
    with pytest.raises(ValueError, match="teacher must have the shard of student, or no shard at all, for"):
        _values(sharded, {"estimator": "full", "reward_scale": 1.25})


def _opting_out() -> None:
    """Without the reduction every rank has its own part; a reduce-scatter over the tokens then makes what is wanted."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

    batch, n = _batch(), dist.get_world_size()
    shard = fg.VocabShard(None, *UNEVEN[n][dist.get_rank()], reduce_hidden=False)
    models = {m: _local(getattr(batch, m), shard) for m in ("student", "teacher", "ref")}
    options = {"estimator": "full", "reward_scale": 1.25}
    part = _values(batch.replaced(**models), options)["gradient of hidden"]
    dist.all_reduce(part)
    want = _values(batch, options)["gradient of hidden"]
    assert_close(part, want, 1e-12)
    # sequence parallelism: each rank has the hidden states of some tokens, and gets their gradient
    mesh = init_device_mesh("cpu", (n,))
    rows = batch.student.hidden.detach().flatten(0, 1)
    mine = rows.chunk(n)[dist.get_rank()].clone().requires_grad_()
    gathered = DTensor.from_local(mine, mesh, [Shard(0)]).redistribute(placements=[Replicate()])
    hidden = gathered.to_local(grad_placements=[Partial()]).reshape(batch.student.hidden.shape)
    student = dataclasses.replace(models["student"], hidden=hidden)
    fg.gopd_loss(student, models["teacher"], models["ref"], batch.token_ids, mask=batch.mask, **options).loss.backward()
    assert_close(mine.grad, want.flatten(0, 1).chunk(n)[dist.get_rank()], 1e-12)


def _dtensors() -> None:
    """A DTensor weight brings its shard, and its gradient is a DTensor of the same placement."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    batch, n = _batch(transforms=({"bias": True}, {}, {})), dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    options = {"estimator": "full", "reward_scale": 1.25}
    want = _values(batch, options)
    for placement in (Shard(0), Replicate()):
        weight, bias = (
            torch.nn.Parameter(distribute_tensor(x.detach(), mesh, [placement]))
            for x in (batch.student.weight, batch.student.bias)
        )
        hidden = distribute_tensor(batch.student.hidden.detach(), mesh, [Replicate()]).requires_grad_()
        student = fg.LinearHead(hidden, weight, bias)
        assert student.vocab_size == V
        assert (student.shard is None) == (placement == Replicate())
        loss = fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask, **options).loss
        loss.backward()
        assert_close(loss, want["loss"], 1e-12)
        for name, leaf in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == leaf.placements
            assert_close(leaf.grad.full_tensor(), want[f"gradient of {name}"], 1e-12)
    # the tensor-parallel dimension of a larger mesh; all ranks of the other one do the same here
    if n == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        weight = torch.nn.Parameter(distribute_tensor(batch.student.weight.detach(), mesh, [Replicate(), Shard(0)]))
        student = fg.LinearHead(batch.student.hidden.detach(), weight)
        assert dist.get_process_group_ranks(student.shard.group) == dist.get_process_group_ranks(mesh.get_group("tp"))


def _bad_dtensors() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    batch, n = _batch(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    hidden, weight = (x.detach() for x in (batch.student.hidden, batch.student.weight))
    cut, whole = distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [Replicate()])
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"placement Shard\(0\).*got \(Shard\(dim=1\),\).*full_tensor"):
        fg.LinearHead(hidden, columns)
    with pytest.raises(ValueError, match="shard must be None for a DTensor weight"):
        fg.LinearHead(hidden, cut, shard=_shard())
    tokens = distribute_tensor(hidden, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"hidden is a DTensor of placement \(Shard\(dim=0\),\).*redistribute"):
        fg.LinearHead(tokens, cut)
    bias = torch.zeros(V, dtype=torch.float64)
    with pytest.raises(ValueError, match="bias must be a DTensor placed as weight is"):
        fg.LinearHead(hidden, cut, bias)
    with pytest.raises(TypeError, match="bias is a DTensor and weight is not"):
        fg.LinearHead(hidden, weight, distribute_tensor(bias, mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"logits is a DTensor: pass logits.to_local\(\)"):
        fg.Logits(whole)


def _bad_bounds() -> None:
    rank = dist.get_rank()
    for start, stop, message in (
        (rank * 10, rank * 10 + 9, r"leave out rows from 9"),
        (rank * 10, rank * 10 + 11, r"overlap at 10"),
        (0, 0, r"at least one row"),
        (5, 4, r"0 <= start <= stop"),
    ):
        with pytest.raises(ValueError, match=message):
            fg.VocabShard(None, start, stop)
    with pytest.raises(ValueError, match=r"bounds must have one pair for each of the \d ranks, this rank's \(0, 5\)"):
        fg.VocabShard(None, 0, 5, bounds=((0, 5),))
    batch, shard = _batch(), _shard()
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    other = _local(batch.teacher, fg.VocabShard(None, *OTHER[dist.get_world_size()][rank]))
    for options in ({"estimator": "full"}, {"estimator": "topk", "k": 3}, {"baseline": "expected"}):
        options = {"reward_scale": 1.25, **options}
        with pytest.raises(ValueError, match=r"teacher must have the shard of student, or no shard at all, for"):
            _values(sharded.replaced(teacher=other), options)
        with pytest.raises(ValueError, match=r"teacher has a shard and student has none"):
            _values(sharded.replaced(student=batch.student), options)
    rows = torch.arange(batch.teacher.own_size)
    for part in (sharded.teacher, fg.Logits(torch.zeros(1, shard.count), shard=shard)):
        with pytest.raises(ValueError, match="vocab_map needs the whole head, and this one has a shard"):
            dataclasses.replace(part, vocab_map=rows)
    with pytest.raises(ValueError, match="the dense reference takes whole heads"):
        fg.reference.gopd_loss(*sharded.models, sharded.token_ids, reward_scale=1.25)
    rows = max(b - a for a, b in shard.bounds)
    if shard.count == rows:
        with pytest.raises(ValueError, match=rf"weight must hold the {rows} rows"):
            fg.LinearHead(batch.student.hidden, batch.student.weight[:3], shard=shard)


def test_every_field_of_a_model_says_how_ranks_agree_in_it():
    kinds = (fg.LinearHead, fg.Logits, fg.TokenLogProbs, fg.TopKLogProbs)
    assert set(agreement.FIELDS) == {f.name for kind in kinds for f in dataclasses.fields(kind)}


FULL = {"estimator": "full", "reward_scale": 1.25}
TOPK = {"estimator": "topk", "reward_scale": 1.25, "k": 5}
# What all ranks pass, what the last one passes instead, and what the message shows of both; the first is the argument.
LAM = torch.full(SHAPE, 1.25)
OTHER_LAM = LAM.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.5))
OLD, LABELS = -torch.ones(SHAPE), torch.full(SHAPE, 3)
MEAN = {"reduction": "seq-mean-token-mean"}
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "estimator": ({"reward_scale": 1.25}, FULL, "sampled on rank 0 and .*full on rank"),
    "divergence": (FULL, {"divergence": "jsd"}, "reverse_kl on rank 0 and .*jsd on rank"),
    "beta": ({**FULL, "divergence": "jsd"}, {"beta": 0.25}, "0.5 on rank 0 and .*0.25 on rank"),
    "reward_scale": ({**FULL, "reward_scale": LAM}, {"reward_scale": OTHER_LAM}, "1.25 on rank 0 and .*1.5 on rank"),
    "k": (TOPK, {"k": 6}, "5.0 on rank 0 and .*6.0 on rank"),
    "support": (TOPK, {"support": "student"}, "teacher on rank 0"),
    "tail": (TOPK, {"tail": "drop"}, "bucket on rank 0"),
    "support_ids": (
        {**TOPK, "k": None, "support_ids": LABELS[..., None]},
        {"support_ids": LABELS[..., None] + 1},
        "3 on rank 0 and .*4 on rank",
    ),
    "reduction": (FULL, {"reduction": "sum"}, "token-mean on rank 0 and .*sum on rank"),
    "normalizer": (FULL, {"normalizer": 7}, "None on rank 0 and .*7.0 on rank"),
    "sequence_lengths": (
        {**FULL, **MEAN, "sequence_lengths": torch.full((SHAPE[0],), 40)},
        {"sequence_lengths": torch.tensor([40, 41, 40, 40])},
        "40 on rank 0 and .*41 on rank",
    ),
    "rollout_is_cap": ({"rollout_logprobs": OLD}, {"rollout_is_cap": 2.0}, "None on rank 0 and .*2.0 on rank"),
    "rollout_is": ({"rollout_logprobs": OLD}, {"rollout_is": "sequence"}, "token on rank 0 and .*sequence on rank"),
    "rollout_mask": (
        {"rollout_logprobs": OLD},
        {"rollout_mask": {"token_ratio": (0.5, 2.0)}},
        "None on rank 0 and .*token_ratio.*0.5.*2.0.* on rank",
    ),
    "trust_region": (
        {"rollout_logprobs": OLD},
        {"trust_region": {"token_difference": (-0.2, None)}},
        "None on rank 0 and .*token_difference.*-0.2.* on rank",
    ),
    "advantage_policy": ({"old_logprobs": OLD}, {"advantage_policy": "current"}, "old on rank 0 and .*current on rank"),
    "log_ratio_max": ({"old_logprobs": OLD}, {"log_ratio_max": 20}, "None on rank 0 and .*20.0 on rank"),
    "loss_max": (FULL, {"loss_max": 10}, "None on rank 0 and .*10.0 on rank"),
    "old_logprobs": ({"old_logprobs": OLD}, {"old_logprobs": 2 * OLD}, "-1.0 on rank 0 and .*-2.0 on rank"),
    "rollout_logprobs": ({}, {"rollout_logprobs": OLD}, "None on rank 0 and .*a tensor of floats on rank"),
    "clip": ({"old_logprobs": OLD}, {"clip": (0.2, 0.3)}, r"None on rank 0 and .*\(0.2, 0.3\) on rank"),
    "clip_dual": ({"old_logprobs": OLD}, {"clip_dual": 3}, "3.0 on rank"),
    "ratio": ({"old_logprobs": OLD}, {"ratio": "sequence"}, "sequence on rank"),
    "advantage_clip": ({}, {"advantage_clip": 1}, "1.0 on rank"),
    "logprob_min": ({}, {"logprob_min": -9.0}, "-9.0 on rank"),
    "student_logprob_min": (TOPK | {"tail": "drop"}, {"student_logprob_min": -9.0}, "-9.0 on rank"),
    "baseline": ({}, {"baseline": "expected"}, "expected on rank"),
    "advantage_fn": ({}, {"advantage_fn": lambda stats: stats.advantages}, "None on rank 0 and .*given on rank"),
    "reward_scale_fn": ({}, {"reward_scale_fn": lambda s: s.student_entropy}, "None on rank 0 and .*given on rank"),
    "alpha": (FULL | {"divergence": "alpha"}, {"alpha": 0.25}, "None on rank 0 and .*0.25 on rank"),
    "skew": (FULL | {"divergence": "skew_kl"}, {"skew": 0.25}, "None on rank 0 and .*0.25 on rank"),
    "forward_weight": (FULL | {"divergence": "mixed"}, {"forward_weight": 0.25}, "None on rank 0 and .*0.25 on rank"),
    "token_weight": ({"token_weight": LAM}, {"token_weight": OTHER_LAM}, "1.25 on rank 0 and .*1.5 on rank"),
    "sft_labels": ({"sft_labels": LABELS}, {"sft_labels": LABELS + 1}, "3 on rank 0 and .*4 on rank"),
    "sft_weight": ({"sft_labels": LABELS}, {"sft_weight": 0.5}, "1.0 on rank 0 and .*0.5 on rank"),
    "sft_temperature": ({"sft_labels": LABELS}, {"sft_temperature": 2.0}, "None on rank 0 and .*2.0 on rank"),
    "entropy_weight": (FULL, {"entropy_weight": 0.5}, "0.0 on rank 0 and .*0.5 on rank"),
    "kl_ref": (FULL, {"kl_ref": "exact"}, "none on rank 0 and .*exact on rank"),
    "kl_ref_weight": ({**FULL, "kl_ref": "exact"}, {"kl_ref_weight": 0.5}, "1.0 on rank 0 and .*0.5 on rank"),
    "score_cancelled": ({}, {"score_cancelled": True}, "False on rank 0 and .*True on rank"),
    "vocab_size": (FULL, {"vocab_size": V - 1}, "None on rank 0 and .*1002.0 on rank"),
    "chunk_size": (FULL, {"chunk_size": 24}, "None on rank 0 and .*24.0 on rank"),
    "chunk_dtype": (FULL, {"chunk_dtype": torch.float64}, "None on rank 0 and .*torch.float64 on rank"),
    "grad_filter": (FULL, {"grad_filter": 1e-3}, "0.0 on rank 0 and .*0.001 on rank"),
}


def _disagreements() -> None:
    """All ranks raise the same message, which names the argument and both values, where one calls otherwise."""
    batch, shard, last = _batch(), _shard(), dist.get_rank() == dist.get_world_size() - 1
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    unshared = {"store_exponentials"}  # refused by any rank that shares a vocabulary: there is nothing to agree in
    covered = {*DIFFERENT, *unshared, "student", "teacher", "ref", "token_ids", "mask", "teacher_index", "cu_seqlens"}
    assert covered == {x for x, how in agreement.ARGUMENTS.items() if how is not agreement.Agree.OWN}

    def refused(name: str, shown: str, mine: Batch, options: dict[str, Any]) -> None:
        expected = rf"must call the loss with the same {name}( \(entry \d+ of \d+\))?, got .*{shown}"
        with pytest.raises(ValueError, match=expected) as error:
            _values(mine, options)
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, str(error.value))
        assert len(set(messages)) == 1

    for name, (options, change, shown) in DIFFERENT.items():
        refused(name, shown, sharded, {**options, **change} if last else options)

    def changed(model: str, **fields: Any) -> Batch:
        return sharded.replaced(**{model: dataclasses.replace(getattr(sharded, model), **fields)}) if last else sharded

    for model in ("student", "teacher", "ref"):
        head = getattr(sharded, model)
        H = head.hidden.shape[1 + 1]
        refused(f"{model}.temperature", "1.0 on rank 0 and .*0.7 on rank", changed(model, temperature=0.7), FULL)
        refused(f"{model}.softcap", "None on rank 0 and .*30.0 on rank", changed(model, softcap=30), FULL)
        refused(f"{model}.logit_scale", "1.0 on rank 0 and .*2.0 on rank", changed(model, logit_scale=2), FULL)
        bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype)
        refused(f"{model}.bias", "None on rank 0 and .*torch.float64 on rank", changed(model, bias=bias), FULL)
        narrow = changed(model, hidden=head.hidden[..., :-1], weight=head.weight[:, :-1])
        refused(rf"{model}.hidden", rf"\[{H}\]\) on rank 0 and .*\[{H - 1}\]\) on rank", narrow, FULL)
        cut = dataclasses.replace(shard, reduce_hidden=not last)
        mine = sharded.replaced(**{model: dataclasses.replace(head, shard=cut)})
        refused(f"{model}.shard", "reduce_hidden=True on rank 0 and .*=False", mine, FULL)
        # tokens of their own, with nothing else to tell them apart: what the weight of an FSDP2 model would do
        foreign = getattr(make_batch(30, shape=SHAPE, vocab=(V, V, V), hidden=(32, 24, 16)), model).hidden.detach()
        foreign.requires_grad_(head.hidden.requires_grad)
        refused(model, "on rank 0", changed(model, hidden=foreign).replaced(mask=None), FULL)
        # but rounding in another order below is no disagreement
        g = torch.Generator().manual_seed(int(last))
        noise = 1e-3 * torch.randn(foreign.shape, dtype=foreign.dtype, generator=g)
        near = torch.nan_to_num(head.hidden.detach()) * (1 + noise)
        mine = {model: dataclasses.replace(head, hidden=near.requires_grad_(head.hidden.requires_grad))}
        _values(sharded.replaced(**mine), FULL)

    def made(kind: Any, *weights: Any) -> Batch:
        return sharded.replaced(teacher=kind([sharded.teacher, sharded.ref], weights))

    sums = [made(fg.LogLinear, 1.0, w) for w in (2.0, 3.0, LAM, OTHER_LAM)]
    refused("teacher", r"weights \(1.0, 2.0\) on rank 0 and .*weights \(1.0, 3.0\) on rank", sums[last], FULL)
    refused("teacher.weights", "1.25 on rank 0 and .*1.5 on rank", sums[2 + last], FULL)
    mixture = made(fg.Mixture, 1.0, 2.0)
    refused("teacher", r"LogLinear of \(LinearHead, LinearHead\) with .* on rank 0 and .*Mixture of",
            mixture if last else sums[0], FULL)  # fmt: skip
    other_ids, fewer = batch.token_ids.clone(), batch.mask.clone()
    other_ids[0, 0] = (other_ids[0, 0] + 1) % V
    fewer.view(-1)[0] = False
    refused("token_ids", r"\d+ on rank 0", sharded.replaced(token_ids=other_ids) if last else sharded, FULL)
    refused("mask", "True on rank 0 and .*False on rank", sharded.replaced(mask=fewer) if last else sharded, FULL)
    every = torch.ones_like(batch.mask)
    whole = sharded.replaced(student=dataclasses.replace(sharded.student, hidden=torch.nan_to_num(
        batch.student.hidden.detach()).requires_grad_()))  # fmt: skip
    _values(whole.replaced(mask=every if last else None), FULL)  # the same tokens
    short = sharded.replaced(token_ids=batch.token_ids[:2], mask=batch.mask[:2], **{
        m: dataclasses.replace(getattr(sharded, m), hidden=getattr(sharded, m).hidden[:2])
        for m in ("student", "teacher", "ref")
    })  # fmt: skip
    refused("token shape", r"\(4, 32\) on rank 0 and .*\(2, 32\) on rank", short if last else sharded, FULL)
    refused("requires_grad", "True", changed("student", weight=sharded.student.weight.detach()), FULL)
    # the tokens are the same, in the same order: only where the first teacher's end differs
    several = sharded.replaced(teacher=[sharded.teacher] * 2)
    index = {"teacher_index": torch.full((SHAPE[0],), int(last))}
    refused("teacher_index", "0 on rank 0 and .*1 on rank", several, {**FULL, **index})
    refused("teacher", r"LinearHead on rank 0 and .*\(LinearHead, LinearHead\)", several if last else sharded,
            {**FULL, **index} if last else FULL)  # fmt: skip

    # scores from elsewhere
    def scored(teacher: Any) -> Batch:
        return sharded.replaced(teacher=teacher)

    logprobs = OLD.double() - torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = logprobs.roll(1, 1)
    refused("teacher", "on rank 0", scored(fg.TokenLogProbs(other if last else logprobs)), {})
    _values(scored(fg.TokenLogProbs(logprobs * (1 + 1e-3 * int(last)))), {})
    ids, listed = fg.token_topk(batch.teacher, 7)
    listed_by = fg.TopKLogProbs(ids.flip(-1) if last else ids, listed)
    refused("teacher.token_ids", r"\d+ on rank 0", scored(listed_by), {"estimator": "topk", "reward_scale": 1.0})
    with_sampled = fg.TopKLogProbs(ids, listed, other if last else logprobs)
    options = {"estimator": "topk", "tail": "sampled", "reward_scale": 1.0}
    refused("teacher", "on rank 0", scored(with_sampled), options)

    packed = _packed(sharded)
    bounds = [torch.tensor(x) for x in ([0, 40, 128], [0, 41, 128])]
    refused("cu_seqlens", "40 on rank 0 and .*41 on rank", packed, {**FULL, **MEAN, "cu_seqlens": bounds[last]})
    for score in (
        lambda head: fg.token_logprobs(head, batch.token_ids, mask=batch.mask),
        lambda head: fg.token_topk(head, 5, mask=batch.mask),
    ):
        with pytest.raises(ValueError, match=r"the same student.temperature, got 1.0 on rank 0 and .*0.7 on rank"):
            score(changed("student", temperature=0.7).student)
    with pytest.raises(ValueError, match=r"the same k, got 5.0 on rank 0 and .*6.0 on rank"):
        fg.token_topk(sharded.student, 5 + int(last), mask=batch.mask)

    # on a GPU one assert each for what is compared exactly on the host, exactly on the device, and by fingerprints
    may_wait, agreement._may_wait = agreement._may_wait, lambda device: False
    try:
        _values(sharded, FULL)
        for what, mine, options in (
            ("options and models", changed("ref", temperature=0.7), FULL),
            ("options and models", sharded, {**FULL, "reduction": "sum" if last else "token-mean"}),
            ("tensors, one of mask, cu_seqlens", sharded.replaced(mask=fewer) if last else sharded, FULL),
            ("tokens, in one of student, teacher", scored(fg.TokenLogProbs(other if last else logprobs)), {}),
        ):
            with pytest.raises(ValueError, match=f"must call the loss with the same {what}.*got True"):
                _values(mine, options)
    finally:
        agreement._may_wait = may_wait


def _packed(batch: Batch) -> Batch:
    models = {
        name: dataclasses.replace(getattr(batch, name), hidden=getattr(batch, name).hidden.flatten(0, 1))
        for name in ("student", "teacher", "ref")
    }
    return batch.replaced(**models, token_ids=batch.token_ids.flatten(), mask=batch.mask.flatten())


def _bytes_on_the_wire() -> None:
    """Counted where the collectives are called, and what of it any exchange of statistics needs at the least."""
    n, counted = dist.get_world_size(), []
    gather, reduce = fg.VocabShard.gather, fg.VocabShard.sum_

    def counting_gather(shard: fg.VocabShard, mine: torch.Tensor) -> torch.Tensor:
        counted.append(("gather", mine.numel() * mine.element_size()))
        return gather(shard, mine)

    def counting_sum(shard: fg.VocabShard, x: torch.Tensor) -> Any:
        counted.append(("sum", x.numel() * x.element_size()))
        return reduce(shard, x)

    batch, shard = _batch(torch.float32), _shard()
    N, H, chunks = int(batch.mask.sum()), 32, math.ceil(int(batch.mask.sum()) / 16)
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    fg.VocabShard.gather, fg.VocabShard.sum_ = counting_gather, counting_sum
    try:
        # numbers per token: maximum, log-sum and token logit of each model, the student's mean, and of the target
        # the mean gap, its log-sum and what that is relative to (with one frozen model that is the model's)
        for options, rounds, numbers in (
            ({}, 3, 3 * 4),  # each model alone: with a mean
            ({"reward_scale": 1.0}, 2, 2 * 4),
            ({"estimator": "full"}, 1, 3 * 3 + 4),
            ({"estimator": "full", "divergence": "forward_kl"}, 1, 3 * 3 + 5),
            ({"estimator": "full", "divergence": "jsd"}, 2, 3 * 3 + 4 + 2),
            ({"estimator": "full", "reward_scale": 1.0}, 1, 2 * 3 + 2),
            # k values and ids to choose from, then a model's 4 numbers and k values each
            ({"estimator": "topk", "k": 5}, 4, 2 * 5 + 3 * (4 + 5)),
        ):
            counted.clear()
            _values(sharded, {"reward_scale": 1.25, "chunk_size": 16, **options})
            kinds = [kind for kind, _ in counted]
            compared, *gathers = [size for kind, size in counted if kind == "gather"]
            # 8 bytes for each argument, for each field of the three models and for each tensor, 40 for a rounded one
            fields, tensors = 3 * len(agreement.FIELDS), len(agreement.EXACT) + 5 * len(agreement.ROUNDED)
            assert compared <= 8 * (len(agreement.ARGUMENTS) + fields + tensors) + 64
            assert len(gathers) == rounds * chunks, options
            assert sum(gathers) == 4 * numbers * N, options
            assert kinds.count("sum") == chunks
            assert sum(size for kind, size in counted if kind == "sum") == 4 * N * H
            # what fused-gopd plan says of it
            scale = {"reward_scale": 1.25, **options}["reward_scale"]
            call = PlannedCall(
                tokens=N,
                vocab=V,
                hidden=H,
                teacher_hidden=24,
                ref_hidden=16,
                dtype="float32",
                estimator=options.get("estimator", "sampled"),
                divergence=options.get("divergence", "reverse_kl"),
                reward_scale=scale,
                device="cpu",
                k=options.get("k"),
                tp=n,
            )
            wire = {c.what: c.size for c in collectives(call)}
            assert wire.pop("gradient of hidden") == 4 * N * H
            assert sum(wire.values()) == n * sum(gathers)
    finally:
        fg.VocabShard.gather, fg.VocabShard.sum_ = gather, reduce
    assert n == len(shard.bounds)


def _under_a_compiler() -> None:
    """The same bits with the heads made inside the graph."""
    batch, shard = _batch(torch.float32), _shard()
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    leaves = sharded.student.hidden, sharded.student.weight
    for options in ({"estimator": "full"}, {}, {"estimator": "topk", "k": 5, "reduction": "none"}):

        def step(hidden: torch.Tensor, weight: torch.Tensor, options: Any = options) -> tuple[torch.Tensor, ...]:
            student = fg.LinearHead(hidden, weight, shard=shard)
            models = student, sharded.teacher, sharded.ref
            out = fg.gopd_loss(*models, batch.token_ids, mask=batch.mask, reward_scale=1.25, **options)
            return out.loss, out.token_loss

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            loss, token_loss = function(*leaves)
            results.append((loss, token_loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))))
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled), options


def _as_documented() -> None:
    """The first lines of docs/parallelism.md, as they stand there."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "parallelism.md").read_text()
    (source,) = re.findall(r"```python\n(shard = .*?)```", page, re.DOTALL)
    batch, bounds = _batch(), UNEVEN[dist.get_world_size()][dist.get_rank()]
    names: dict[str, Any] = {"fg": fg, "group": None, "start": bounds[0], "stop": bounds[1]}
    names |= {"token_ids": batch.token_ids, "mask": batch.mask}
    for name in ("student", "teacher", "ref"):
        model = getattr(batch, name)
        rows = model.weight.detach()[slice(*bounds)].requires_grad_(name == "student")
        names |= {f"{name}_hidden": model.hidden, f"{name}_rows": rows}
    exec(source, names)
    want = _values(batch, {"estimator": "full", "reward_scale": 1.25})
    assert_close(names["out"].loss, want["loss"], 1e-12)
    assert_close(batch.student.hidden.grad, want["gradient of hidden"], 1e-12)
    assert_close(names["student_rows"].grad, want["gradient of weight"][slice(*bounds)], 1e-12)


@pytest.mark.ranks
def test_a_rank_that_dies_ends_the_others():
    with pytest.raises(RankError) as error:
        run_on_ranks("test_shards:_one_dies", 2, timeout=20)
    assert "rank 0:" in str(error.value), "the rank that lived has to raise by itself"


def _one_dies() -> None:
    batch, shard = _batch(torch.float32), fg.VocabShard.even(V)
    sharded = _sharded(batch, dict.fromkeys(("student", "teacher", "ref"), "alike"), {"alike": shard})
    options = {"estimator": "full", "reward_scale": 1.25, "chunk_size": 16}
    _values(sharded, options)
    if dist.get_rank() == 1:
        gather = fg.VocabShard.gather

        def dying(self: fg.VocabShard, mine: torch.Tensor) -> torch.Tensor:
            if mine.dtype == torch.float32:  # in the middle of the loop
                os._exit(3)
            return gather(self, mine)

        fg.VocabShard.gather = dying
    _values(sharded, options)


def test_a_shard_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        fg.VocabShard(None, 0, 10)
    with pytest.raises(TypeError, match=r"shard must be a fused_gopd.VocabShard or None, got tuple"):
        fg.LinearHead(torch.zeros(2, 3), torch.zeros(4, 3), shard=(0, 4))
