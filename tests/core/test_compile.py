"""torch.compile(fullgraph=True): the same bits, few compilations, the same errors, and opcheck of the ops."""

from __future__ import annotations

import dataclasses
import inspect
import shutil

import pytest
import torch
from torch import nn

import fused_gopd as fg
from builders import OBJECTIVES, generator, like, linear_head, make_batch, trainable
from fused_gopd import compiled
from fused_gopd.loop import run
from fused_gopd.objective.layout import STATISTICS

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
FULL = {"estimator": "full", "reward_scale": 1.25}


@pytest.fixture
def fresh():
    """No graphs of earlier tests: they count towards the limit of compilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """The backend aot_eager, and how often it was called."""

    def __init__(self):
        self.compilations = 0

    def __call__(self, graph, inputs):
        self.compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def full_graph(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def equal(a, b):
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def assert_same_output(got, want):
    for field in dataclasses.fields(want):
        assert equal(getattr(got, field.name), getattr(want, field.name)), field.name


def assert_same_bits(batch, *, upstream=None, **options):
    """Every field of the output and every gradient, compiled and not."""

    def call(student, teacher, ref, token_ids, mask):
        return fg.gopd_loss(student, teacher, ref, token_ids, mask=mask, **options)

    def run(function):
        out = function(*batch.models, batch.token_ids, batch.mask)
        if not batch.leaves:
            return out, ()
        loss = out.loss.sum() if upstream is None else (out.loss * upstream).sum()
        return out, torch.autograd.grad(loss, batch.leaves)

    want, want_grads = run(call)
    got, grads = run(full_graph(call))
    assert_same_output(got, want)
    assert not any(x.requires_grad for x in vars(got).values() if isinstance(x, torch.Tensor) and x is not got.loss)
    assert got.loss.requires_grad == want.loss.requires_grad
    assert all(map(equal, grads, want_grads))


# -------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_compiled_and_eager_give_the_same_bits(objective, reduction):
    assert_same_bits(make_batch(1, dtype=torch.float32), reduction=reduction, reward_scale=1.25, **objective)


STUDENTS = {
    "bias, softcap": {"transforms": [{"bias": True, "softcap": 6.0, "temperature": 0.8, "logit_scale": 0.5}, {}, {}]},
    "logits": {"kinds": ("logits", "linear", "logits")},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float16 logits": {"dtype": torch.float16, "kinds": ("logits", "linear", "linear")},
    "float64": {"dtype": torch.float64},
    "three vocabularies": {"vocab": (37, 41, 53)},
    "unmasked": {"masked": False},
    "one dimension": {"shape": (7,)},
    "no dimension": {"shape": (), "masked": False},
    "no token": {"shape": (0,), "masked": False},
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("objective", [{"estimator": "sampled"}, {"estimator": "full"}], ids=lambda x: x["estimator"])
def test_the_same_bits_of_every_student(student, objective):
    batch = make_batch(2, **{"dtype": torch.float32, **student})
    # an upstream gradient of a loss scaler's
    assert_same_bits(batch, upstream=1024.0, reward_scale=1.25, **objective)


def vector(seed, shape=(2, 5), scale=1.0):
    return torch.randn(shape, generator=generator(seed)) * scale


OLD = {"old_logprobs": vector(1).sub(3)}
ROLLOUT = {"rollout_logprobs": vector(2).sub(3)}
OPTIONS = {
    "lambda 1": {"reward_scale": 1.0},
    "lambda 0": {"reward_scale": 0.0},
    "lambda 1, scored": {"reward_scale": 1.0, "score_cancelled": True},
    "lambda per token": {"reward_scale": vector(3).abs()},
    "lambda per sequence": {**FULL, "reward_scale": torch.tensor([0.5, 1.25])},
    "clip": {**OLD, "clip": (0.2, 0.28), "clip_dual": 3.0},
    "clip, none": {**OLD, "clip": [0.2, 0.28], "reduction": "none"},
    "ratio": {**OLD, "ratio": "sequence", "clip": (0.2, 0.28)},
    "rollout": {**OLD, **ROLLOUT, "rollout_is_cap": 2.0},
    "rollout of sequences": {**ROLLOUT, "rollout_is": "sequence", "rollout_is_cap": (0.5, 2.0)},
    "rollout mask, full": {**FULL, **ROLLOUT, "rollout_mask": {"token_k3": (None, 0.5)}, "loss_max": 3},
    "rollout, topk": {"estimator": "topk", "k": 4, **OLD, **ROLLOUT, "rollout_mask": {"geometric_ratio": (0.5, None)}},
    "trust region": {**ROLLOUT, "trust_region": {"token_difference": [-0.02, 0.02]}},
    "detached": {**OLD, "ratio": "detached", "clip": (0.2, 0.28), "advantage_policy": "current"},
    "sequence-mean": {**OLD, "ratio": "sequence-mean", "clip": (0.2, 0.28), "log_ratio_max": 20.0},
    "bounds": {"advantage_clip": (-1.0, 2.0), "logprob_min": -4.0, "reward_scale": 1.25},
    "baseline": {"baseline": "expected", "reward_scale": 1.25},
    "labels": {**FULL, "sft_labels": torch.randint(-1, 37, (2, 5), generator=generator(4)) - 0, "sft_weight": 0.3},
    "labels, topk": {"estimator": "topk", "k": 4, "reduction": "none"},
    "topk of ids": {"estimator": "topk", "support_ids": torch.randint(-1, 30, (2, 5, 4), generator=generator(5))},
    "topk and the sampled token": {"estimator": "topk", "k": 4, "tail": "sampled"},
    "topk, bounds": {"estimator": "topk", "k": 4, "tail": "drop", "logprob_min": -5.0, "student_logprob_min": -3.0},
    "no support": {"estimator": "topk", "k": 0, "tail": "sampled", "reduction": "none"},
    "vocabulary": {**FULL, "vocab_size": 30},
    "normalizer": {"normalizer": 17},
    "normalizer tensor": {"normalizer": torch.tensor(17), "reduction": "seq-mean-token-sum"},
    "lengths": {"reduction": "seq-mean-token-mean", "sequence_lengths": torch.tensor([9, 3])},
    "weights": {**FULL, "token_weight": vector(5).abs()},
    "weights, none": {"token_weight": torch.tensor([0.0, 3.0]), "reduction": "none"},
    "chunks": {**FULL, "chunk_size": 2},
    "grad_filter": {**FULL, "grad_filter": 1e-3},
    "torch": {**FULL, "backend": "torch"},
}
_labels = OPTIONS["labels"]["sft_labels"]
OPTIONS["labels"]["sft_labels"] = OPTIONS["labels, topk"]["sft_labels"] = _labels.masked_fill(_labels < 0, -100)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bits_with_every_option(options):
    batch = make_batch(3, dtype=torch.float32)
    batch.token_ids.clamp_(max=29)
    assert_same_bits(batch, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_a_mask_of_numbers(dtype):
    batch = make_batch(4, dtype=torch.float32)
    assert_same_bits(batch.replaced(mask=batch.mask.to(dtype)), **FULL)


def test_nothing_live():
    batch = make_batch(4, dtype=torch.float32)
    for reduction in ("token-mean", "none"):
        torch._dynamo.reset()
        assert_same_bits(batch.replaced(mask=torch.zeros_like(batch.mask)), reduction=reduction, **FULL)


def test_without_token_ids():
    assert_same_bits(make_batch(5, dtype=torch.float32).replaced(token_ids=None), **FULL)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "none"])
def test_packed_sequences(reduction):
    batch = make_batch(6, shape=(12,), dtype=torch.float32)
    bounds = torch.tensor([0, 4, 4, 9, 12], dtype=torch.int32)
    assert_same_bits(batch, reduction=reduction, cu_seqlens=bounds, **FULL)


@pytest.mark.parametrize("options", [{}, FULL, {"estimator": "topk", "k": 4}], ids=["sampled", "full", "topk"])
def test_several_teachers(options):
    batch = make_batch(7, dtype=torch.float32)
    other = linear_head(70, (2, 5), 37, 9, torch.float32)
    route = torch.randint(0, 2, (2, 5), generator=generator(7))
    assert_same_bits(batch.replaced(teacher=[batch.teacher, other]), teacher_index=route, **options)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25])
def test_scores_from_a_server(reduction, scale):
    batch = make_batch(8, dtype=torch.float32)
    teacher = fg.TopKLogProbs(*fg.token_topk(batch.teacher, 4))
    ref = fg.TopKLogProbs(*fg.token_topk(batch.ref, 37))
    options = {"estimator": "topk", "reduction": reduction, "reward_scale": scale}
    assert_same_bits(batch.replaced(teacher=teacher, ref=ref), **options)
    with_sampled = {
        name: fg.TopKLogProbs(x.token_ids, x.logprobs, fg.token_logprobs(getattr(batch, name), batch.token_ids))
        for name, x in (("teacher", teacher), ("ref", ref))
    }
    assert_same_bits(batch.replaced(**with_sampled), tail="sampled", **options)


@pytest.mark.parametrize("teacher", ["logprobs", "linear"])
def test_token_logprobs_from_a_server(teacher):
    batch = make_batch(9, dtype=torch.float32, kinds=("linear", teacher, "logprobs"))
    assert_same_bits(batch, reward_scale=1.25)


@pytest.mark.parametrize("fields", [("hidden",), ("weight",), ("hidden", "bias"), ()], ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_frozen_tensors(fields, reduction):
    batch = make_batch(10, dtype=torch.float32, transforms=[{"bias": True}, {}, {}])
    for name, tensor in batch.student.tensors.items():
        tensor.requires_grad_(name in fields)
    assert_same_bits(batch, reduction=reduction, **FULL)


def test_without_gradients():
    batch = make_batch(11, dtype=torch.float32)

    def loss(student, token_ids):
        return fg.gopd_loss(student, batch.teacher, batch.ref, token_ids, mask=batch.mask, **FULL).loss

    with torch.no_grad():
        assert torch.equal(full_graph(loss)(batch.student, batch.token_ids), loss(batch.student, batch.token_ids))
    want = loss(batch.student, batch.token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full_graph(loss)(batch.student, batch.token_ids), want)


def test_a_teacher_from_inference_mode():
    batch = make_batch(12, dtype=torch.float32)
    with torch.inference_mode():
        teacher = like(batch.teacher, **{k: x.clone() for k, x in batch.teacher.tensors.items()})
    assert_same_bits(batch.replaced(teacher=teacher), **FULL)


class Model(nn.Module):
    """A language model that ends in the loss.

    All before the loss is exact or a GEMM: a compiler has other bits for a tanh, or for the sum of a bias's gradient.
    """

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(37, 12), nn.Linear(12, 12, bias=False)
        self.teacher, self.head = nn.Linear(12, 41, bias=False).requires_grad_(False), nn.Linear(12, 37)
        self.loss = fg.GOPDLoss(**options)

    def forward(self, token_ids, mask, **batch):
        embedded = self.embed(token_ids)
        hidden = torch.relu(self.body(embedded))[:, :-1]
        student = fg.LinearHead(hidden, self.head.weight, self.head.bias, softcap=30.0)
        teacher = fg.LinearHead(embedded.detach()[:, :-1], self.teacher.weight)
        return self.loss(student, teacher, None, token_ids[:, 1:], mask=mask[:, 1:], **batch)


@pytest.mark.parametrize("options", [{"estimator": "sampled"}, {"estimator": "full", "reduction": "none"}], ids=str)
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++")),
    ],
)
def test_a_model_that_ends_in_the_loss(backend, options):
    batch = make_batch(13, shape=(2, 6))
    model = Model(**options)

    def step(function):
        model.zero_grad()
        out = function(batch.token_ids, batch.mask)
        out.loss.sum().backward()
        return out, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    want, want_grads = step(model)
    got, grads = step(full_graph(model, backend))
    assert_same_output(got, want)
    assert all(map(torch.equal, grads, want_grads))


def test_metrics_in_the_graph():
    batch = make_batch(14, dtype=torch.float32)

    def metrics(student):
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask, **FULL).metrics()

    got, want = full_graph(metrics)(batch.student), metrics(batch.student)
    assert list(got) == list(want)
    assert torch.equal(got.sums, want.sums)
    assert torch.equal(full_graph(lambda s: metrics(s)["kl_target"])(batch.student), want["kl_target"])


# --------------------------------------------------------------------------------------------------- one model's scores


@pytest.mark.parametrize("student", [{}, {"kinds": ("logits", "linear", "linear")}], ids=["linear", "logits"])
def test_token_logprobs_and_entropy(student):
    batch = make_batch(15, dtype=torch.float32, transforms=[{"softcap": 5.0}, {}, {}], **student)

    def score(head, token_ids, mask):
        return fg.token_logprobs(head, token_ids, mask=mask, return_entropy=True)

    def run(function):
        logprobs, entropy = function(batch.student, batch.token_ids, batch.mask)
        weights = vector(15)
        return logprobs, entropy, *torch.autograd.grad(((logprobs - 0.1 * entropy) * weights).sum(), batch.leaves)

    assert all(map(equal, run(full_graph(score)), run(score)))


def test_token_logprobs_alone():
    batch = make_batch(16, dtype=torch.float32)

    def loss(head):
        return -(fg.token_logprobs(head, batch.token_ids, mask=batch.mask) * 2).sum()

    want, got = loss(batch.student), full_graph(loss)(batch.student)
    assert torch.equal(got, want)
    assert all(map(equal, torch.autograd.grad(got, batch.leaves), torch.autograd.grad(want, batch.leaves)))


@pytest.mark.parametrize("masked", [False, True])
def test_selected_logprobs(masked):
    batch = make_batch(16, dtype=torch.float32)
    ids = torch.randint(-1, 37, (2, 5, 7), generator=generator(16))
    mask = batch.mask if masked else None

    def run(function):
        logprobs = function(batch.student, ids, mask=mask)
        return logprobs, *torch.autograd.grad((logprobs * vector(15)[..., None]).sum(), batch.leaves)

    assert all(map(equal, run(full_graph(fg.selected_logprobs)), run(fg.selected_logprobs)))


def test_token_topk():
    batch = make_batch(17, dtype=torch.float32)

    def top(head, mask):
        return fg.token_topk(head, 4, mask=mask)

    assert all(map(equal, full_graph(top)(batch.student, batch.mask), top(batch.student, batch.mask)))


# ------------------------------------------------------------------------------------------- work, memory, compilations


def test_gradients_are_computed_in_the_forward_and_never_twice(monkeypatch):
    calls = []
    for name in ("forward", "forward_with_gradients", "backward"):
        own = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    batch = make_batch(18, dtype=torch.float32)
    function = full_graph(lambda s: fg.gopd_loss(s, batch.teacher, batch.ref, batch.token_ids, **FULL).loss)
    function(batch.student).backward()
    assert calls == ["forward_with_gradients"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_weights_gradient_has_no_second_copy(monkeypatch):
    """Inductor scales the forward's buffers in place, as the backward does without it."""
    buffers = []
    own = run.forward_with_gradients

    def watched(*args):
        statistics, gradients = own(*args)
        buffers.extend(x.data_ptr() for x in gradients[:2])
        return statistics, gradients

    monkeypatch.setattr(run, "forward_with_gradients", watched)
    batch = make_batch(19, dtype=torch.float32)
    function = full_graph(lambda s: fg.gopd_loss(s, batch.teacher, batch.ref, batch.token_ids, **FULL).loss, "inductor")
    (3 * function(batch.student)).backward()
    assert [x.grad.data_ptr() for x in batch.leaves] == buffers


