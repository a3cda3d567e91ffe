"""The work is what it claims: GEMMs counted, allocations seen, nothing copied or widened whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_gopd as fg
from builders import OBJECTIVES, like, linear_head, make_batch
from combinations import pairwise
from costs import GEMM, H, Memory, N, V, gemm_flops
from fused_gopd.loop import chunking, gemm
from fused_gopd.tokens import TokenRows

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32
SHAPE = {"shape": (N,), "vocab": (V,) * 3, "hidden": (H,) * 3, "dtype": F32}
sampled_and_full = pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=["sampled", "full"])
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=[" ".join(map(str, o.values())) for o in OBJECTIVES]
)


# ---------------------------------------------------------------------------------------------- the detectors detect


def test_the_counter_counts_the_dense_loss():
    """Dense: each model's logits once, and two products for the student's gradients: five."""
    batch = make_batch(0, masked=False, **SHAPE)
    dense = lambda: fg.reference.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25).loss.backward()  # noqa: E731
    assert gemm_flops(dense) == 5 * GEMM


def test_the_counter_reads_every_form_of_a_product():
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    forms = [lambda: a @ b, lambda: torch.mm(a, b, out=c), lambda: torch.addmm(c, a, b), lambda: c.addmm_(a, b)]
    for form in forms:
        assert gemm_flops(form) == 2 * 3 * 5 * 7


@torch.library.custom_op("fused_gopd_tests::hidden_allocation", mutates_args=())
def hidden_allocation(x: torch.Tensor) -> torch.Tensor:
    return (x.new_zeros(1000, 1000) + 1).sum()


def test_the_detector_sees_an_allocation_inside_a_custom_op():
    x = torch.ones(1)
    memory = Memory(lambda: hidden_allocation(x))
    assert memory.largest == 4_000_000
    assert memory.peak >= 8_000_000


def test_the_detector_sees_the_dense_loss():
    batch = make_batch(0, masked=False, **SHAPE)
    dense = Memory(lambda: fg.reference.gopd_loss(*batch.models, batch.token_ids, estimator="full").loss.backward())
    assert dense.largest == N * V * 4
    assert dense.peak > 5 * N * V * 4


# ------------------------------------------------------------------------------------------------------------- GEMMs


def loss_of(batch, backend, chunk_size=32, **options) -> Callable[[], Any]:
    def call():
        out = fg.gopd_loss(
            *batch.models, batch.token_ids, mask=batch.mask, backend=backend, chunk_size=chunk_size, **options
        )
        if out.loss.requires_grad:
            out.loss.sum().backward()

    call()  # first calls allocate caches
    return call


@every_objective
def test_three_models_cost_five_gemms(backend, objective):
    batch = make_batch(1, masked=False, **SHAPE)
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, **objective)) == 5 * GEMM


def test_the_other_library_costs_five_gemms_too(monkeypatch):
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, True))
    monkeypatch.setattr(gemm, "_ONEDNN_WORK", 0)
    monkeypatch.setattr(gemm, "_ONEDNN_DWEIGHT_ROWS", 0)
    batch = make_batch(1, masked=False, **SHAPE)
    assert gemm_flops(loss_of(batch, "torch", reward_scale=1.25, estimator="full")) == 5 * GEMM


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, lam=[0.0, 1.0])
def test_a_cancelled_model_costs_nothing(backend, objective, lam):
    batch = make_batch(2, masked=False, **SHAPE)
    assert gemm_flops(loss_of(batch, backend, reward_scale=lam, **objective)) == 4 * GEMM


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_scoring_a_cancelled_model_costs_its_forward(backend, lam):
    batch = make_batch(3, masked=False, **SHAPE)
    assert gemm_flops(loss_of(batch, backend, reward_scale=lam, score_cancelled=True)) == 5 * GEMM


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, frozen=["hidden", "weight"])
def test_a_frozen_tensor_saves_its_gemm(backend, objective, frozen):
    batch = make_batch(4, masked=False, **SHAPE)
    batch.student.tensors[frozen].requires_grad_(False)
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, **objective)) == 4 * GEMM


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, how=["no_grad", "frozen"])
def test_without_gradients_three_forwards_are_left(backend, objective, how):
    batch = make_batch(5, masked=False, **SHAPE)
    if how == "frozen":
        for tensor in batch.leaves:
            tensor.requires_grad_(False)
        assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, **objective)) == 3 * GEMM
    else:
        with torch.no_grad():
            assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, **objective)) == 3 * GEMM


@pairwise(backend=["torch", "native"], objective=OBJECTIVES[:2], live=[0, 1, 24, 95])
def test_work_is_proportional_to_the_live_rows(backend, objective, live):
    batch = make_batch(6, masked=False, **SHAPE)
    batch.mask = torch.zeros(N, dtype=torch.bool)
    batch.mask[torch.randperm(N)[:live]] = True
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, **objective)) == 5 * GEMM * live // N


@pytest.mark.parametrize(("objective", "recomputed"), [(OBJECTIVES[0], 1), (OBJECTIVES[1], 3)], ids=["sampled", "full"])
def test_reduction_none_recomputes_the_logits_it_needs(backend, objective, recomputed):
    """sampled: the student's again (the others are two numbers per token); full: all three models' again."""
    batch = make_batch(7, masked=False, **SHAPE)
    flops = gemm_flops(loss_of(batch, backend, reward_scale=1.25, reduction="none", **objective))
    assert flops == (5 + recomputed) * GEMM


def test_scores_computed_elsewhere_cost_no_gemm(backend):
    batch = make_batch(8, kinds=("linear", "logprobs", "logprobs"), masked=False, **SHAPE)
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25)) == 3 * GEMM


def test_logits_cost_no_gemm(backend):
    for dtype in (F32, torch.bfloat16):
        batch = make_batch(9, kinds=("logits",) * 3, masked=False, **{**SHAPE, "dtype": dtype})
        assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, estimator="full")) == 0


def test_gemms_follow_each_models_hidden_size(backend):
    batch = make_batch(10, masked=False, **{**SHAPE, "hidden": (16, 48, 8)})
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25)) == 2 * N * V * (3 * 16 + 48 + 8)


def test_only_the_joint_vocabulary_is_multiplied(backend):
    batch = make_batch(11, masked=False, **{**SHAPE, "vocab": (V + 100, V, V + 40)})
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25)) == 5 * GEMM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_costs_the_same_products(backend, dtype):
    batch = make_batch(12, masked=False, **{**SHAPE, "dtype": dtype})
    assert gemm_flops(loss_of(batch, backend, reward_scale=1.25, estimator="full")) == 5 * GEMM


def test_a_second_backward_pays_for_itself_alone(backend):
    """Not kept: the gradients of the first. The first backward costs nothing, the second a whole pass."""
    batch = make_batch(13, masked=False, **SHAPE)
    out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, backend=backend)
    assert gemm_flops(lambda: out.loss.backward(retain_graph=True)) == 0
    assert gemm_flops(lambda: out.loss.backward()) == 5 * GEMM


def test_token_logprobs_is_one_gemm_and_three_more_with_gradients(backend):
    batch = make_batch(14, masked=False, **SHAPE)
    with torch.no_grad():
        assert gemm_flops(lambda: fg.token_logprobs(batch.student, batch.token_ids, backend=backend)) == GEMM
    scored = fg.token_logprobs(batch.student, batch.token_ids, backend=backend)
    assert gemm_flops(lambda: scored.sum().backward()) == 3 * GEMM


# ------------------------------------------------------------------------------------------------------------ memory

# Long and narrow against the chunk: a chunk buffer is C * V = N * V / 32.
TOKENS, HIDDEN, VOCAB, CHUNK = 512, 8, 2048, 16
DENSE = TOKENS * VOCAB * 4
BUFFER = CHUNK * VOCAB * 4


def big_batch(kinds=("linear",) * 3, dtype=F32, masked=False):
    return make_batch(
        15, shape=(TOKENS,), vocab=(VOCAB,) * 3, hidden=(HIDDEN,) * 3, kinds=kinds, dtype=dtype, masked=masked
    )


@pairwise(
    backend=["torch", "native"], objective=OBJECTIVES, dtype=[F32, torch.bfloat16], reduction=["token-mean", "none"]
)
def test_no_allocation_of_all_logits_and_no_growth_with_tokens(backend, objective, dtype, reduction):
    batch = big_batch(dtype=dtype, masked=True)
    memory = Memory(loss_of(batch, backend, CHUNK, reward_scale=1.25, reduction=reduction, **objective))
    assert memory.largest <= BUFFER  # nothing is larger than the logits of one chunk
    weight = VOCAB * HIDDEN * 4
    gradients = 2 * (weight + TOKENS * HIDDEN * 4)  # each once as it is summed and once as .grad takes it
    vectors = 60 * TOKENS * 8  # statistics, ids, outputs: 14 statistics twice, a dozen outputs
    # chunk buffers of three models, and the torch backend's row temporaries (a dozen of a chunk or 4 MiB, if smaller)
    temporaries = 20 * BUFFER if backend == "torch" else 0
    assert memory.peak <= 3 * BUFFER + gradients + vectors + temporaries
    assert memory.peak < DENSE


@every_objective
def test_twice_the_tokens_need_no_more_chunk_memory(backend, objective):
    peaks = []
    for tokens in (TOKENS // 2, TOKENS):
        batch = make_batch(16, shape=(tokens,), vocab=(VOCAB,) * 3, hidden=(HIDDEN,) * 3, dtype=F32, masked=False)
        peaks.append(Memory(loss_of(batch, backend, CHUNK, reward_scale=1.25, **objective)).peak)
    # what a token adds: its hidden gradient twice, statistics and outputs: far below its 8 KiB of logits
    assert peaks[1] - peaks[0] <= TOKENS // 2 * (2 * HIDDEN * 4 + 60 * 8)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@sampled_and_full
def test_the_gradient_of_given_logits_is_the_only_tensor_of_their_size(backend, objective, dtype):
    batch = big_batch(kinds=("logits",) * 3, dtype=dtype)
    memory = Memory(loss_of(batch, backend, reward_scale=1.25, **objective))
    size = TOKENS * VOCAB * dtype.itemsize
    assert memory.largest == size  # the gradient itself, in its own dtype: no float32 copy of all logits
    temporaries = 20 * BUFFER if backend == "torch" else 0
    assert memory.peak <= size + temporaries + 60 * TOKENS * 8


def test_the_live_tokens_of_given_logits_are_copied_a_chunk_at_a_time(backend):
    """The copy of one chunk is not kept while the next one is made."""
    if backend == "torch":
        pytest.skip("its row temporaries are larger")
    tokens = 4 * CHUNK
    batch = make_batch(15, shape=(tokens,), vocab=(VOCAB,) * 3, kinds=("logits",) * 3, dtype=F32)

    def score():
        with torch.no_grad():
            fg.token_logprobs(batch.student, batch.token_ids, mask=batch.mask, chunk_size=CHUNK, backend=backend)

    score()  # first calls allocate caches
    assert Memory(score).peak <= BUFFER + 60 * tokens * 8


@sampled_and_full
def test_a_low_precision_weight_is_never_widened_whole(backend, objective):
    """H is large here: V x H in float32 would be the largest tensor of all, unless it is the gradient's accumulator."""
    batch = make_batch(17, shape=(32,), vocab=(4096,) * 3, hidden=(1024,) * 3, dtype=torch.bfloat16, masked=False)
    batch.student.weight.requires_grad_(False)
    whole = 4096 * 1024 * 4
    memory = Memory(loss_of(batch, backend, reward_scale=1.25, **objective))
    assert memory.largest <= whole // 4
    batch.student.weight.requires_grad_(True)
    trained = Memory(loss_of(batch, backend, reward_scale=1.25, **objective))
    # the accumulator and its rounded copy
    assert trained.largest == whole
    assert trained.peak <= memory.peak + whole + whole // 2


