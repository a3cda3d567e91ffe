"""out.metrics(): means over tokens, exact when added over micro-batches."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import fused_gopd as fg
from builders import like, make_batch, run
from fused_gopd.metrics import Metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_metric_is_its_mean_over_the_live_tokens(backend_dtype):
    batch = make_batch(61, shape=(3, 5), dtype=backend_dtype.dtype)
    old = torch.linspace(-4, -1, 15, dtype=backend_dtype.dtype).reshape(3, 5)
    rollout = old + torch.linspace(-0.6, 0.3, 15, dtype=backend_dtype.dtype).reshape(3, 5)
    options = {"reward_scale": 1.25, "old_logprobs": old, "clip": (0.2, 0.2)}
    options |= {"rollout_is_cap": 1.5, "rollout_mask": {"token_ratio": (0.9, None)}}
    out, _ = run(batch, backend=backend_dtype.backend, rollout_logprobs=rollout, **options)
    live = batch.mask
    p, q, r = (x[live].double() for x in (out.student_logprobs, out.teacher_logprobs, out.ref_logprobs))
    a, w = out.advantages[live].double(), out.importance[live].double()
    want = {
        "tokens": float(live.sum()),
        "loss": out.token_loss[live].double().mean(),
        "entropy": out.entropy[live].double().mean(),
        "reward": (q - r).mean(),
        "kl_teacher_k3": ((q - p).expm1() - (q - p)).mean(),
        "kl_ref_k3": ((r - p).expm1() - (r - p)).mean(),
        "impossible": 0.0,
        "advantage": a.mean(),
        "advantage_std": a.std(correction=0),
        "clip_fraction": out.clipped[live].double().mean(),
        "importance": w.mean(),
        "importance_std": w.std(correction=0),
        "effective_sample_size": w.mean() ** 2 / (w * w).mean(),
        "masked_fraction": (w == 0).double().mean(),
    }
    got = out.metrics().to_dict()
    assert got.keys() == want.keys()
    assert 0 < got["clip_fraction"] < 1
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_full_has_the_divergence_from_the_target(backend):
    batch = make_batch(62, shape=(3, 5), dtype=torch.float32)
    out, _ = run(batch, backend=backend, estimator="full", reward_scale=1.25)
    assert out.metrics()["kl_target"].item() == pytest.approx(float(out.kl.sum() / batch.mask.sum()), rel=1e-6)
    without, _ = run(batch.replaced(token_ids=None), backend=backend, estimator="full", reward_scale=1.25)
    assert set(without.metrics()) == {"tokens", "loss", "entropy", "kl_target"}


@pytest.mark.parametrize(("scale", "name"), [(1.0, "kl_teacher"), (0, "kl_ref"), (1.25, None)])
def test_divergences_are_exact_where_full_has_them_and_estimated_elsewhere(backend_dtype, scale, name):
    """Every token of a position once: weighted by the student's probabilities k3 is the divergence itself."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randn(1, 11, generator=g, dtype=torch.float64).expand(11, 11) for _ in range(3)]
    models, ids = [fg.Logits(x.to(backend_dtype.dtype)) for x in rows], torch.arange(11)
    options = {"reward_scale": scale, "score_cancelled": True, "backend": backend_dtype.backend}
    full = fg.gopd_loss(*models, ids, estimator="full", **options)
    p, *others = (x[0].log_softmax(-1) for x in rows)
    exact = {"kl_teacher": (p.exp() * (p - others[0])).sum(), "kl_ref": (p.exp() * (p - others[1])).sum()}
    for each, value in exact.items():
        assert (each in full.metrics()) == (each == name)
        estimates = [
            fg.gopd_loss(*models, ids, mask=ids == y, estimator=estimator, **options).metrics()[each + "_k3"]
            for y in range(11)
            for estimator in ("sampled", "full")
        ]
        assert min(estimates) >= 0
        for found in (estimates[::2], estimates[1::2]):
            assert float((p.exp() * torch.stack(found)).sum()) == pytest.approx(float(value), rel=1e-5)
    if name is not None:
        assert full.metrics()[name] == pytest.approx(float(exact[name]), rel=1e-5)
    topk = fg.gopd_loss(*models, ids, estimator="topk", k=3, **options).metrics()
    assert not {"kl_teacher", "kl_ref"} & set(topk)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_metrics_of_micro_batches_add_up_to_those_of_the_batch(estimator):
    batch = make_batch(63, shape=(4, 5))
    whole, _ = run(batch, estimator=estimator, reward_scale=1.25)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        models = [like(m, hidden=m.hidden[rows]) for m in batch.models]
        options = {"mask": batch.mask[rows], "estimator": estimator, "reward_scale": 1.25}
        parts.append(fg.gopd_loss(*models, batch.token_ids[rows], **options).metrics())
    want, got = whole.metrics().to_dict(), sum(parts).to_dict()
    assert got == pytest.approx(want, rel=1e-12)
    assert parts[0]["reward"] != pytest.approx(float(want["reward"]))


