"""Whole calls on a CUDA GPU: against the float64 reference on the same device, at sizes that a CPU suite cannot have.

The kernels' own tests (test_triton.py) and the contract's checks run on a GPU too; this file has what is left: every
option, real low-precision products, real vocabularies, offsets past 2^31, the same bits twice, torch.compile and NCCL.

Without a GPU the tests run on the CPU, on few tokens and small vocabularies, by the backend ``torch`` (``triton`` where
it is interpreted): so that they are right when a GPU is at hand. ``untried`` marks what no GPU had run when this was
written (2026-11-30): benchmarks/on_gpu.sh begins with that, in the order of this file.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fused_gopd as fg
import option_cases
from builders import (
    OBJECTIVES,
    TOLERANCE,
    Batch,
    assert_close,
    like,
    make_batch,
    relative_error,
    run,
    trainable,
    widened,
)
from fused_gopd.graphs import Graphed
from fused_gopd.rowops import LogitTransform, Stat
from fused_gopd.rowops.triton import Launch, TritonRowOps
from fused_gopd.tokens import fixed_shapes
from interpreter import DEVICE, RUNNABLE
from test_graphs import Eager

GPU = DEVICE == "cuda"
BACKEND = "triton" if RUNNABLE else "torch"
needs_triton = pytest.mark.skipif(not RUNNABLE, reason="no CUDA GPU, and TRITON_INTERPRET is not set")
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU")
untried = pytest.mark.untried
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
VOCAB = 151936 if GPU else 1003  # Qwen3's


def few(tokens: int) -> int:
    """So many tokens on a GPU, at most 24 on a CPU."""
    return tokens if GPU else min(tokens, 24)


def leaf_on_device(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)


def on_device(batch: Batch) -> Batch:
    heads = [like(m, **{k: x.detach().to(DEVICE) for k, x in m.tensors.items()}) for m in batch.models]
    mask = None if batch.mask is None else batch.mask.to(DEVICE)
    return Batch(trainable(heads[0]), heads[1], heads[2], batch.token_ids.to(DEVICE), mask)


def large(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """Heads over a real vocabulary, made on the device; the models resemble each other."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    base = torch.randn(VOCAB, hidden, generator=g, device=DEVICE) * 2 / hidden**0.5
    h = torch.randn(tokens, hidden, generator=g, device=DEVICE)

    def model() -> fg.LinearHead:
        w = base + 0.3 * torch.randn(base.shape, generator=g, device=DEVICE) * 2 / hidden**0.5
        return fg.LinearHead(h.to(dtype), w.to(dtype))

    ids = torch.randint(VOCAB, (tokens,), generator=g, device=DEVICE)
    return Batch(trainable(model()), model(), model(), ids, None)


def wide(batch: Batch) -> Batch:
    return batch.replaced(student=widened(batch.student), teacher=widened(batch.teacher), ref=widened(batch.ref))


def bound(dtype: torch.dtype) -> float:
    """Low precision: rounded at three places at most, as test_gpu_precision.py has it."""
    return TOLERANCE[dtype] if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps


# ---------------------------------------------------------------------------------------------- what no GPU has run yet