@sampled_and_full
def test_a_frozen_weight_needs_no_accumulator(backend, objective):
    batch = make_batch(18, shape=(8,), vocab=(4096,) * 3, hidden=(256,) * 3, dtype=F32, masked=False)
    batch.student.weight.requires_grad_(False)
    memory = Memory(loss_of(batch, backend, reward_scale=1.25, **objective))
    assert memory.largest < 4096 * 256 * 4


def test_a_backward_needs_no_second_copy_of_the_gradients(backend):
    """The forward's buffers are handed out, scaled in place, also by an upstream gradient that is not 1."""
    batch = make_batch(19, shape=(8,), vocab=(4096,) * 3, hidden=(256,) * 3, dtype=F32, masked=False)
    out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, backend=backend)
    memory = Memory(lambda: (out.loss * 3.0).backward())
    assert memory.peak < 4096 * 256 * 4 / 100


@sampled_and_full
def test_a_shifted_view_of_the_hidden_states_is_not_copied_whole(backend, objective):
    """hidden[:, :-1] is not contiguous: only a chunk of it may be copied."""
    hidden, tokens = 2048, 256
    heads = [linear_head(i, (4, tokens + 1), 64, hidden, F32) for i in range(3)]
    heads = [like(h, hidden=h.hidden[:, :-1]) for h in heads]
    ids = torch.zeros(4, tokens, dtype=torch.long)

    def call():
        fg.gopd_loss(*heads, ids, reward_scale=1.25, backend=backend, chunk_size=32, **objective)

    call()
    assert Memory(call).largest <= 32 * hidden * 4


def test_live_rows_of_a_contiguous_tensor_are_views():
    x = torch.randn(4, 8, 16)
    rows = TokenRows(x.shape[:2])
    memory = [rows.take(x, i, i + 8).untyped_storage().data_ptr() for i in range(0, 32, 8)]
    assert set(memory) == {x.untyped_storage().data_ptr()}


def test_the_automatic_chunk_keeps_to_the_budget(backend, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_BUDGET_BYTES, "cpu", 3 * 64 * VOCAB * 4)
    monkeypatch.setitem(chunking.ENOUGH_TOKENS, "cpu", 64)
    batch = big_batch()
    call = lambda: fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, estimator="full", backend=backend)  # noqa: E731
    call()
    assert Memory(call).largest == 64 * VOCAB * 4