def test_a_cancelled_model_has_metrics_when_it_is_scored():
    batch = make_batch(64)
    without, _ = run(batch, reward_scale=1.0)
    assert "reward" not in without.metrics()
    scored, _ = run(batch, reward_scale=1.0, score_cancelled=True)
    assert {"reward", "kl_ref_k3"} <= set(scored.metrics())


def test_impossible_tokens_are_counted_and_excluded():
    batch = make_batch(65, shape=(4,), kinds=("logits",) * 3, masked=False)
    with torch.no_grad():
        batch.teacher.logits[1, batch.token_ids[1]] = -math.inf
    metrics = run(batch, reward_scale=1.25)[0].metrics().to_dict()
    assert metrics["impossible"] == 0.25
    assert all(math.isfinite(x) for x in metrics.values())


def test_a_lambda_per_token_excludes_models_that_full_did_not_score():
    batch = make_batch(66, shape=(4,), masked=False)
    lam = torch.tensor([0.0, 1.0, 0.5, 1.5], dtype=torch.float64)
    out, _ = run(batch, estimator="full", reward_scale=lam)
    p, q, r = out.student_logprobs, out.teacher_logprobs, out.ref_logprobs
    metrics = out.metrics()
    assert metrics["reward"] == pytest.approx(float((q - r)[2:].mean()))
    k3 = [torch.expm1(x - p) - (x - p) for x in (q, r)]
    assert metrics["kl_teacher_k3"] == pytest.approx(float(k3[0][1:].mean()))
    assert metrics["kl_ref_k3"] == pytest.approx(float(k3[1][[0, 2, 3]].mean()))


def test_nothing_live_is_nan_and_adds_nothing():
    batch = make_batch(67, shape=(2, 3))
    nothing = fg.gopd_loss(*batch.models, batch.token_ids, mask=torch.zeros_like(batch.mask), reward_scale=1.25)
    metrics = nothing.metrics()
    assert metrics["tokens"] == 0
    assert math.isnan(metrics.to_dict()["reward"])
    some = run(batch, reward_scale=1.25)[0].metrics()
    assert (metrics + some).to_dict() == some.to_dict()


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 5}])
def test_metrics_of_each_teacher_are_those_of_a_call_with_its_tokens(objective, backend_dtype):
    """Of three teachers, one of which has no token; together they are the metrics of the call."""
    batch = make_batch(69, shape=(3, 5), dtype=backend_dtype.dtype)
    teachers, index = [batch.teacher, batch.ref, batch.teacher], 2 * (torch.arange(15).reshape(3, 5) % 2)
    options = {"reward_scale": 1.25, "backend": backend_dtype.backend, **objective}
    several = batch.replaced(teacher=teachers)
    out, _ = run(several, teacher_index=index, chunk_size=4, **options)
    dense, _ = run(several, fg.reference.gopd_loss, teacher_index=index, reward_scale=1.25, **objective)
    assert out.teachers == dense.teachers == 3
    assert torch.equal(out.teacher_index, index * batch.mask)
    assert torch.equal(dense.teacher_index, out.teacher_index)
    found = out.metrics(by="teacher")
    assert [int(m["tokens"]) for m in found] == [int((batch.mask & (index == i)).sum()) for i in range(3)]
    assert math.isnan(found[1].to_dict()["loss"])
    assert sum(found).to_dict() == pytest.approx(out.metrics().to_dict(), rel=1e-9)
    for i in (0, 2):
        alone, _ = run(batch.replaced(teacher=teachers[i], mask=batch.mask & (index == i)), **options)
        assert found[i].to_dict() == pytest.approx(alone.metrics().to_dict(), rel=1e-4)