def small(shape, seed=20):
    batch = make_batch(seed, shape=shape, dtype=torch.float32)
    return batch.student.hidden, batch.teacher.hidden, batch.ref.hidden, batch.token_ids, batch.mask


SHAPES = [(2, 5), (3, 7), (4, 3), (2, 9), (6, 11), (3, 20)]


@pytest.mark.parametrize("options", [{}, {"estimator": "topk", "k": 3, "reduction": "none"}], ids=["sampled", "topk"])
@pytest.mark.parametrize("dynamic", ["automatic", "marked"])
def test_token_counts_that_change_compile_at_most_twice(options, dynamic):
    heads = [like(m, weight=m.weight.detach()) for m in make_batch(20, dtype=torch.float32).models]
    counting = Counting()

    def loss(*tensors):
        *hidden, token_ids, mask = tensors
        models = [fg.LinearHead(h, head.weight) for h, head in zip(hidden, heads, strict=True)]
        return fg.gopd_loss(*models, token_ids, mask=mask, reward_scale=1.25, **options).loss

    function = full_graph(loss, counting)
    for shape in SHAPES:
        tensors = small(shape)
        for tensor in tensors if dynamic == "marked" else ():
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(tensor, dim)
        (want,) = torch.autograd.grad(loss(*tensors).sum(), tensors[0])
        (got,) = torch.autograd.grad(function(*tensors).sum(), tensors[0])
        assert torch.equal(got, want)
    assert counting.compilations <= (1 if dynamic == "marked" else 2)


