"""The memory plan and the selection of live rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
from builders import OBJECTIVES, TOLERANCE, Batch, assert_all_close, assert_close, generator, make_batch, widened
from fused_gopd import plan
from fused_gopd.loop import chunking, memory
from fused_gopd.loop.logit_gradient import power_of_two
from fused_gopd.options import LossCall, LossOptions
from fused_gopd.prepare import prepare
from fused_gopd.rowops.torch import TorchRowOps
from fused_gopd.tokens import TokenRows

SIZES = st.integers(1, 300_000)


def most_bytes(kind, vocab, buffers):
    """The budget, or what so many tokens as are enough take: at most twice as much."""
    budget, enough = chunking.CHUNK_BUDGET_BYTES[kind], chunking.ENOUGH_TOKENS[kind]
    return max(budget, min(2 * budget, enough * buffers * vocab * 4))


@given(vocab=SIZES, buffers=st.integers(1, 3), device=st.sampled_from(["cpu", "cuda"]))
def test_chunk_buffers_fit_the_budget_unless_the_floor_forbids(vocab, buffers, device):
    kind = "cpu" if device == "cpu" else "gpu"
    chunk = chunking.chunk_size_for(vocab, buffers, device)
    floor = chunking.CHUNK_FLOOR[kind]
    assert floor <= chunk <= chunking.CHUNK_CEILING
    assert chunk == floor or chunk * buffers * vocab * 4 <= most_bytes(kind, vocab, buffers)


@pytest.mark.parametrize(
    ("vocab", "buffers", "tokens", "mebibytes"),
    [
        (151_936, 1, 432, 250),  # more than enough in the budget
        (151_936, 2, 256, 297),  # enough, in more than the budget
        (151_936, 3, 256, 445),
        (262_144, 3, 160, 480),  # as many as fit in twice the budget
        (32_768, 3, 672, 252),
    ],
)
def test_a_cpu_has_enough_tokens_in_a_chunk_within_twice_the_budget(vocab, buffers, tokens, mebibytes):
    assert chunking.chunk_size_for(vocab, buffers, "cpu") == tokens
    assert round(tokens * buffers * vocab * 4 / 2**20) == mebibytes


def test_wider_elements_make_smaller_chunks():
    assert chunking.chunk_size_for(150_000, 1, "cpu", 8) < chunking.chunk_size_for(150_000, 1, "cpu", 4)


@given(rows=st.integers(1, 20_000), chunk=st.integers(1, 9000), device=st.sampled_from(["cpu", "cuda"]))
def test_balanced_chunks_are_as_many_and_never_larger(rows, chunk, device):
    even = chunking.balanced(rows, chunk, device)
    assert 1 <= even <= chunk
    assert -(-rows // even) <= -(-rows // chunk)  # no chunk more
    assert even * (-(-rows // even)) - rows < even  # and all but the last are full


@given(vocab=SIZES, models=st.integers(2, 3), device=st.sampled_from(["cpu", "cuda"]))
def test_a_joint_chunk_with_its_parts_of_the_others_fits_the_budget(vocab, models, device):
    kind = "cpu" if device == "cpu" else "gpu"
    chunk = chunking.chunk_size_for(vocab, chunking.logits_buffers(True, models, device_type=device), device)
    others = chunking.frozen_chunk_size(chunk, device)
    assert 0 < others <= chunk
    # a part is rounded up to a whole tile
    rounding = (models - 1) * chunking._CHUNK_MULTIPLE[kind] * vocab * 4
    most = most_bytes(kind, vocab, chunking.logits_buffers(True, models, device_type=device))
    fits = (chunk + (models - 1) * others) * vocab * 4 <= most + rounding
    assert fits or chunk == chunking.CHUNK_FLOOR[kind]


def test_the_full_estimator_holds_all_models_and_the_sampled_one_at_a_time():
    assert chunking.logits_buffers(True, 3) == 3
    assert chunking.logits_buffers(True, 3, device_type="cuda") == 1.5
    assert chunking.logits_buffers(True, 2, weight_gradient=False, device_type="cuda") == 2
    assert chunking.logits_buffers(False, 3) == 1
    assert chunking.logits_buffers(False, 0) == 0


FULL = [o for o in OBJECTIVES if o["estimator"] == "full"]
IN_PARTS = pytest.mark.parametrize("objective", FULL, ids=[" ".join(map(str, o.values())) for o in FULL])


@pytest.fixture
def in_parts(monkeypatch):
    """As on a GPU: teacher and reference a fourth of a chunk at a time, here 7 tokens of 28."""
    monkeypatch.setitem(chunking.FROZEN_CHUNK_DIVISOR, "cpu", 4)
    monkeypatch.setitem(chunking._CHUNK_MULTIPLE, "cpu", 1)
    assert chunking.frozen_chunk_size(28, "cpu") == 7


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
@IN_PARTS
def test_parts_of_a_chunk_are_what_the_dense_loss_makes_of_it(objective, labelled, reduction):
    batch = make_batch(11, shape=(5, 13), vocab=(211,) * 3, hidden=(16, 24, 8), dtype=torch.float32)
    upstream = torch.linspace(-1, 2, 65).reshape(5, 13)
    options = {"reward_scale": 1.25, "reduction": reduction, **objective}
    if labelled:
        options |= {"sft_labels": batch.token_ids.roll(1, -1), "sft_weight": 0.3}

    def solved(function, batch, **more):
        out = function(*batch.models, batch.token_ids, mask=batch.mask, **options, **more)
        total = out.loss if out.loss.ndim == 0 else (out.loss * upstream).sum()
        return [out.token_loss, *torch.autograd.grad(total, batch.leaves)]

    wide = Batch(*map(widened, batch.models), batch.token_ids, batch.mask)
    got, want = solved(fg.gopd_loss, batch, chunk_size=28), solved(fg.reference.gopd_loss, wide)
    assert_all_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.usefixtures("in_parts")
@IN_PARTS
def test_parts_have_the_same_bits_without_gradients(objective):
    batch = make_batch(12, shape=(65,), vocab=(211,) * 3, hidden=(16, 24, 8), dtype=torch.float32)
    call = lambda: fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, chunk_size=28, **objective)  # noqa: E731
    out = call()
    with torch.no_grad():
        assert torch.equal(call().token_loss, out.token_loss)


@pytest.mark.usefixtures("in_parts")
def test_only_the_student_has_the_logits_of_a_whole_chunk(monkeypatch):
    taken = []
    empty = memory.empty

    def counted(shape, *more):
        taken.append(tuple(shape))
        return empty(shape, *more)

    monkeypatch.setattr(memory, "empty", counted)
    batch = make_batch(13, shape=(56,), vocab=(208,) * 3, hidden=(16, 24, 8), dtype=torch.float32, masked=False)
    fg.gopd_loss(*batch.models, batch.token_ids, estimator="full", reward_scale=1.25, chunk_size=28)
    assert sorted(rows for rows, width in taken if width == 208) == [7, 7, 28]


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_has_no_parts(frozen, compiled, monkeypatch):
    """Parts are there to read and write the weight's gradient less often: where there is none, chunks are whole."""
    lengths = []
    statistics_and_gradient = TorchRowOps.statistics_and_gradient

    def counted(self, problem, *more, **options):
        lengths.append(problem.rows)
        return statistics_and_gradient(self, problem, *more, **options)

    monkeypatch.setattr(TorchRowOps, "statistics_and_gradient", counted)
    batch = make_batch(13, shape=(56,), vocab=(208,) * 3, hidden=(16, 24, 8), dtype=torch.float32, masked=False)
    weight = batch.student.weight.detach() if frozen else batch.student.weight
    student = fg.LinearHead(batch.student.hidden, weight)

    def loss(hidden):
        options = {"estimator": "full", "reward_scale": 1.25, "chunk_size": 28, "backend": "torch"}
        return fg.gopd_loss(replace(student, hidden=hidden), batch.teacher, batch.ref, batch.token_ids, **options).loss

    (torch.compile(loss, backend="aot_eager") if compiled else loss)(student.hidden)
    assert lengths == ([28, 28] if frozen else [7] * 8)


