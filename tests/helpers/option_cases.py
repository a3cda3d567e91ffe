"""One call for every argument of ``gopd_loss`` and every kind of model, on small models made on the CPU.

``test_fake_gpu.py`` makes each on a simulated GPU, ``test_gpu.py`` on a real one. A new argument without a case fails
the first of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg
from builders import Batch, generator, linear_head, logits_head, make_batch, widened
from fused_gopd import TokenStats
from fused_gopd.targets import Composite

SHAPE, VOCAB, HIDDEN = (4, 6), 211, 16
F32 = torch.float32

Case = dict[str, Any]  # arguments of gopd_loss that are not those of the plain call


def batch_of(
    masked: bool = False, dtype: torch.dtype = F32, vocab: int = VOCAB, shape: tuple[int, int] = SHAPE
) -> Batch:
    sizes = {"vocab": (vocab, vocab - 2, vocab), "hidden": (HIDDEN, HIDDEN + 8, HIDDEN)}
    return make_batch(5, shape=shape, dtype=dtype, masked=masked, **sizes)


def logprobs_of(head: Any) -> Tensor:
    """(..., V) of a head without a softcap and other transforms, in float64."""
    return (head.hidden.detach().double() @ head.weight.detach().double().T).log_softmax(-1)


def _every_statistic(stats: TokenStats) -> Tensor:
    """Reads all that a ``reward_scale_fn`` may read."""
    total = stats.student_entropy + stats.teacher_entropy + stats.ref_entropy
    total = total + stats.student_logprobs + stats.teacher_logprobs + stats.ref_logprobs + 0 * stats.index
    return 1 + 0.1 * total.tanh()


def _divergences(stats: TokenStats) -> Tensor:
    return _every_statistic(stats) + 0.1 * (stats.kl_teacher - stats.kl_ref).tanh()


def cases(batch: Batch) -> dict[str, Case]:
    """By name. An entry ``student``, ``teacher`` or ``ref`` takes the place of the batch's."""
    g = generator(11)
    ids, shape, dtype = batch.token_ids, batch.token_ids.shape, batch.student.hidden.dtype
    vocab = len(batch.student.weight)
    n, live = ids.numel(), torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask

    def noise(*size: int) -> Tensor:
        return torch.randn(*(size or shape), generator=g)

    now = logprobs_of(batch.student).gather(-1, ids[..., None])[..., 0].float()
    old, rollout = ((now + 0.3 * noise()).clamp(max=0) for _ in range(2))
    served = {name: fg.TokenLogProbs((now + noise()).clamp(max=0)) for name in ("teacher", "ref")}
    lam = 1.25 + 0.3 * noise()
    labels = ids.roll(1).masked_fill(torch.rand(shape, generator=g) < 0.3, -100)
    top = logprobs_of(batch.teacher).topk(5)
    sent = {
        name: fg.TopKLogProbs(top.indices, logprobs_of(m).gather(-1, top.indices).float(), sampled_logprobs=s.logprobs)
        for (name, s), m in zip(served.items(), (batch.teacher, batch.ref), strict=True)
    }
    rows = torch.randperm(vocab, generator=g).masked_fill(torch.arange(vocab) < 9, -1)
    other = linear_head(31, shape, vocab + 3, HIDDEN, dtype)
    mapped = dataclasses.replace(other, vocab_map=rows)
    sharp = {"scale": 0.8, "softcap": 20.0, "temperature": 0.7, "bias": True}
    styled = linear_head(32, shape, vocab, HIDDEN, dtype, 2.0, **{k: v for k, v in sharp.items() if k != "scale"})
    routes = {"teacher": [batch.teacher, other], "teacher_index": torch.arange(n).reshape(shape) % 2}
    parts = [batch.teacher, logits_head(33, shape, vocab, dtype)]
    log_linear, mixture = (
        fg.LogLinear(parts, [1.25, 0.1 * noise()]),
        fg.Mixture(parts, [0.5, torch.rand(shape, generator=g)]),
    )
    bounds = torch.tensor([0, 7, 7, 2 * n // 3, n], dtype=torch.int32)
    packed = {"packed": True, "cu_seqlens": bounds}
    per_sequence = {"normalizer": torch.tensor(3.0), "sequence_lengths": live.sum(1) + 2}
    full, topk = {"estimator": "full"}, {"estimator": "topk", "k": 5}
    ratio: Case = {"old_logprobs": old, "clip": (0.2, 0.3)}
    made: dict[str, Case] = {
        "sampled": {},
        "λ per token": {"reward_scale": lam},
        "clips": {
            **ratio, "clip_dual": 3.0, "rollout_logprobs": rollout, "rollout_is_cap": 1.5, "advantage_clip": 2.0,
            "logprob_min": -20.0,
        },
        "ratio of sequences": {**ratio, "ratio": "sequence"},
        "mean ratio of sequences": {**ratio, "ratio": "sequence-mean"},
        "ratio detached": {**ratio, "ratio": "detached"},
        "bounds of ratio and loss": {"old_logprobs": old, "log_ratio_max": 0.2, "loss_max": 1.0},
        "advantage of the current policy": {**ratio, "advantage_policy": "current"},
        "importance of sequences": {
            "rollout_logprobs": rollout, "rollout_is": "sequence", "rollout_is_cap": (0.5, 2.0),
        },
        "importance geometric": {**ratio, "rollout_logprobs": rollout, "rollout_is": "geometric"},
        "rollout_mask": {
            "old_logprobs": old, "rollout_logprobs": rollout, "rollout_is": "none",
            "rollout_mask": {"geometric_ratio": (0.5, 2.0), "token_ratio": (0.5, 2.0)},
        },
        "trust_region": {"rollout_logprobs": rollout, "trust_region": {"token_difference": (-0.2, 0.2)}},
        "baseline": {"baseline": "expected", "reward_scale": lam, "entropy_weight": 0.1},
        "entropy": {"entropy_weight": 0.1},
        "k1": {"kl_ref": "k1", "kl_ref_weight": 0.3},
        "k3": {"kl_ref": "k3", "kl_ref_weight": 0.3},
        "labels": {"sft_labels": labels, "sft_weight": 0.3},
        "labels at a temperature": {"sft_labels": labels, "sft_temperature": 2.0},
        "advantage_fn": {"advantage_fn": lambda s: (s.teacher_logprobs - s.student_logprobs).tanh() + s.advantages},
        "reward_scale_fn": {"reward_scale": 1.0, "reward_scale_fn": _every_statistic},
        "cancelled model scored": {"reward_scale": 1.0, "score_cancelled": True},
        "token_weight": {"token_weight": torch.rand(shape, generator=g)},
        "token losses": {"reduction": "none"},
        "sum": {"reduction": "sum"},
        "means of sequences": {"reduction": "seq-mean-token-mean", **per_sequence},
        "sums of sequences": {"reduction": "seq-mean-token-sum"},
        "packed": {**packed, "reduction": "seq-mean-token-mean"},
        "packed ratio of sequences": {**packed, **ratio, "ratio": "sequence"},
        "grad_filter": {"grad_filter": 1e-3},
        "short chunks": {"chunk_size": 5},
        "routes": {**routes, "ref": [batch.ref, served["ref"]]},
        "LogLinear": {"teacher": log_linear},
        "Mixture": {"teacher": mixture},
        "vocab_map": {"teacher": mapped, "logprob_min": -9.0},
        "logits": {"student": "logits", "ref": logits_head(34, shape, vocab, dtype)},
        "softcap, temperature, bias": {"student": styled},
        "scores of a server": dict(served),
        "smaller joint vocabulary": {"vocab_size": vocab - 5, "token_ids": ids.clamp(max=vocab - 6)},
        "full": full,
        "forward KL": {**full, "divergence": "forward_kl"},
        "JSD": {**full, "divergence": "jsd", "beta": 0.3},
        "skew": {**full, "divergence": "skew_kl", "skew": 0.2},
        "reverse skew": {**full, "divergence": "skew_reverse_kl", "skew": 0.2},
        "alpha": {**full, "divergence": "alpha", "alpha": 0.4},
        "mixed": {**full, "divergence": "mixed", "forward_weight": torch.rand(shape, generator=g)},
        "full, λ per token": {**full, "reward_scale": lam},
        "full, λ of sequences": {**full, "reward_scale": lam[:, 0]},
        "full, reward_scale_fn": {**full, "reward_scale": 1.0, "reward_scale_fn": _divergences},
        "full, terms": {
            **full, "entropy_weight": 0.1, "kl_ref": "exact", "kl_ref_weight": 0.2, "sft_labels": labels,
            "sft_temperature": 2.0,
        },
        "full, importance": {
            **full, "rollout_logprobs": rollout, "old_logprobs": old, "rollout_is_cap": 2.0, "loss_max": 3.0,
        },
        "full, token losses": {**full, "reduction": "none", "divergence": "jsd"},
        "full, routes": {**full, **routes, "ref": None, "reward_scale": 1.0},
        "full, LogLinear": {**full, "teacher": log_linear},
        "full, Mixture": {**full, "teacher": mixture},
        "full, vocab_map": {**full, "teacher": mapped},
        "full, logits": {**full, "student": "logits"},
        "topk": topk,
        "topk of the student": {**topk, "support": "student", "divergence": "jsd"},
        "topk, drop": {**topk, "tail": "drop", "logprob_min": -9.0, "student_logprob_min": -9.0},
        "topk, renormalize": {**topk, "tail": "renormalize", "reward_scale": lam},
        "topk, sampled tail": {**topk, "tail": "sampled", "entropy_weight": 0.1},
        "topk, reward_scale_fn": {**topk, "reward_scale": 1.0, "reward_scale_fn": _every_statistic},
        "topk of given tokens": {"estimator": "topk", "support_ids": top.indices.masked_fill(noise(*shape, 5) > 1, -1)},
        "topk of a server": {"estimator": "topk", **sent},
        "topk, LogLinear": {**topk, "teacher": log_linear},
        "topk, vocab_map": {**topk, "teacher": mapped},
        "topk, routes": {**topk, **routes},
    }  # fmt: skip
    return made


def moved(x: Any, put: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with each tensor by ``put``: in structures, in models, in models of models."""
    if isinstance(x, Composite):
        return type(x)([moved(m, put) for m in x.models], [moved(w, put) for w in x.weights])
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        tensors = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **{k: put(t) for k, t in tensors.items() if isinstance(t, Tensor)})
    if isinstance(x, dict):
        return {k: moved(v, put) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([moved(v, put) for v in x])
    return put(x) if isinstance(x, Tensor) else x


def wide(x: Any) -> Any:
    """The same argument with its models in float64, on fresh leaves."""
    if isinstance(x, list):
        return [wide(model) for model in x]
    return widened(x) if isinstance(x, Composite) or hasattr(x, "tensors") else x


def arguments(batch: Batch, case: Case) -> Case:
    """All arguments of the call, the student on fresh leaves."""
    found: Case = {
        "student": batch.student,
        "teacher": batch.teacher,
        "ref": batch.ref,
        "token_ids": batch.token_ids,
        "mask": batch.mask,
        "reward_scale": 1.25,
        **case,
    }
    if isinstance(found["student"], str):
        found["student"] = fg.Logits((batch.student.hidden @ batch.student.weight.T).detach())
    if found.pop("packed", False):
        found = moved(found, lambda x: x.reshape(-1, *x.shape[2:]) if x.shape[:2] == batch.token_ids.shape else x)
    leaf = lambda x: x.detach().clone().requires_grad_(x.is_floating_point())  # noqa: E731
    return found | {"student": moved(found["student"], leaf)}


def called(found: Case, function: Any = None, **options: Any) -> tuple[Any, list[Tensor]]:
    """Output and gradients of the student's tensors; token losses with upstream gradients that differ."""
    out = (function or fg.gopd_loss)(**found, **options)
    loss = out.loss
    if loss.ndim:
        loss = (loss * torch.linspace(-1, 2, loss.numel(), device=loss.device).reshape(loss.shape)).sum()
    leaves = [x for x in found["student"].tensors.values() if x.requires_grad]
    return out, list(torch.autograd.grad(loss, leaves))