@untried
@pytest.mark.parametrize("case", list(option_cases.cases(option_cases.batch_of())))
def test_every_option_and_kind_of_model(case: str) -> None:
    """Each by itself against the dense reference in float64 on the same device, the heads in bfloat16."""
    vocab, shape = (5003, (4, 60)) if GPU else (option_cases.VOCAB, option_cases.SHAPE)
    batch = option_cases.batch_of(masked=True, dtype=torch.bfloat16, vocab=vocab, shape=shape)
    given = option_cases.arguments(batch, option_cases.cases(batch)[case])
    exact = {name: option_cases.wide(x) for name, x in given.items()}
    given, exact = (option_cases.moved(x, leaf_on_device) for x in (given, exact))
    kept = {"grad_filter", "chunk_size"} & given.keys()  # how, not what: the reference knows nothing of it
    out, got = option_cases.called(given, backend=BACKEND)
    want_out, want = option_cases.called(
        {name: x for name, x in exact.items() if name not in kept}, fg.reference.gopd_loss
    )
    # a function of bounds jumps where one of them begins
    for name in ("token_loss", "student_logprobs", "teacher_logprobs", "ref_logprobs", "advantages", "entropy", "kl"):
        value, expected = getattr(out, name), getattr(want_out, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert_close(value, expected, TOLERANCE[torch.float32], name)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert relative_error(g, w) <= bound(torch.bfloat16) + given.get("grad_filter", 0.0)
    means, expected_means = out.metrics().to_dict(), want_out.metrics().to_dict()
    assert means == pytest.approx(expected_means, rel=1e-3, abs=1e-4, nan_ok=True)


@untried
@needs_triton
@pytest.mark.parametrize(("tokens", "hidden"), [(40, 1024), (700, 1024), (700, 2048), (2100, 1000)])
def test_stored_exponentials_over_a_real_vocabulary(tokens: int, hidden: int) -> None:
    """linear_exponentials, which had run on no GPU when this was written: a gradient, rounded once per entry."""
    tokens = few(tokens)
    batch = large(tokens, hidden, torch.bfloat16)
    h, w, ids = batch.student.hidden.detach(), batch.student.weight.detach(), batch.token_ids
    stored = torch.empty(tokens, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    found = TritonRowOps().linear_exponentials(h, w, LogitTransform(), VOCAB, ids, stored)
    assert found is not None
    rows = slice(tokens - few(32), tokens)
    with torch.no_grad():
        logp = (h[rows].double() @ w.double().T).log_softmax(-1)
    statistics = found.statistics[:, rows]
    got = statistics[Stat.LOGIT_STUDENT] - statistics[Stat.LOGSUM_STUDENT]
    assert_close(got, logp.gather(-1, ids[rows, None])[:, 0], TOLERANCE[torch.float32])
    want = logp.exp().scatter_add(-1, ids[rows, None], -torch.ones(few(32), 1, dtype=torch.float64, device=DEVICE))
    entries = stored[rows].double().scatter(-1, ids[rows, None], found.entry[rows, None].double())
    assert relative_error(entries * found.factor[rows, None].double(), want) <= bound(torch.bfloat16)


@untried
@needs_triton
def test_a_step_with_stored_exponentials_is_as_accurate_as_the_default() -> None:
    batch = large(few(1100), 64, torch.bfloat16)
    want_out, want = run(wide(batch), fg.reference.gopd_loss, reward_scale=1.25)
    errors = {}
    for stored in (True, False):
        out, got = run(batch, backend=BACKEND, reward_scale=1.25, chunk_size=512, store_exponentials=stored)
        assert_close(out.token_loss, want_out.token_loss, TOLERANCE[torch.float32])
        errors[stored] = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
    for mine, default in zip(errors[True], errors[False], strict=True):
        assert mine <= min(1.05 * default, bound(torch.bfloat16))


@untried
def test_policy_losses_with_every_clip() -> None:
    batch = large(few(300), 64, torch.bfloat16)
    with torch.no_grad():
        now = fg.token_logprobs(batch.student, batch.token_ids)
    g = torch.Generator(DEVICE).manual_seed(2)
    old, rollout = (now + 0.3 * torch.randn(now.shape, generator=g, device=DEVICE) for _ in range(2))
    options: dict[str, Any] = {"old_logprobs": old.clamp(max=0), "rollout_logprobs": rollout.clamp(max=0)}
    options |= {
        "clip": (0.2, 0.3),
        "clip_dual": 3.0,
        "rollout_is_cap": 1.5,
        "advantage_clip": 2.0,
        "logprob_min": -20.0,
    }
    out, got = run(batch, backend=BACKEND, chunk_size=128, reward_scale=1.25, **options)
    want_out, want = run(wide(batch), fg.reference.gopd_loss, reward_scale=1.25, **options)
    assert_close(out.token_loss, want_out.token_loss, TOLERANCE[torch.float32])
    assert_close(out.advantages, want_out.advantages, TOLERANCE[torch.float32])
    for g_, w in zip(got, want, strict=True):
        assert relative_error(g_, w) <= bound(torch.bfloat16)


@untried
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_a_graphed_step_gives_the_same_bits(objective: dict[str, Any], masked: bool) -> None:
    """Several replays, on new tokens and weights that were written to, with other upstream gradients."""
    options = {"estimator": "sampled", **objective}
    batches = [large(few(200), 64, torch.bfloat16, seed) for seed in range(3)]
    weights = [m.weight for m in batches[0].models]

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *hidden, ids, live, scale = inputs
        heads = [fg.LinearHead(h, w) for h, w in zip(hidden, weights, strict=True)]
        out = fg.gopd_loss(*heads, ids, mask=live if masked else None, reward_scale=scale, **options)
        return out.loss, out.entropy

    def inputs_of(batch: Batch) -> tuple[torch.Tensor, ...]:
        live = torch.arange(few(200), device=DEVICE) % 3 < 2
        return *(m.hidden for m in batch.models), batch.token_ids, live, torch.full(live.shape, 1.25, device=DEVICE)

    examples = inputs_of(batches[0])
    graphed = fg.graphed(step, *examples, weights=weights) if GPU else Graphed(step, examples, (*weights,), Eager())
    for i, batch in enumerate(batches):
        leaves = (batch.student.hidden, weights[0])
        upstream = torch.tensor(1.0 + i, device=DEVICE)
        loss, entropy = graphed(*inputs_of(batch))
        grads = torch.autograd.grad(loss, leaves, upstream)
        with fixed_shapes():  # rows that are masked are emptied there, too
            want, want_entropy = step(*inputs_of(batch))
            want_grads = torch.autograd.grad(want, leaves, upstream)
        assert torch.equal(loss, want)
        assert torch.equal(entropy, want_entropy)
        assert all(map(torch.equal, grads, want_grads))
        with torch.no_grad():
            weights[0].mul_(1.01)


@untried
@needs_gpu
def test_a_graphed_step_states_its_memory_and_frees_it() -> None:
    batch = large(few(200), 64, torch.bfloat16)

    def step(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        teacher = fg.LinearHead(hidden, batch.teacher.weight)
        return fg.gopd_loss(fg.LinearHead(hidden, batch.student.weight), teacher, None, ids, estimator="full").loss

    weights = [batch.student.weight, batch.teacher.weight]
    graphed = fg.graphed(step, batch.student.hidden, batch.token_ids, weights=weights)
    graphed(batch.student.hidden, batch.token_ids).backward()
    pool = graphed.memory - sum(x.nbytes for x in graphed.inputs)
    assert pool >= 200 * VOCAB * 4 + batch.student.weight.nbytes  # a chunk's logits, and a gradient of the weight
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    del graphed
    gc.collect()
    torch.cuda.empty_cache()
    # cuBLAS keeps its workspaces, 32 MiB each at most, also those that it took during the capture
    assert before - torch.cuda.memory_reserved() >= pool - (64 << 20)


NEW_DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "alpha", "alpha": 0.5},
    {"divergence": "alpha", "alpha": -0.3},
    {"divergence": "skew_kl", "skew": 0.1},
    {"divergence": "skew_reverse_kl", "skew": 0.1},
    {"divergence": "mixed", "forward_weight": 0.3},
]


@untried
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", NEW_DIVERGENCES, ids=lambda o: " ".join(map(str, o.values())))
def test_the_newer_divergences_over_a_real_vocabulary(objective: dict[str, Any], dtype: torch.dtype) -> None:
    batch = large(few(300), 64, dtype)
    options = {"estimator": "full", "reward_scale": 1.25, **objective}
    out, got = run(batch, backend=BACKEND, chunk_size=128, **options)
    want_out, want = run(wide(batch), fg.reference.gopd_loss, **options)
    assert_close(out.token_loss, want_out.token_loss, TOLERANCE[torch.float32])
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= bound(dtype)


@untried
@needs_gpu
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_launches_through_kernels_that_are_kept_give_the_same_bits(
    objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = large(200, 64, torch.bfloat16)
    own = run(batch, reward_scale=1.25, **objective)
    monkeypatch.setattr(Launch, "hold", True)
    for _ in range(2):
        kept = run(batch, reward_scale=1.25, **objective)
        assert torch.equal(own[0].token_loss, kept[0].token_loss)
        assert all(map(torch.equal, own[1], kept[1]))


# ------------------------------------------------------------------------------------------- what has run on one before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
def test_same_as_the_reference(backend: str, reduction: str, objective: dict[str, Any], dtype: torch.dtype) -> None:
    batch = on_device(make_batch(3, shape=(5, 8), vocab=(1003, 1000, 1001), hidden=(64, 128, 72), dtype=dtype))
    # a sum, not a mean: float16 gradients below 6e-5 would have fewer digits than the bound is about
    upstream = torch.linspace(-1, 2, 40, device=DEVICE).reshape(5, 8) if reduction == "none" else None

    def gradients(b: Batch, function: Any, **more: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        out = function(*b.models, b.token_ids, mask=b.mask, reward_scale=1.25, reduction=reduction, **objective, **more)
        value = out.loss if upstream is None else (out.loss * upstream).sum()
        return out, torch.autograd.grad(value, b.leaves)

    out, got = gradients(batch, fg.gopd_loss, backend=backend, chunk_size=16)
    want_out, want = gradients(wide(batch), fg.reference.gopd_loss)
    # what is not rounded to the hidden states' dtype is as accurate as in float32
    assert_close(out.token_loss, want_out.token_loss, TOLERANCE[torch.float32])
    assert_close(out.student_logprobs, want_out.student_logprobs, TOLERANCE[torch.float32])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, w) <= bound(dtype)


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=OBJECTIVE_IDS[:4])
def test_a_real_vocabulary_in_several_chunks(objective: dict[str, Any]) -> None:
    batch = large(few(1100), 64, torch.bfloat16)
    out, got = run(batch, backend=BACKEND, reward_scale=1.25, chunk_size=512, **objective)
    want_out, want = run(wide(batch), fg.reference.gopd_loss, reward_scale=1.25, **objective)
    assert_close(out.token_loss, want_out.token_loss, TOLERANCE[torch.float32])
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= bound(torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_chunks_in_bfloat16_are_as_accurate_as_dense_code(objective: dict[str, Any]) -> None:
    """SPEC's rule: the error against float64 is at most that of the dense path in the same dtype."""
    batch = large(few(400), 256, torch.bfloat16)
    _, want = run(wide(batch), fg.reference.gopd_loss, reward_scale=1.25, **objective)
    _, got = run(batch, reward_scale=1.25, chunk_dtype=torch.bfloat16, **objective)
    student = trainable(batch.student)
    dense = [fg.Logits(m.hidden @ m.weight.T) for m in (student, batch.teacher, batch.ref)]
    loss = fg.reference.gopd_loss(*dense, batch.token_ids, reward_scale=1.25, **objective).loss
    naive = torch.autograd.grad(loss, (student.hidden, student.weight))
    for g, n, w in zip(got, naive, want, strict=True):
        assert relative_error(g, w) <= 1.05 * relative_error(n, w)


@pytest.mark.parametrize("hidden", [64, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probs_of_hidden_states(dtype: torch.dtype, hidden: int) -> None:
    """The kernel with the statistics in the epilogue of its own GEMM."""
    batch = large(few(300), hidden, dtype)
    with torch.no_grad():
        got, entropy = fg.token_logprobs(batch.student, batch.token_ids, return_entropy=True)
        h, w = batch.student.hidden.double(), batch.student.weight.double()
        logp = (h @ w.T).log_softmax(-1)
    assert_close(got, logp.gather(-1, batch.token_ids[:, None])[:, 0], TOLERANCE[torch.float32])
    assert_close(entropy, -(logp.exp() * logp).sum(-1), TOLERANCE[torch.float32])


@needs_gpu
def test_logits_past_two_to_the_31_elements() -> None:
    """Rows at the end of the tensors have the results that they have alone."""
    n = 2**31 // VOCAB + 70
    g = torch.Generator(DEVICE).manual_seed(1)
    logits = [torch.randn(n, VOCAB, generator=g, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    ids = torch.randint(VOCAB, (n,), generator=g, device=DEVICE)

    def call(rows: slice) -> tuple[fg.GOPDOutput, torch.Tensor]:
        student = logits[0][rows].requires_grad_()
        heads = [fg.Logits(x) for x in (student, *(x[rows] for x in logits[1:]))]
        out = fg.gopd_loss(*heads, ids[rows], estimator="full", reward_scale=1.25, reduction="sum")
        return out, torch.autograd.grad(out.loss, student)[0]

    out, grad = call(slice(None))
    last, last_grad = call(slice(n - 16, n))
    assert torch.equal(out.token_loss[-16:], last.token_loss)
    assert torch.equal(grad[-16:], last_grad)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_two_runs_give_the_same_bits(objective: dict[str, Any]) -> None:
    batch = large(few(600), 256, torch.bfloat16)
    first, second = (run(batch, reward_scale=1.25, **objective) for _ in range(2))
    assert torch.equal(first[0].token_loss, second[0].token_loss)
    assert all(map(torch.equal, first[1], second[1]))


@needs_gpu
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_compiled_gives_the_same_bits(estimator: str) -> None:
    batch = large(few(200), 64, torch.bfloat16)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        student = fg.LinearHead(hidden * 1, weight)
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, estimator=estimator).loss

    want = step(*batch.leaves)
    want_grads = torch.autograd.grad(want, batch.leaves)
    got = torch.compile(step, fullgraph=True)(*batch.leaves)
    grads = torch.autograd.grad(got, batch.leaves)
    assert torch.equal(got, want)
    assert all(map(torch.equal, grads, want_grads))


@needs_gpu
def test_peak_memory_does_not_grow_with_tokens() -> None:
    """Beyond inputs, results and the float32 sum of the weight's gradient: chunk buffers."""
    peaks = []
    for tokens in (4096, 8192):
        batch = large(tokens, 128, torch.bfloat16)
        run(batch, estimator="full", reward_scale=1.25)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, grads = run(batch, estimator="full", reward_scale=1.25)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads))
        del batch, grads
    assert max(peaks) < 2 << 30
    assert peaks[1] - peaks[0] < 8 << 20  # vectors of statistics


def test_a_shard_over_nccl() -> None:
    """One rank that holds the whole vocabulary: the collectives of the loss, by NCCL (on a CPU by gloo)."""
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        batch = large(few(300), 64, torch.bfloat16)
        shard = fg.VocabShard(None, 0, VOCAB)
        for objective in OBJECTIVES[:4]:
            want, want_grads = run(batch, reward_scale=1.25, **objective)
            student, teacher, ref = (fg.LinearHead(m.hidden, m.weight, shard=shard) for m in batch.models)
            shared = batch.replaced(student=student, teacher=teacher, ref=ref)
            out, grads = run(shared, reward_scale=1.25, **objective)
            assert_close(out.token_loss, want.token_loss, TOLERANCE[torch.float32])
            for g, w in zip(grads, want_grads, strict=True):
                assert relative_error(g, w) <= bound(torch.bfloat16)
    finally:
        dist.destroy_process_group()