def test_metrics_by_teacher_of_sequences_and_of_references_add_up():
    batch = make_batch(70, shape=(3, 5))
    index = torch.tensor([1, 0, 1])
    several = batch.replaced(teacher=[batch.teacher] * 2, ref=[batch.ref, batch.teacher])
    out, _ = run(several, teacher_index=index, estimator="full", reward_scale=1.25)
    first, second = out.metrics(by="teacher")
    assert int(first["tokens"]) == int(batch.mask[1].sum())
    # of micro-batches: one sum for each teacher
    twice = [sum(pair) for pair in zip(*[out.metrics(by="teacher")] * 2, strict=True)]
    assert twice[1]["reward"] == second["reward"]
    assert twice[1]["tokens"] == 2 * second["tokens"]
    copied = pickle.loads(pickle.dumps(out.__getstate__()))
    assert torch.equal(copied["teacher_index"], index[:, None] * batch.mask)


def test_metrics_by_what_is_not_there():
    out, _ = run(make_batch(72), reward_scale=1.25)
    assert out.teacher_index is None
    with pytest.raises(ValueError, match=r"metrics\(by='teacher'\) needs a teacher_index in the call"):
        out.metrics(by="teacher")
    with pytest.raises(ValueError, match="by must be"):
        out.metrics(by="sequence")


def test_what_a_metric_refuses():
    batch = make_batch(68)
    a, b = run(batch, reward_scale=1.25)[0].metrics(), run(batch, reward_scale=1.0)[0].metrics()
    with pytest.raises(ValueError, match="metrics to add must have the same entries"):
        a + b
    with pytest.raises(KeyError, match="no metric 'rewards'; there are tokens, loss"):
        a["rewards"]
    assert a.get(3) is None  # type: ignore[call-overload]
    assert ("tokens",) not in a
    with pytest.raises(KeyError, match="no metric 3; there are tokens, loss"):
        a[3]  # type: ignore[index]
    with pytest.raises(TypeError):
        a + 1.0  # type: ignore[operator]
    assert isinstance(a, Metrics)
    assert repr(a).startswith("Metrics(tokens, loss")


def test_a_token_of_probability_0_makes_no_mean_infinite():
    student = torch.randn(3, 5)
    student[0, 0] = -math.inf
    ids = torch.zeros(3, dtype=torch.int64)
    metrics = fg.gopd_loss(fg.Logits(student), fg.Logits(torch.randn(3, 5)), None, ids).metrics().to_dict()
    assert metrics["impossible"] == pytest.approx(1 / 3)
    assert math.isfinite(metrics["kl_teacher_k3"])


def test_a_cancelled_model_makes_no_token_impossible():
    """Neither for a float lambda nor for a token's own; where it rules a token out the log-ratios leave it out."""
    q, r = torch.tensor([-math.inf, -1.0, -1.0]), torch.tensor([-2.0, -2.0, -math.inf])
    ids = torch.zeros(3, dtype=torch.int64)
    models = (fg.Logits(torch.randn(3, 5)), fg.TokenLogProbs(q), fg.TokenLogProbs(r))
    per_token = fg.gopd_loss(*models, ids, reward_scale=torch.tensor([0.0, 0.5, 1.0])).metrics().to_dict()
    assert per_token["impossible"] == 0
    assert per_token["reward"] == pytest.approx(1.0)
    scored = fg.gopd_loss(*models, ids, reward_scale=1.0, score_cancelled=True).metrics().to_dict()
    assert scored["impossible"] == pytest.approx(1 / 3)


def _rank(rank: int, folder: str) -> None:
    """One of two processes, with its half of the tokens."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batch = make_batch(71, shape=(4, 6), dtype=torch.float32, masked=False)
    mask = torch.arange(24).reshape(4, 6) % 3 != 0
    half = (torch.arange(4) // 2 == rank)[:, None] & mask
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=half, reward_scale=1.25)
    torch.save(out.metrics().all_reduce().to_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_together_are_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    batch = make_batch(71, shape=(4, 6), dtype=torch.float32, masked=False)
    mask = torch.arange(24).reshape(4, 6) % 3 != 0
    want = fg.gopd_loss(*batch.models, batch.token_ids, mask=mask, reward_scale=1.25).metrics().to_dict()
    assert want["tokens"] == 16
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