def test_packs_that_change_compile_at_most_twice():
    batches = [make_batch(20, shape=(n,), dtype=torch.float32) for n in (9, 14, 6, 20)]
    counting = Counting()

    def loss(student, teacher, token_ids, mask, bounds):
        options = {"cu_seqlens": bounds, "reduction": "seq-mean-token-mean"}
        return fg.gopd_loss(student, teacher, None, token_ids, mask=mask, **options).loss

    function = full_graph(loss, counting)
    for batch, inner in zip(batches, ([4], [2, 7], [], [3, 9, 15]), strict=True):
        bounds = torch.tensor([0, *inner, len(batch.token_ids)])
        arguments = (batch.student, batch.teacher, batch.token_ids, batch.mask, bounds)
        assert torch.equal(function(*arguments), loss(*arguments))
    assert counting.compilations <= 2


def test_a_normalizer_and_a_lambda_that_change_compile_at_most_twice():
    batch = make_batch(21, dtype=torch.float32)
    counting = Counting()

    def loss(student, normalizer, scale):
        return fg.gopd_loss(
            student, batch.teacher, batch.ref, batch.token_ids, normalizer=normalizer, reward_scale=scale
        ).loss

    function = full_graph(loss, counting)
    for i in range(5):
        arguments = (batch.student, 100 + 7 * i, torch.tensor(0.5 + 0.1 * i))
        assert torch.equal(function(*arguments), loss(*arguments))
    assert counting.compilations <= 2


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_advantage_fn_cannot_be_in_a_graph():
    batch = make_batch(22, dtype=torch.float32)

    def loss(student):
        return fg.gopd_loss(
            student, batch.teacher, None, batch.token_ids, advantage_fn=lambda stats: 2 * stats.advantages
        ).loss

    with pytest.raises(Exception, match="advantage_fn and reward_scale_fn are Python functions, which"):
        full_graph(loss)(batch.student)
    # what the message advises
    assert torch.equal(torch.compile(loss, backend="aot_eager")(batch.student), loss(batch.student))


