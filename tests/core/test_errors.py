"""Bad input: each case raises before any work and names the argument, what was expected and found."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch

import fused_gopd as fg
from builders import make_batch, why_not
from fused_gopd.integrations.logprobs import sampled_loss

F32 = torch.float32
zeros = torch.zeros


# ------------------------------------------------------------------------------------------------------------- heads

HIDDEN, WEIGHT = zeros(2, 3, 4), zeros(7, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a float tensor.*torch.int64"),
        ({"weight": WEIGHT.bool()}, TypeError, "weight must be a float tensor.*torch.bool"),
        ({"weight": WEIGHT.to(torch.complex64)}, TypeError, "weight must be a float tensor.*torch.complex64"),
        ({"hidden": zeros(())}, ValueError, r"hidden must have shape \(..., H\)"),
        ({"weight": zeros(4)}, ValueError, r"weight must have shape \(V, H\), got \(4,\)"),
        ({"weight": zeros(1, 7, 4)}, ValueError, r"weight must have shape \(V, H\), got \(1, 7, 4\)"),
        ({"weight": zeros(7, 5)}, ValueError, r"hidden.*weight.*\(2, 3, 4\).*\(7, 5\)"),
        ({"weight": zeros(0, 4)}, ValueError, "weight must have at least one row"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "hidden and weight.*torch.float32.*torch.bfloat16"),
        ({"weight": zeros(7, 4, device="meta")}, ValueError, "hidden and weight.*device.*cpu.*meta"),
        ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"bias": zeros(7).int()}, TypeError, "bias must be a float tensor.*torch.int32"),
        ({"bias": zeros(8)}, ValueError, r"bias must have shape \(7,\).*\(8,\)"),
        ({"bias": zeros(7, 1)}, ValueError, r"bias must have shape \(7,\).*\(7, 1\)"),
        ({"bias": zeros(7, device="meta")}, ValueError, "bias must be on.*cpu.*meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a Python float, got str"),
        ({"temperature": zeros(())}, TypeError, "temperature must be a Python float, got Tensor"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
        ({"softcap": True}, TypeError, "softcap must be a Python float, got bool"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive, got 0.0"),
        ({"logit_scale": None}, TypeError, "logit_scale"),
        ({"temperature": None}, TypeError, "temperature"),
        ({"logit_scale": -2.0}, ValueError, "logit_scale must be positive, got -2.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_linear_head_checks_itself(arguments, error, message):
    with pytest.raises(error, match=message):
        fg.LinearHead(**{"hidden": HIDDEN, "weight": WEIGHT, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fg.Logits([1.0]), TypeError, "logits must be a torch.Tensor, got list"),
        (lambda: fg.Logits(zeros(2, 3).int()), TypeError, "logits must be a float tensor.*torch.int32"),
        (lambda: fg.Logits(zeros(())), ValueError, r"logits must have shape \(..., V\)"),
        (lambda: fg.Logits(zeros(2, 0)), ValueError, r"logits must have shape \(..., V\).*\(2, 0\)"),
        (lambda: fg.Logits(zeros(2, 3), temperature=0), ValueError, "temperature must be positive"),
        (lambda: fg.Logits(zeros(2, 3), softcap=-1), ValueError, "softcap must be positive"),
        (lambda: fg.TokenLogProbs(zeros(2).long()), TypeError, "logprobs must be a float tensor.*torch.int64"),
        (lambda: fg.TokenLogProbs(-1.0), TypeError, "logprobs must be a torch.Tensor, got float"),
        (lambda: fg.TopKLogProbs(zeros(2, 3), zeros(2, 3)), TypeError, "token_ids must be an integer"),
        (lambda: fg.TopKLogProbs(zeros(2, 3).long(), zeros(2, 4)), ValueError, r"\(2, 3\).*\(2, 4\)"),
        (lambda: fg.TopKLogProbs(zeros(2, 3).long(), zeros(2, 3).long()), TypeError, "logprobs must be a float"),
    ],
)
def test_the_other_heads_check_themselves(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --------------------------------------------------------------------------------------------------------- gopd_loss

B, T, V = 2, 3, 7
BATCH = make_batch(0, shape=(B, T), vocab=(V, V, V), dtype=F32)
S, Q, R = BATCH.models
IDS, MASK = BATCH.token_ids, BATCH.mask
SCORES = fg.TokenLogProbs(-torch.ones(B, T))
OLD = -torch.ones(B, T)
ONE_D = make_batch(1, shape=(5,), vocab=(V, V, V), dtype=F32)


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("meta")


def swapped(value: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[0, 0] = value  # live: make_batch keeps token 0 and masks token 1
    return ids


FULL = {"estimator": "full"}
CASES = {
    # models
    "student missing": ({"student": None}, TypeError, "student must be a LinearHead or Logits, got NoneType"),
    "student a tensor": ({"student": zeros(B, T, V)}, TypeError, "student must be a LinearHead or Logits, got Tensor"),
    "student scores": ({"student": SCORES}, TypeError, "student must be a LinearHead or Logits"),
    "teacher a tensor": ({"teacher": zeros(B, T, V)}, TypeError, "teacher must be a LinearHead.*Tensor"),
    "ref a string": ({"ref": "base"}, TypeError, "ref must be a LinearHead.*str"),
    "teacher scores in full": (dict(teacher=SCORES, **FULL), TypeError, "teacher is TokenLogProbs.*'full'"),
    "ref scores in full": (dict(ref=SCORES, **FULL), TypeError, "ref is TokenLogProbs.*'full'"),
    "teacher top-k": (
        {"teacher": fg.TopKLogProbs(zeros(B, T, 2).long(), zeros(B, T, 2))},
        TypeError,
        "teacher is TopKLogProbs",
    ),
    "teacher shape": ({"teacher": fg.Logits(zeros(B, T + 1, V))}, ValueError, r"teacher must have.*\(2, 3\).*\(2, 4\)"),
    "ref shape": ({"ref": fg.Logits(zeros(B * T, V))}, ValueError, r"ref must have.*\(2, 3\).*\(6,\)"),
    "scores shape": ({"ref": fg.TokenLogProbs(zeros(B, 1))}, ValueError, r"ref must have.*\(2, 3\).*\(2, 1\)"),
    "teacher device": (
        {"teacher": fg.LinearHead(meta(Q.hidden), meta(Q.weight))},
        ValueError,
        "teacher.hidden must be on.*cpu.*meta",
    ),
    "ref device": ({"ref": fg.TokenLogProbs(meta(OLD))}, ValueError, "ref.logprobs must be on.*cpu.*meta"),
    # several teachers
    "no index": ({"teacher": [Q, Q]}, ValueError, "teacher_index must be given for 2 teachers"),
    "index without a list": (
        {"teacher_index": zeros(B, T).long()},
        ValueError,
        "teacher_index needs a list of teachers",
    ),
    "empty list": ({"teacher": []}, ValueError, "teacher must not be an empty list"),
    "a list of nothing": (
        {"teacher": [Q, None], "teacher_index": IDS},
        TypeError,
        r"teacher\[1\] must be a LinearH.*None",
    ),
    "shape in a list": (
        {"teacher": [Q, fg.Logits(zeros(B, V))], "teacher_index": IDS},
        ValueError,
        r"teacher\[1\] must have the token shape \(2, 3\)",
    ),
    "lists of two lengths": (
        {"teacher": [Q, Q], "ref": [R, R, R], "teacher_index": IDS, "reward_scale": 1.25},
        ValueError,
        "ref must be one model or a list of as many as teacher, got 3 and 2",
    ),
    "a list of references alone": (
        {"ref": [R, R], "teacher_index": IDS, "reward_scale": 1.25},
        ValueError,
        "ref must be one model or a list of as many as teacher, got 2 and one model",
    ),
    "index past the list": (
        {"teacher": [Q, Q], "teacher_index": torch.full((B, T), 2)},
        IndexError,
        r"teacher_index must be in \[0, 2\).*got 2",
    ),
    "index negative": (
        {"teacher": [Q, Q], "teacher_index": torch.full((B, T), -1)},
        IndexError,
        r"teacher_index must be in \[0, 2\).*got -1",
    ),
    "index of one": (
        {"teacher": [Q], "teacher_index": torch.ones(B, T).long()},
        IndexError,
        r"teacher_index must be in \[0, 1\).*got 1",
    ),
    "index shape": (
        {"teacher": [Q, Q], "teacher_index": IDS[0]},
        ValueError,
        r"teacher_index.*\(2,\), got shape \(3,\)",
    ),
    "index float": (
        {"teacher": [Q, Q], "teacher_index": zeros(B)},
        TypeError,
        "teacher_index must be an integer.*float32",
    ),
    "index list": (
        {"teacher": [Q, Q], "teacher_index": [0, 1]},
        TypeError,
        "teacher_index must be a torch.Tensor, got list",
    ),
    "index device": (
        {"teacher": [Q, Q], "teacher_index": meta(IDS)},
        ValueError,
        "teacher_index must be on.*cpu.*meta",
    ),
    # lambda
    "no reference": ({"ref": None, "reward_scale": 1.25}, ValueError, "ref must be given for reward_scale=1.25"),
    "no reference at 0": ({"ref": None, "reward_scale": 0.0}, ValueError, "ref must be given for reward_scale=0.0"),
    "no teacher": ({"teacher": None, "reward_scale": 0.5}, ValueError, "teacher must be given for reward_scale=0.5"),
    "no teacher at 1": ({"teacher": None}, ValueError, "teacher must be given for reward_scale=1.0"),
    "no teacher but a reference": (
        {"teacher": None, "advantage_fn": len},
        ValueError,
        "teacher must be given for reward_scale=1.0",
    ),
    "tensor lambda without reference": (
        {"ref": None, "reward_scale": torch.tensor(1.0)},
        ValueError,
        "ref must be given when reward_scale is a tensor",
    ),
    "tensor lambda without teacher": (
        {"teacher": None, "reward_scale": zeros(B, T)},
        ValueError,
        "teacher must be given when reward_scale is a tensor",
    ),
    "lambda shape": ({"reward_scale": zeros(T)}, ValueError, r"reward_scale.*\(2, 3\).*\(2,\).*got shape \(3,\)"),
    "lambda dtype": ({"reward_scale": torch.ones(B, T).long()}, TypeError, "reward_scale must be a float tensor"),
    "lambda device": ({"reward_scale": meta(OLD)}, ValueError, "reward_scale must be on.*cpu.*meta"),
    "lambda nan": ({"reward_scale": float("nan")}, ValueError, "reward_scale must be finite, got nan"),
    "lambda inf": ({"reward_scale": float("inf")}, ValueError, "reward_scale must be finite, got inf"),
    "lambda bool": ({"reward_scale": True}, TypeError, "reward_scale must be a Python number, got bool"),
    "lambda string": ({"reward_scale": "1"}, TypeError, "reward_scale must be a Python number, got str"),
    "lambda none": ({"reward_scale": None}, TypeError, "reward_scale must be a Python number, got NoneType"),
    # names and options
    "estimator": ({"estimator": "magic"}, ValueError, "estimator must be one of 'sampled', 'full'.*'magic'"),
    "divergence": (dict(divergence="tv", **FULL), ValueError, "divergence must be one of.*'jsd'.*'tv'"),
    "divergence of sampled": ({"divergence": "jsd"}, ValueError, "divergence='jsd' needs estimator='full'"),
    "reduction": ({"reduction": "mean"}, ValueError, "reduction must be one of.*'token-mean'.*'mean'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of.*'triton'.*'cuda'"),
    "beta below 0": (
        dict(divergence="jsd", beta=-1e-9, **FULL),
        ValueError,
        "beta must satisfy 0 <= beta <= 1 .*-1e-09",
    ),
    "beta above 1": (dict(divergence="jsd", beta=2, **FULL), ValueError, "beta must satisfy 0 <= beta <= 1 .*got 2.0"),
    "beta nan": (dict(divergence="jsd", beta=float("nan"), **FULL), ValueError, "beta must"),
    "beta type": (dict(divergence="jsd", beta="0.5", **FULL), TypeError, "beta must be a Python number, got str"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_dtype of another dtype": (
        {"chunk_dtype": torch.bfloat16, "estimator": "full"},
        ValueError,
        "student.hidden is torch.float32: leave chunk_dtype out",
    ),
    "chunk_dtype type": ({"chunk_dtype": "bfloat16"}, TypeError, "chunk_dtype must be a torch.dtype, got str"),
    "chunk_size type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float"),
    "vocab_size too large": ({"vocab_size": V + 1}, ValueError, "vocab_size must be between 1 and 7.*got 8"),
    "vocab_size 0": ({"vocab_size": 0}, ValueError, "vocab_size must be between 1 and 7.*got 0"),
    "vocab_size type": ({"vocab_size": 7.0}, TypeError, "vocab_size must be an int, got float"),
    "unknown keyword": ({"lam": 1.25}, TypeError, "lam"),
    # token ids
    "no token ids": ({"token_ids": None}, ValueError, "token_ids must be given for estimator='sampled'"),
    "token ids list": ({"token_ids": [0] * 6}, TypeError, "token_ids must be a torch.Tensor, got list"),
    "token ids float": ({"token_ids": IDS.float()}, TypeError, "token_ids must be an integer tensor.*float32"),
    "token ids bool": ({"token_ids": IDS.bool()}, TypeError, "token_ids must be an integer tensor.*bool"),
    "token ids shape": ({"token_ids": IDS[:, 1:]}, ValueError, r"token_ids.*\(2, 3\).*\(2, 2\)"),
    "token ids device": ({"token_ids": meta(IDS)}, ValueError, "token_ids must be on.*cpu.*meta"),
    "token id V": ({"token_ids": swapped(V)}, IndexError, r"token_ids must be in \[0, 7\).*got 7"),
    "token id -1": ({"token_ids": swapped(-1)}, IndexError, r"token_ids must be in \[0, 7\).*got -1"),
    "token id V in full": (dict(token_ids=swapped(V), **FULL), IndexError, r"token_ids.*\[0, 7\).*got 7"),
    "token id past vocab_size": ({"token_ids": swapped(5), "vocab_size": 5}, IndexError, r"token_ids.*\[0, 5\).*got 5"),
    "token id past the smallest model": (
        {"token_ids": swapped(6), "ref": fg.Logits(zeros(B, T, 6))},
        IndexError,
        r"token_ids.*\[0, 6\).*got 6",
    ),
    "token id -100 live": ({"token_ids": swapped(-100)}, IndexError, "got -100"),
    "token id -100 without a mask": ({"token_ids": swapped(-100), "mask": None}, ValueError, "-100.*mask"),
    # mask
    "mask list": ({"mask": [1] * 6}, TypeError, "mask must be a torch.Tensor, got list"),
    "mask complex": ({"mask": MASK.to(torch.complex64)}, TypeError, "mask must be bool, or 0 and 1.*complex64"),
    "mask shape": ({"mask": MASK[0]}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
    "mask device": ({"mask": meta(MASK)}, ValueError, "mask must be on.*cpu.*meta"),
    "mask weights": ({"mask": MASK.float() * 0.5}, ValueError, "mask must hold 0 and 1 only, got 0.5"),
    "mask nan": ({"mask": MASK.double().log()}, ValueError, "mask must hold 0 and 1 only, got -inf"),
    "mask values": ({"mask": MASK.long() * 2}, ValueError, "mask must hold 0 and 1 only, got 2"),
    # log-probs from elsewhere
    "teacher probabilities": (
        {"teacher": fg.TokenLogProbs(OLD.exp())},
        ValueError,
        r"teacher.logprobs must be log-probabilities, at most 0 \(up to 0.25 of rounding\).*got 0.367879",
    ),
    "ref negative log-probs": (
        {"ref": fg.TokenLogProbs(-OLD), "reward_scale": 1.25},
        ValueError,
        "ref.logprobs must be log-probabilities.*got 1",
    ),
    "ref of a cancelled model": (
        {"ref": fg.TokenLogProbs(-OLD), "score_cancelled": True},
        ValueError,
        "ref.logprobs must be log-probabilities.*got 1",
    ),
    "probabilities in a list": (
        {"teacher": [Q, fg.TokenLogProbs(OLD.exp())], "teacher_index": torch.ones(B, T).long()},
        ValueError,
        r"teacher\[1\].logprobs must be log-probabilities",
    ),
    "old probabilities": ({"old_logprobs": OLD.exp()}, ValueError, "old_logprobs must be log-probabilities.*got 0.367"),
    "rollout inf": ({"rollout_logprobs": OLD * -math.inf}, ValueError, "rollout_logprobs must be log-prob.*got inf"),
    "top-k probabilities": (
        {"teacher": fg.TopKLogProbs(IDS[..., None], OLD.exp()[..., None]), "estimator": "topk"},
        ValueError,
        "teacher.logprobs must be log-probabilities, whose exponentials sum to at most 1",
    ),
    # old log-probs and clip
    "old in full": (dict(old_logprobs=OLD, **FULL), ValueError, "old_logprobs is an option of estimator='sampled'"),
    "old shape": ({"old_logprobs": OLD[:, 1:]}, ValueError, r"old_logprobs.*\(2, 3\).*\(2, 2\)"),
    "old dtype": ({"old_logprobs": IDS}, TypeError, "old_logprobs must be a float tensor"),
    "old type": ({"old_logprobs": -1.0}, TypeError, "old_logprobs must be a torch.Tensor, got float"),
    "old device": ({"old_logprobs": meta(OLD)}, ValueError, "old_logprobs must be on.*cpu.*meta"),
    "clip in full": (dict(clip=(0.2, 0.2), **FULL), ValueError, "clip is an option of estimator='sampled'"),
    "clip without old": ({"clip": (0.2, 0.2)}, ValueError, "clip needs old_logprobs"),
    "clip a number": ({"clip": 0.2, "old_logprobs": OLD}, TypeError, "clip must be a pair.*0.2"),
    "clip of three": ({"clip": (0.1, 0.2, 0.3), "old_logprobs": OLD}, TypeError, "clip must be a pair"),
    "clip low": ({"clip": (1.5, 0.2), "old_logprobs": OLD}, ValueError, "clip must satisfy"),
    "clip negative": ({"clip": (0.2, -0.1), "old_logprobs": OLD}, ValueError, "clip must satisfy"),
    "clip of strings": ({"clip": ("a", "b"), "old_logprobs": OLD}, TypeError, "clip must be a Python number"),
    # more of the sampled estimator
    "rollout without ids": (
        dict(rollout_logprobs=OLD, token_ids=None, **FULL),
        ValueError,
        "token_ids must be given for rollout_logprobs",
    ),
    "rollout_is": (
        {"rollout_is": "prefix", "rollout_logprobs": OLD},
        ValueError,
        "rollout_is must be one of 'token', 'sequence', 'geometric', 'none', got 'prefix'",
    ),
    "rollout_is none": (
        {"rollout_is": "none", "rollout_logprobs": OLD},
        ValueError,
        "rollout_is='none' needs rollout_",
    ),
    "rollout_is none, cap": (
        {"rollout_is": "none", "rollout_is_cap": 2.0, "rollout_logprobs": OLD},
        ValueError,
        "rollout_is_cap bounds importance weights",
    ),
    "mask without rollout": (
        {"rollout_mask": {"token_ratio": (0.5, 2.0)}},
        ValueError,
        "rollout_mask needs rollout_logprobs",
    ),
    "mask a pair": ({"rollout_mask": (0.5, 2.0), "rollout_logprobs": OLD}, TypeError, "rollout_mask must be a mapping"),
    "mask empty": ({"rollout_mask": {}, "rollout_logprobs": OLD}, ValueError, "rollout_mask must name at least one"),
    "mask unknown": (
        {"rollout_mask": {"seq_mean_k1": (0.5, 2.0)}, "rollout_logprobs": OLD},
        ValueError,
        "rollout_mask must be of the statistics token_ratio, .* got 'seq_mean_k1'",
    ),
    "mask a number": (
        {"rollout_mask": {"token_k2": 0.1}, "rollout_logprobs": OLD},
        TypeError,
        r"rollout_mask\['token_k2'\] must be a pair \(low, high\), None for no bound, got 0.1",
    ),
    "mask order": (
        {"rollout_mask": {"token_ratio": (2.0, 0.5)}, "rollout_logprobs": OLD},
        ValueError,
        r"rollout_mask\['token_ratio'\] must have low < high",
    ),
    "mask without bounds": (
        {"rollout_mask": {"token_ratio": (None, None)}, "rollout_logprobs": OLD},
        ValueError,
        "at least one of them given",
    ),
    "mask of a negative ratio": (
        {"rollout_mask": {"token_ratio": (-0.2, 0.2)}, "rollout_logprobs": OLD},
        ValueError,
        "bounds a ratio, which is positive",
    ),
    "trust region in full": (
        dict(trust_region={"token_ratio": (0.5, 2.0)}, rollout_logprobs=OLD, **FULL),
        ValueError,
        "trust_region is an option of estimator='sampled'",
    ),
    "advantage_policy": ({"advantage_policy": "current"}, ValueError, "advantage_policy needs old_logprobs"),
    "log_ratio_max": ({"log_ratio_max": 20.0}, ValueError, "log_ratio_max needs old_logprobs or rollout_logprobs"),
    "log_ratio_max 0": ({"log_ratio_max": 0.0}, ValueError, "log_ratio_max must be positive"),
    "loss_max 0": ({"loss_max": -1.0}, ValueError, "loss_max must be positive"),
    "clip of no ratio": (
        {"ratio": "none", "clip": (0.2, 0.2), "old_logprobs": OLD},
        ValueError,
        "clip has nothing to act on with ratio='none'",
    ),
    "dual of a detached ratio": (
        {"ratio": "detached", "clip_dual": 3.0, "old_logprobs": OLD},
        ValueError,
        "clip_dual has nothing to act on with ratio='detached'",
    ),
    "sequences of topk with labels": (
        {"rollout_is": "sequence", "rollout_logprobs": OLD, "estimator": "topk", "k": 2, "sft_labels": IDS},
        ValueError,
        "rollout_is='sequence' with sft_labels and estimator='topk' needs old_logprobs",
    ),
    "rollout shape": ({"rollout_logprobs": OLD[0]}, ValueError, r"rollout_logprobs.*\(2, 3\).*\(3,\)"),
    "rollout dtype": ({"rollout_logprobs": IDS}, TypeError, "rollout_logprobs must be a float tensor"),
    "cap without rollout": ({"rollout_is_cap": 2.0}, ValueError, "rollout_is_cap needs rollout_logprobs"),
    "cap 0": (
        {"rollout_is_cap": 0, "rollout_logprobs": OLD},
        ValueError,
        "rollout_is_cap must be positive, got 0",
    ),
    "cap order": ({"rollout_is_cap": (2, 1), "rollout_logprobs": OLD}, ValueError, "rollout_is_cap.*0 <= low <= high"),
    "dual in full": (dict(clip_dual=3.0, **FULL), ValueError, "clip_dual is an option of estimator='sampled'"),
    "dual without old": ({"clip_dual": 3.0}, ValueError, "clip_dual needs old_logprobs"),
    "dual 1": ({"clip_dual": 1.0, "old_logprobs": OLD}, ValueError, "clip_dual must be above 1, got 1.0"),
    "dual pair": (
        {"clip_dual": (1, 2), "old_logprobs": OLD},
        TypeError,
        "clip_dual must be a Python number, got tuple",
    ),
    "ratio": (
        {"ratio": "prefix", "old_logprobs": OLD},
        ValueError,
        "ratio must be one of 'token', 'sequence'.*'prefix'",
    ),
    "ratio in full": (dict(ratio="sequence", **FULL), ValueError, "ratio is an option of estimator='sampled'"),
    "ratio without old": ({"ratio": "sequence"}, ValueError, "ratio needs old_logprobs"),
    "advantage_clip in full": (dict(advantage_clip=1.0, **FULL), ValueError, "advantage_clip is an option of"),
    "advantage_clip 0": ({"advantage_clip": 0.0}, ValueError, "advantage_clip must be a positive number or.*got 0.0"),
    "advantage_clip order": ({"advantage_clip": (1.0, -1.0)}, ValueError, "advantage_clip.*low < high"),
    "advantage_clip of three": ({"advantage_clip": (1, 2, 3)}, TypeError, "advantage_clip must be a number or a pair"),
    "advantage_clip string": ({"advantage_clip": "1"}, TypeError, "advantage_clip must be a Python number, got str"),
    "logprob_min in full": (dict(logprob_min=-9.0, **FULL), ValueError, "logprob_min is an option of"),
    "logprob_min 0": ({"logprob_min": 0.0}, ValueError, "logprob_min must be negative.*got 0.0"),
    "logprob_min inf": ({"logprob_min": float("-inf")}, ValueError, "logprob_min must be finite"),
    "student_logprob_min": ({"student_logprob_min": -9.0}, ValueError, "student_logprob_min is an option of"),
    "student_logprob_min and its tail": (
        {"estimator": "topk", "k": 3, "student_logprob_min": -9.0},
        ValueError,
        "student_logprob_min needs tail='drop', got tail='bucket'",
    ),
    "student_logprob_min 1": (
        {"estimator": "topk", "k": 3, "tail": "drop", "student_logprob_min": 1.0},
        ValueError,
        "student_logprob_min must be negative.*got 1.0",
    ),
    "baseline": ({"baseline": "mean"}, ValueError, "baseline must be one of 'none', 'expected', got 'mean'"),
    "baseline in full": (dict(baseline="expected", **FULL), ValueError, "baseline is an option of"),
    "baseline of scores": (
        {"teacher": SCORES, "baseline": "expected"},
        TypeError,
        "teacher is TokenLogProbs.*baseline='expected'",
    ),
    "hook in full": (dict(advantage_fn=lambda s: s.advantages, **FULL), ValueError, "advantage_fn is an option of"),
    "hook a tensor": ({"advantage_fn": OLD}, TypeError, "advantage_fn must be callable, got Tensor"),
    "hook gives a number": (
        {"advantage_fn": lambda s: 1.0},
        TypeError,
        "advantage_fn must return a torch.Tensor",
    ),
    "hook gives integers": (
        {"advantage_fn": lambda s: s.index},
        TypeError,
        "advantage_fn must return a float tensor, got torch.int64",
    ),
    "hook gives another shape": (
        {"advantage_fn": lambda s: s.advantages.sum()},
        ValueError,
        r"advantage_fn must return one advantage per token.*got \(\)",
    ),
    # packed sequences
    "cu_seqlens of a batch": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"cu_seqlens.*\(N,\).*\(2, 3\)"),
    "cu_seqlens list": ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
    "cu_seqlens float": ({"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    "cu_seqlens 2-d": (
        {"cu_seqlens": zeros(1, 2).int()},
        ValueError,
        r"cu_seqlens must have shape \(B \+ 1,\), got \(1, 2\)",
    ),
    # reduction
    "normalizer of sum": ({"normalizer": 5, "reduction": "sum"}, ValueError, "normalizer.*reduction='sum'"),
    "normalizer of none": ({"normalizer": 5, "reduction": "none"}, ValueError, "normalizer.*reduction='none'"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer must be positive, got 0"),
    "normalizer negative": ({"normalizer": -2.0}, ValueError, "normalizer must be positive, got -2"),
    "normalizer vector": ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be.*\(2,\)"),
    "normalizer string": ({"normalizer": "8"}, TypeError, "normalizer must be a Python number, got str"),
    "lengths of token-mean": (
        {"sequence_lengths": zeros(B)},
        ValueError,
        "sequence_lengths is an option of 'seq-mean-token-mean'.*'token-mean'",
    ),
    "lengths of token-sum": (
        {"sequence_lengths": zeros(B), "reduction": "seq-mean-token-sum"},
        ValueError,
        "sequence_lengths is an option",
    ),
    "lengths shape": (
        {"sequence_lengths": zeros(T), "reduction": "seq-mean-token-mean"},
        ValueError,
        r"sequence_lengths.*\(2,\).*\(3,\)",
    ),
    "lengths too short": (
        {"sequence_lengths": torch.tensor([3, 1]), "reduction": "seq-mean-token-mean", "mask": None},
        ValueError,
        "sequence_lengths must be at least the number of live tokens that each sequence has here, got 1",
    ),
    "lengths list": (
        {"sequence_lengths": [3, 3], "reduction": "seq-mean-token-mean"},
        TypeError,
        "sequence_lengths must be a.*list",
    ),
    "lengths device": (
        {"sequence_lengths": meta(zeros(B)), "reduction": "seq-mean-token-mean"},
        ValueError,
        "sequence_lengths.*cpu.*meta",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
def test_gopd_loss_names_what_is_wrong(function, case):
    changes, error, message = CASES[case]
    if function is fg.reference.gopd_loss and set(changes) & {"backend", "chunk_size"}:
        pytest.skip("they choose how the fused loss computes")
    arguments = {"student": S, "teacher": Q, "ref": R, "token_ids": IDS, "mask": MASK} | changes
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
def test_rounding_and_what_is_not_read_is_no_wrong_log_prob(function):
    """Up to the bound, at masked tokens, and where lambda cancels the model."""
    wrong = torch.where(MASK, 0.25, 7.0)
    assert not MASK.all()
    scores = fg.TokenLogProbs(wrong)
    own = {"old_logprobs": wrong, "rollout_logprobs": wrong, "mask": MASK}
    assert function(S, scores, scores, IDS, reward_scale=1.25, **own).loss.isfinite()
    cancelled = torch.full((B, T), 1.0)
    assert function(S, scores, fg.TokenLogProbs(-9 * OLD), IDS, reward_scale=cancelled, mask=MASK).loss.isfinite()
    assert function(S, scores, fg.TokenLogProbs(-9 * OLD), IDS, mask=MASK).loss.isfinite()
    assert function(S, fg.TokenLogProbs(OLD * math.nan), None, IDS).loss.isnan()  # a diverged model is seen, as ever
    shifted = {"old_logprobs": -OLD, "advantage_fn": lambda stats: stats.advantages}  # a ratio of one's own
    assert function(S, Q, None, IDS, **shifted).loss.isfinite()
    lengths = MASK.sum(1)
    assert function(S, Q, R, IDS, mask=MASK, reduction="seq-mean-token-mean", sequence_lengths=lengths).loss.isfinite()


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_packed_tokens_have_no_sequences_to_reduce_over(reduction):
    with pytest.raises(ValueError, match=rf"reduction='{reduction}'.*\(B, T\).*\(5,\)"):
        fg.gopd_loss(*ONE_D.models, ONE_D.token_ids, reduction=reduction)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4], "start at 0 and end at N=5, the number of tokens, got 0 and 4"),
        ([1, 5], "start at 0 and end at N=5, the number of tokens, got 1 and 5"),
        ([0, 6], "got 0 and 6"),
        ([0, 4, 2, 5], r"must be sorted, got \[0, 4, 2, 5\]"),
        ([], r"must have shape \(B \+ 1,\), got \(0,\)"),
    ],
)
@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
def test_cu_seqlens_has_to_cut_the_tokens(function, bounds, message):
    with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
        function(*ONE_D.models, ONE_D.token_ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_values_per_packed_sequence_have_its_number():
    bounds = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"reward_scale.*\(5,\).*per sequence \(2,\), got shape \(3,\)"):
        fg.gopd_loss(*ONE_D.models, ONE_D.token_ids, cu_seqlens=bounds, reward_scale=zeros(3))
    options = {"reduction": "seq-mean-token-mean", "sequence_lengths": zeros(3)}
    with pytest.raises(ValueError, match=r"sequence_lengths must have shape \(2,\).*\(3,\)"):
        fg.gopd_loss(*ONE_D.models, ONE_D.token_ids, cu_seqlens=bounds, **options)


@pytest.mark.parametrize("name", ["reward_scale", "teacher_index"])
def test_values_for_a_single_token_have_its_shape(name):
    head = fg.LinearHead(zeros(4), zeros(7, 4))
    value = {"reward_scale": zeros(1), "teacher_index": zeros(1).long()}[name]
    with pytest.raises(ValueError, match=rf"{name} must .*the token shape \(\), got shape \(1,\)"):
        fg.gopd_loss(head, [head, head], head, torch.tensor(0), **({"teacher_index": torch.tensor(0)} | {name: value}))


def test_ratios_of_sequences_need_sequences():
    with pytest.raises(ValueError, match=r"ratio='sequence' needs a token shape \(B, T\) or cu_seqlens.*\(5,\)"):
        fg.gopd_loss(*ONE_D.models, ONE_D.token_ids, ratio="sequence", old_logprobs=-torch.ones(5))


def test_the_valid_call_that_every_case_breaks_is_valid():
    assert fg.gopd_loss(S, Q, R, IDS, mask=MASK, backend="torch").loss.isfinite()
    fg.gopd_loss(S, Q, R, IDS, mask=MASK, old_logprobs=OLD, clip=(0.2, 0.2), backend="torch")
    fg.gopd_loss(S, SCORES, SCORES, IDS, mask=MASK, reward_scale=1.25, backend="torch")


@pytest.mark.parametrize("name", ["torch", "native", "triton"])
def test_a_backend_runs_or_is_refused_with_its_reason(name):
    reason = why_not(name)
    if reason is None:
        assert fg.gopd_loss(S, Q, R, IDS, backend=name).loss.isfinite()
    else:
        with pytest.raises((RuntimeError, ImportError), match=re.escape(reason)):
            fg.gopd_loss(S, Q, R, IDS, backend=name)


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_float64_is_refused_by_the_kernels(name, wide, monkeypatch):
    monkeypatch.setattr("fused_gopd.rowops.unavailable_reason", lambda _: None)
    batch = make_batch(2, dtype=F32)
    head = getattr(batch, wide)
    batch = batch.replaced(**{wide: fg.LinearHead(head.hidden.double(), head.weight.double())})
    with pytest.raises(ValueError, match=f"backend='{name}'.*float64"):
        fg.gopd_loss(*batch.models, batch.token_ids, backend=name)


def test_nothing_is_computed_before_the_check(monkeypatch):
    """The last thing to be checked is still checked before the first GEMM."""
    monkeypatch.setattr("fused_gopd.loop.run.chunks", lambda *a, **k: pytest.fail("work before the check"))
    for case in ("token id V", "vocab_size too large", "mask values", "no reference"):
        changes, error, _ = CASES[case]
        with pytest.raises(error):
            fg.gopd_loss(**({"student": S, "teacher": Q, "ref": R, "token_ids": IDS, "mask": MASK} | changes))


# ------------------------------------------------------------------------------------------------------------- masks


MASKED = {
    "gopd_loss": lambda mask: fg.gopd_loss(S, Q, None, IDS, mask=mask).token_loss,
    "full": lambda mask: fg.gopd_loss(S, Q, mask=mask, reduction="seq-mean-token-mean", **FULL).loss,
    "reference": lambda mask: fg.reference.gopd_loss(S, Q, None, IDS, mask=mask).token_loss,
    "GOPDLoss": lambda mask: fg.GOPDLoss(**FULL)(S, Q, mask=mask).token_loss,
    "token_logprobs": lambda mask: fg.token_logprobs(S, IDS, mask=mask),
    "token_topk": lambda mask: fg.token_topk(S, 2, mask=mask)[0],
    "normalization": lambda mask: fg.distributed.normalization("seq-mean-token-mean", [mask])[0]["sequence_lengths"],
    "sampled_loss": lambda mask: sampled_loss(OLD, 2 * OLD, mask=mask).loss,
}
MASK_DTYPES = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_holds_zeros_and_ones_of_any_dtype(name):
    call = MASKED[name]
    want = call(MASK)
    for dtype in MASK_DTYPES:
        assert torch.equal(call(MASK.to(dtype)), want), dtype
    for wrong in (MASK.double() * 0.5, MASK.double() * -1, MASK.double() + 1e-9, MASK.double() * math.nan):
        with pytest.raises(ValueError, match=r"mask(s\[0\])? must hold 0 and 1 only, got"):
            call(wrong)


# --------------------------------------------------------------------------------------- token_logprobs and GOPDLoss


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head": SCORES}, TypeError, "head must be a LinearHead or Logits, got TokenLogProbs"),
        ({"head": zeros(2, 3)}, TypeError, "head must be a LinearHead or Logits, got Tensor"),
        ({"token_ids": None}, ValueError, "token_ids must be given"),
        ({"token_ids": IDS.float()}, TypeError, "token_ids must be an integer tensor"),
        ({"token_ids": IDS[:1]}, ValueError, r"token_ids.*\(2, 3\).*\(1, 3\)"),
        ({"token_ids": swapped(V)}, IndexError, r"token_ids must be in \[0, 7\).*got 7"),
        ({"token_ids": swapped(-100)}, ValueError, "-100.*mask"),
        ({"mask": MASK[0]}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size must be between 1 and 7"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be at least 1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_token_logprobs_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        fg.token_logprobs(**{"head": S, "token_ids": IDS, **changes})


def test_a_tensor_is_to_be_wrapped():
    x = zeros(B, T, V)
    for name in ("student", "teacher", "ref"):
        call = {"student": S, "teacher": Q, "ref": R, "token_ids": IDS, name: x}
        for function in (fg.gopd_loss, fg.reference.gopd_loss, fg.GOPDLoss()):
            with pytest.raises(TypeError, match=rf"{name} must be a LinearHead.*got Tensor; wrap it: fg.Logits\(x\)"):
                function(**call)
    with pytest.raises(TypeError, match=r"teacher\[1\] must be .*wrap it: fg.Logits\(x\).*fg.TokenLogProbs\(x\)"):
        fg.gopd_loss(S, [Q, x], None, IDS, teacher_index=IDS % 2)
    for score in (lambda: fg.token_logprobs(x, IDS), lambda: fg.token_topk(x, 2)):
        with pytest.raises(
            TypeError, match=r"head must be a LinearHead or Logits, got Tensor; wrap it: fg.Logits\(x\)"
        ):
            score()
    output = SimpleNamespace(logits=x)
    with pytest.raises(
        TypeError, match=r"student must be .*got SimpleNamespace; wrap its logits: fg.Logits\(x.logits\)"
    ):
        fg.gopd_loss(output, Q, None, IDS)


def test_gopd_loss_module_refuses_unknown_options():
    with pytest.raises(TypeError, match=r"lam is not an option of GOPDLoss; expected one of.*reward_scale"):
        fg.GOPDLoss(lam=1.25)
    with pytest.raises(TypeError, match="mask is not an option of GOPDLoss"):
        fg.GOPDLoss(mask=MASK)
    with pytest.raises(ValueError, match=r"ratio must be one of 'token', 'sequence'.*got 'prefix'"):
        fg.GOPDLoss(ratio="prefix")


def test_gopd_loss_module_refuses_unknown_batch_arguments():
    with pytest.raises(TypeError, match=r"masks is not an argument of GOPDLoss.forward; expected one of.*mask"):
        fg.GOPDLoss(backend="torch")(S, Q, R, IDS, masks=MASK)
    with pytest.raises(TypeError, match="estimator is not an argument"):
        fg.GOPDLoss(backend="torch")(S, Q, R, IDS, estimator="full")