@pytest.mark.parametrize(("frozen", "sizes"), [(False, (2048, 512)), (True, (1024, None))])
def test_the_default_sizes_on_a_gpu_with_a_frozen_head(frozen, sizes):
    heads = [fg.LinearHead(*(torch.empty(n, 8, device="meta") for n in (4096, 151_936))) for _ in range(3)]
    heads[0].weight.requires_grad_(not frozen)
    call = LossCall(*heads, estimator="full", reward_scale=1.25, backend="torch")
    problem = prepare(call)
    assert (problem.chunk_size, problem.frozen_chunk_size) == sizes


def test_all_live_rows_of_a_contiguous_tensor_are_a_view():
    x = torch.randn(3, 4, 5)
    got = TokenRows(x.shape[:2]).take(x, 2, 9)
    assert got.data_ptr() == x[0, 2].data_ptr()
    assert torch.equal(got, x.view(12, 5)[2:9])


@pytest.mark.parametrize("index", [None, [0, 3, 4, 10]])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("trailing", [(), (5,)])
def test_rows_are_taken_in_token_order_whatever_the_layout(index, layout, trailing):
    g = generator(0)
    x = {
        "contiguous": lambda: torch.randn(3, 4, *trailing, generator=g),
        "sliced": lambda: torch.randn(3, 6, *trailing, generator=g)[:, 1:5],
        "transposed": lambda: torch.randn(4, 3, *trailing, generator=g).transpose(0, 1),
        "expanded": lambda: torch.randn(3, 1, *trailing, generator=g).expand(3, 4, *trailing),
    }[layout]()
    rows = TokenRows(x.shape[:2], None if index is None else torch.tensor(index))
    every = x.reshape(12, *trailing)
    every = every if index is None else every[index]
    assert torch.equal(rows.take(x), every)
    assert torch.equal(rows.take(x, 1, 3), every[1:3])


