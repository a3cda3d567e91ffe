"""Vocabularies that several ranks share: the same numbers as one process gets with whole heads.

Every test that needs ranks launches torchrun once and lets its workers (functions with an underscore) check many cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fused_gopd as fg
from builders import Batch, assert_close, make_batch, relative_error, widened
from ranks import run_on_ranks

V = 1003
SHAPE = (4, 32)
EVEN = {2: ((0, 502), (502, 1003)), 4: ((0, 251), (251, 502), (502, 753), (753, 1003))}
# out of order, a rank with one row, ranks with none
UNEVEN = {2: ((700, 1003), (0, 700)), 4: ((0, 0), (1, 900), (0, 1), (900, 1003))}
OTHER = {2: ((0, 100), (100, 1003)), 4: ((900, 1003), (0, 300), (300, 900), (0, 0))}

# Options, and what differs from three linear heads that are all cut alike.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampled": ({}, {}),
    "sampled off policy": ({"clip": (0.2, 0.3), "old": True, "advantage_clip": 2.0}, {}),
    "sampled of whole sequences": ({"ratio": "sequence", "old": True}, {}),
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
    "topk jsd": ({"estimator": "topk", "k": 9, "divergence": "jsd", "tail": "renormalize"}, {"ref": "whole"}),
    "topk forward, labels, none": (
        {"estimator": "topk", "k": 9, "divergence": "forward_kl", "labels": True, "reduction": "none"},
        {"transforms": ({"bias": True}, {"bias": True}, {})},
    ),
    "topk of logits": ({"estimator": "topk", "k": 9}, {"kinds": ("logits", "linear", "linear")}),
    "nothing live": ({"estimator": "full"}, {"nothing": True}),
    "filtered": ({"estimator": "full", "grad_filter": 1e-12}, {}),
}


def _case(name: str, dtype: torch.dtype) -> tuple[Batch, dict[str, Any], dict[str, str]]:
    options, changes = (dict(x) for x in CASES[name])
    cuts = {model: changes.pop(model, "alike") for model in ("student", "teacher", "ref")}
    nothing = changes.pop("nothing", False)
    batch = make_batch(3, shape=SHAPE, vocab=(V, V, V), hidden=(32, 24, 16), dtype=dtype, **changes)
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
    if options.pop("labels", False):
        options["sft_labels"] = torch.randint(0, V, SHAPE, generator=g).where(
            torch.rand(SHAPE, generator=g) < 0.5, -100
        )
    if options.setdefault("reward_scale", 1.25) == "tensor":
        choices = torch.tensor([0.0, 1.0, 0.5, 1.25])
        options["reward_scale"] = choices[torch.randint(0, 4, SHAPE, generator=g)]
    return batch, {"chunk_size": 16, **options}, cuts


def _local(head: Any, shard: fg.VocabShard) -> Any:
    """This rank's part of a whole head, with two rows of padding where there are any."""
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


def _whole_of(values: dict[str, torch.Tensor], shard: fg.VocabShard) -> dict[str, torch.Tensor]:
    """The gradients of single-process values that a shard's rank has."""
    cut = {}
    for name, x in values.items():
        if name in ("gradient of weight", "gradient of bias"):
            x = x[shard.start : shard.stop]
        elif name == "gradient of logits":
            x = x[..., shard.start : shard.stop]
        cut[name] = x
    return cut


OWN = ("gradient of weight", "gradient of bias", "gradient of logits")  # a rank has its own part of them


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


def _check_cases(dtype: torch.dtype, backend: str, names: list[str]) -> dict[str, float]:
    """All cases in both layouts; returns the largest ratio of errors that there is for each."""
    n = dist.get_world_size()
    ratios = {}
    for name, (kind, bounds) in itertools.product(names, (("even", EVEN[n]), ("uneven", UNEVEN[n]))):
        batch, options, cuts = _case(name, dtype)
        options["backend"] = backend
        mine = [b[n][dist.get_rank()] for b in ({n: bounds}, OTHER)]
        layouts = {how: fg.VocabShard(None, *b) for how, b in zip(("alike", "other"), mine, strict=True)}
        sharded = _sharded(batch, cuts, layouts)
        got = _values(sharded, options)
        _everywhere(got)
        own = layouts["alike"]
        if cuts["student"] == "whole":
            own = fg.VocabShard.even(V)
            single = _values(batch, options)
        else:
            single = _whole_of(_values(batch, options), own)
            for key in ("weight", "bias"):
                full = got.get(f"gradient of {key}")
                if full is not None:
                    assert full.shape[0] == getattr(sharded.student, key).shape[0]
                    got[f"gradient of {key}"], padding = full[: own.count], full[own.count :]
                    assert not padding.any()
        wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
        wide_options = {k: x.double() if k in ("old_logprobs", "reward_scale") and isinstance(x, torch.Tensor) else x
                        for k, x in options.items()}  # fmt: skip
        exact = _values(wide, {**wide_options, "backend": "torch"})
        exact = exact if cuts["student"] == "whole" else _whole_of(exact, own)
        assert got.keys() == single.keys()
        for what, x in got.items():
            if dtype == torch.float64:
                assert_close(x, exact[what], 1e-12, f"{name}, {kind}: {what}")
                continue
            error, alone = (_error(y, exact[what], cut=what in OWN) for y in (x, single[what]))
            floor = torch.finfo(torch.float32).eps / 2  # of rounding the result itself
            if what == "loss":
                # one number, which may happen to be right: its error is that of the token losses
                scale = exact["token_loss"].double().norm().clamp_min(1e-6) / exact["loss"].double().norm()
                error, alone = error / scale, 2 * relative_error(single["token_loss"], exact["token_loss"])
            assert error <= max(1.5 * alone, floor), f"{name}, {kind}: {what} is off by {error:.1e}, alone {alone:.1e}"
            ratios[name] = max(ratios.get(name, 0.0), error / max(alone, floor))
    return ratios


@pytest.mark.parametrize("n", [2, 4])
def test_every_estimator_is_as_accurate_as_in_one_process(n):
    run_on_ranks("test_shards:_all_cases", n, timeout=180)


def _all_cases() -> None:
    _check_cases(torch.float64, "auto", list(CASES))
    ratios = _check_cases(torch.float32, "auto", list(CASES))
    ratios |= {f"{k}, torch": x for k, x in _check_cases(torch.float32, "torch", ["full", "full jsd", "topk"]).items()}
    if dist.get_rank() == 0:
        print(ratios)