ids = make_batch(23).token_ids
WRONG = [
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask must have the token shape \(2, 5\)"),
    ({"mask": torch.full((2, 5), 0.5)}, ValueError, "mask must hold 0 and 1 only, got 0.5"),
    ({"token_ids": ids + 37}, IndexError, r"token_ids must be in \[0, 37\)"),
    ({"token_ids": ids.masked_fill(ids > 5, -100)}, ValueError, "-100 but no mask is given"),
    ({"old_logprobs": torch.ones(2, 5)}, ValueError, "old_logprobs must be log-probabilities"),
    (
        {"sequence_lengths": torch.tensor(1), "reduction": "seq-mean-token-mean"},
        ValueError,
        "sequence_lengths must be at least the number of live tokens",
    ),
    ({"sft_labels": ids - 38}, IndexError, r"sft_labels must be in \[0, 37\)"),
    ({"reward_scale": 1.25, "ref": None}, ValueError, r"ref must be given for reward_scale=1\.25"),
    ({"normalizer": -3}, ValueError, "normalizer must be positive, got -3"),
    ({"estimator": "exact"}, ValueError, "estimator must be one of"),
    ({"clip": (0.2, 0.2)}, ValueError, "clip needs old_logprobs"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens needs packed tokens"),
    ({"backend": "triton", "mask": None}, Exception, "triton"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[next(iter(x[0])) for x in WRONG])
def test_wrong_input_raises_what_it_raises_without_a_compiler(changes, error, message):
    batch = make_batch(23, dtype=torch.float32)
    call = {"teacher": batch.teacher, "ref": batch.ref, "token_ids": batch.token_ids, **changes}
    with pytest.raises(error, match=message):
        full_graph(lambda student: fg.gopd_loss(student, **call).loss)(batch.student)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": object()}, "clip is a object"),
        ({"student": 3}, "student must be a LinearHead"),
        ({"student": torch.zeros(2, 5, 37)}, "student must be a LinearHead or Logits, got Tensor; wrap it: fg.Logits"),
        ({"teacher": torch.zeros(2, 5, 37)}, "teacher must be .* got Tensor; wrap it: fg.Logits"),
    ],
    ids=["clip", "student", "a tensor as student", "a tensor as teacher"],
)
def test_what_a_graph_cannot_hold_is_named(changes, message):
    batch = make_batch(24, dtype=torch.float32)
    call = {"student": batch.student, "teacher": batch.teacher, "ref": None, "token_ids": batch.token_ids, **changes}
    with pytest.raises(Exception, match=message):
        full_graph(lambda x: fg.gopd_loss(**call).loss * x)(torch.ones(()))