def test_put_and_scatter_are_the_inverse_of_take():
    rows = TokenRows(torch.Size((2, 3)), torch.tensor([1, 4]))
    out = torch.zeros(6, 2)
    rows.put(out, torch.ones(1, 2), 1, 2)
    assert out.sum() == 2
    assert (out[4] == 1).all()
    values = torch.tensor([5.0, 7.0], requires_grad=True)
    spread = rows.scatter(values)
    assert spread.tolist() == [[0, 5, 0], [0, 7, 0]]
    (g,) = torch.autograd.grad((spread * torch.arange(6.0).reshape(2, 3)).sum(), values)
    assert g.tolist() == [1, 4]


@given(x=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=5))
def test_the_shared_scale_is_a_power_of_two_just_above_the_largest(x):
    values = torch.tensor(x, dtype=torch.float32)
    scale = float(power_of_two(values))
    largest = float(values.abs().max())
    mantissa = torch.frexp(torch.tensor(scale, dtype=torch.float64)).mantissa
    assert mantissa == 0.5
    if largest > 1e-30:
        assert scale / 2 <= largest <= scale


@pytest.mark.parametrize("x", [[0.0], [float("inf")], [float("nan")]])
def test_the_shared_scale_of_nothing_useful_is_one(x):
    assert power_of_two(torch.tensor(x)) == 1


def test_a_power_of_two_divides_exactly():
    values = torch.rand(50, generator=generator(1)) * 1e-5
    scale = power_of_two(values)
    assert torch.equal(values / scale * scale, values)
    assert_close((values / scale).amax(), torch.tensor(0.75), 0.34)  # between 1/2 and 1


@pytest.mark.parametrize("library", [True, False])
def test_stored_exponentials_have_two_bytes_where_the_library_multiplies_them(library, monkeypatch):
    monkeypatch.setattr(plan, "accumulates_low_precision", lambda _: library)
    head = fg.LinearHead(
        torch.empty(8192, 8, dtype=torch.bfloat16, device="meta"),
        torch.empty(151936, 8, dtype=torch.bfloat16, device="meta"),
    )
    sizes = [
        plan.chunk_sizes(head, {}, LossOptions(store_exponentials=stored), 151936, torch.float32, True)[0]
        for stored in (True, False)
    ]
    assert sizes == ([4864, 3072] if library else [3072, 3072])