# --------------------------------------------------------------------------------------- what the ops say of themselves


def loss_arguments(batch, **options):
    """The arguments of the loss's op, for a call."""
    call = inspect.signature(fg.gopd_loss).bind(*batch.models, batch.token_ids, mask=batch.mask, **options)
    call.apply_defaults()
    return compiled._packed("student", call.arguments.pop("student"), call.arguments)


def detached(arguments):
    return type(arguments)(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))


CHECKED = {
    "sampled": {},
    "full": {"estimator": "full", "reward_scale": 1.25},
    "recomputed": {"estimator": "full", "reduction": "none", "divergence": "jsd"},
    "topk recomputed": {"estimator": "topk", "k": 3, "reduction": "none", "reward_scale": 1.25},
    "clipped": {**OLD, "clip": (0.2, 0.28)},
    "labels": {"sft_labels": torch.zeros(2, 5, dtype=torch.int64), "normalizer": 17},
}


@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("student", ["linear", "logits"])
def test_opcheck_of_the_loss(options, student):
    transforms = [{"bias": True} if student == "linear" else {}, {}, {}]
    batch = make_batch(25, dtype=torch.float32, kinds=(student, "linear", "linear"), transforms=transforms)
    arguments = loss_arguments(batch, **options)
    torch.library.opcheck(compiled._loss_op, arguments)
    if options.get("reduction") == "none":
        made = [x.detach() for x in compiled._loss_op(*arguments)]
        statistics = next(i for i, x in enumerate(made) if x.shape[:1] == (STATISTICS,))
        upstream = torch.ones(2, 5)
        torch.library.opcheck(compiled._loss_backward_op, (upstream, made[statistics:], *detached(arguments)))


def test_opcheck_of_the_scores():
    batch = make_batch(26, dtype=torch.float32)
    arguments = compiled._packed("head", batch.student, {"token_ids": batch.token_ids, "mask": batch.mask})
    torch.library.opcheck(compiled._logprobs_op, arguments)
    *_, statistics = compiled._logprobs_op(*arguments)
    for upstreams in ((torch.ones(2, 5), None), (None, torch.ones(2, 5))):
        torch.library.opcheck(compiled._logprobs_backward_op, (*upstreams, statistics.detach(), *detached(arguments)))
    ids = torch.randint(-1, 37, (2, 5, 3), generator=generator(26))
    arguments = compiled._packed("head", batch.student, {"token_ids": ids, "selected": True})
    torch.library.opcheck(compiled._logprobs_op, arguments)
    *_, statistics = compiled._logprobs_op(*arguments)
    upstreams = torch.ones(2, 5, 3), None
    torch.library.opcheck(compiled._logprobs_backward_op, (*upstreams, statistics.detach(), *detached(arguments)))
    frozen = trainable(batch.student)
    torch.library.opcheck(compiled._topk_op, detached(compiled._packed("head", frozen, {"k": 3, "mask": batch.mask})))
