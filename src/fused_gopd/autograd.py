"""The thin autograd Functions, and the registered custom ops that they call.

The two ops are the chunk loop with a signature that PyTorch's dispatcher understands: tensors in one list, everything
static in one string, which compilers treat as a constant.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import chunks, objective
from .chunks import NOTHING, STATISTICS, Chosen, Coefficients, Job, Needs, Route, Scaling, TokenRow, TokenRows
from .gemm import without_autocast
from .heads import Head, LinearHead, Logits
from .objective import AdvantageFn, Surrogate
from .rowops import select_backend
from .rowops.torch import accumulation_dtype
from .shards import VocabShard
from .topk import Truncation

# ------------------------------------------------------------------------------------------- a job as tensors + text

_VECTORS = (
    "reward_scale",
    "token_ids",
    "teacher_logprobs",
    "ref_logprobs",
    "old_logprobs",
    "rollout_logprobs",
    "cu_seqlens",
    "advantages",
    "support_ids",
    "teacher_topk",
    "ref_topk",
    "labels",
)

# A function cannot pass through an op as text, its number can. Alive as long as a job holds the entry.
_HOOKS: weakref.WeakValueDictionary[int, _Hook] = weakref.WeakValueDictionary()
_hook_numbers = itertools.count()


class _Hook:
    """An ``advantage_fn`` under a number."""

    def __init__(self, function: AdvantageFn) -> None:
        self.function = function
        self.number = next(_hook_numbers)
        _HOOKS[self.number] = self


def _pack(job: Job, hook: _Hook | None = None) -> tuple[list[Tensor | None], str]:
    """The tensors of a job in a fixed order (the vectors, the live rows, three a head), and the rest as JSON.

    ``hook`` stands for ``job.advantage_fn``, where the op is to call it.
    """
    values = [getattr(job, name) for name in _VECTORS]
    tensors: list[Tensor | None] = [v if isinstance(v, Tensor) else None for v in values] + [job.rows.index]
    heads: list[dict[str, Any] | None] = []
    routed = [head for route in job.routes for head in (route.teacher, route.ref)]
    for head in (job.student, *(routed or (job.teacher, job.ref))):
        if head is None:
            tensors += [None] * 3
            heads.append(None)
            continue
        tensors += [head.hidden, head.weight, head.bias] if isinstance(head, LinearHead) else [head.logits, None, None]
        transform = {k: getattr(head, k) for k in ("logit_scale", "softcap", "temperature")}
        heads.append({**transform, "shard": None if head.shard is None else head.shard.described})
    static = {
        "heads": heads,
        "stops": [route.stop for route in job.routes],
        "token_dims": len(job.rows.shape),
        "vocab_size": job.vocab_size,
        "chunk_size": job.chunk_size,
        "backend": job.ops.name,
        "estimator": job.estimator,
        "divergence": job.divergence,
        "beta": job.beta,
        "reward_scale": None if isinstance(job.reward_scale, Tensor) else job.reward_scale,
        "surrogate": dataclasses.asdict(job.surrogate),
        "truncation": dataclasses.asdict(job.truncation),
        "sft_weight": job.sft_weight,
        "grad_filter": job.grad_filter,
        "hook": None if hook is None else hook.number,
    }
    return tensors, json.dumps(static)


@functools.lru_cache(maxsize=256)
def _parse(static: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(static))


def _unpack(tensors: Sequence[Tensor | None], static: str) -> Job:
    options = _parse(static)
    heads: list[Any] = []
    first = len(_VECTORS) + 1
    for i, described in enumerate(options["heads"]):
        data, weight, bias = tensors[first + 3 * i : first + 3 * i + 3]
        if described is None:
            heads.append(None)
        else:
            assert data is not None
            shard = None if described["shard"] is None else VocabShard.of(described["shard"])
            transform = {**described, "shard": shard}
            heads.append(Logits(data, **transform) if weight is None else LinearHead(data, weight, bias, **transform))
    vectors: dict[str, Any] = dict(zip(_VECTORS, tensors, strict=False))
    scale = vectors.pop("reward_scale")
    student, *others = heads
    pairs = list(zip(others[::2], others[1::2], strict=True))
    routes = [Route(stop, *pair) for stop, pair in zip(options["stops"], pairs, strict=False)]
    rows = student.rows
    dtypes = {head.rows.dtype for head in heads if head is not None}
    # JSON has lists where the pairs were tuples
    surrogate: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options["surrogate"].items()}
    job = Job(
        TokenRows(rows.shape[: options["token_dims"]], tensors[len(_VECTORS)]),
        options["vocab_size"],
        options["chunk_size"],
        select_backend(options["backend"], rows.device, dtypes),
        student,
        *pairs[0],
        tuple(routes),
        estimator=options["estimator"],
        divergence=options["divergence"],
        beta=options["beta"],
        reward_scale=options["reward_scale"] if scale is None else scale,
        surrogate=Surrogate(**surrogate),
        truncation=Truncation(**options["truncation"]),
        sft_weight=options["sft_weight"],
        grad_filter=options["grad_filter"],
        advantage_fn=None if options["hook"] is None else _HOOKS[options["hook"]].function,
    )
    return dataclasses.replace(job, **vectors)


def _dense(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """An op returns tensors: an empty one stands for what nobody needs."""
    return [like.new_empty(0) if x is None else x for x in tensors]


@torch.library.custom_op("fused_gopd::forward", mutates_args=())
def _forward_op(
    tensors: Sequence[Tensor | None], static: str, relative: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """Statistics, what topk chose, and with ``relative`` the gradients (see :func:`fused_gopd.chunks.run`).

    Without ``relative``, ``needs`` says what a backward will ask for.
    """
    job = _unpack(tensors, static)
    with without_autocast(job.device):
        statistics, gradients, chosen = chunks.run(job, Needs(*needs), relative=relative)
    return [statistics, *_dense(chosen or (None, None), statistics), *_dense(gradients, statistics)]


_BEFORE_GRADIENTS = 3


@torch.library.custom_op("fused_gopd::backward", mutates_args=())
def _backward_op(
    tensors: Sequence[Tensor | None],
    static: str,
    statistics: Tensor,
    divergence: Tensor | None,
    weight: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor | None,
    reach: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The student's gradients for complete coefficients per token, from the statistics of an earlier forward."""
    job = _unpack(tensors, static)
    coefficients = Coefficients(divergence, weight, token_ids, values, reach)
    with without_autocast(job.device):
        gradients = chunks.run(job, Needs(*needs), statistics=statistics, coefficients=coefficients).gradients
    return _dense(gradients, statistics)


def _fake_gradients(job: Job, needs: Needs) -> list[Tensor]:
    student, empty = job.student, torch.empty(0, dtype=job.dtype, device=job.device)
    wide = accumulation_dtype(student.weight) if isinstance(student, LinearHead) else job.dtype
    source = student.rows
    out = [source.new_empty(job.rows.shape.numel(), source.shape[-1]) if needs.rows else empty]
    for needed, shape in ((needs.weight, "weight"), (needs.bias, "bias")):
        if needed and isinstance(student, LinearHead):
            full = student.weight.shape if shape == "weight" else student.weight.shape[:1]
            out.append(torch.empty(full, dtype=wide, device=job.device))
        else:
            out.append(empty.clone())
    return out


@_forward_op.register_fake
def _(tensors: Sequence[Tensor | None], static: str, relative: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    job = _unpack(tensors, static)
    statistics = torch.empty(STATISTICS, job.rows.count, dtype=job.dtype, device=job.device)
    empty: list[Tensor | None] = [None, None]
    if job.truncated and relative is None and any(needs):
        shape = (job.rows.count, job.width)
        empty = [torch.empty(shape, dtype=dtype, device=job.device) for dtype in (torch.int64, job.dtype)]
    gradients = _fake_gradients(job, Needs(*needs) if relative is not None else NOTHING)
    return [statistics, *_dense(empty, statistics), *gradients]


@_backward_op.register_fake
def _(
    tensors: Sequence[Tensor | None],
    static: str,
    statistics: Tensor,
    divergence: Tensor | None,
    weight: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor | None,
    reach: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _fake_gradients(_unpack(tensors, static), Needs(*needs))


@torch.library.register_vmap("fused_gopd::backward")  # type: ignore[untyped-decorator]
def _(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError(
        "gopd_loss and token_logprobs take one upstream gradient at a time, not a batch of them (torch.func.vmap over "
        "a vjp): torch.func.jacrev(..., chunk_size=1) goes through them one by one"
    )


# ------------------------------------------------------------------------------------------------------- token values


def token_values(job: Job, statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token losses and, but for ``sampled``, KL(p || target): (n,) each."""
    kl: Tensor | None = None
    if job.estimator == "sampled":
        loss = job.policy_term(statistics).loss
    elif job.truncated:
        loss, kl = statistics[TokenRow.TRUNCATED_LOSS], statistics[TokenRow.TRUNCATED_KL]
    else:
        loss, kl = objective.divergence_value(job.divergence, job.beta, job.reward_scale, statistics, job.has)
    return (loss if job.labels is None else loss + job.supervised(statistics)[1]), kl


def _student_tensors(job: Job) -> tuple[Tensor, Tensor | None, Tensor | None]:
    student = job.student
    if isinstance(student, LinearHead):
        return student.hidden, student.weight, student.bias
    return student.logits, None, None


_Meta = tuple[torch.Size, torch.dtype]


def _meta(tensors: Sequence[Tensor | None]) -> list[_Meta | None]:
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


def _like(gradients: Sequence[Tensor], needs: Needs, sources: Sequence[_Meta | None]) -> tuple[Tensor | None, ...]:
    """Gradients as the loop leaves them, in the shapes and dtypes of the student's tensors."""
    out: list[Tensor | None] = []
    for gradient, needed, source in zip(gradients, needs, sources, strict=True):
        if needed:
            assert source is not None
            out.append(gradient.reshape(source[0]).to(source[1]))
        else:
            out.append(None)
    return tuple(out)


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keep tensors for the backward; those made in inference mode (a teacher's) beside those that autograd tracks."""
    ctx.save_for_backward(*(None if t is None or t.is_inference() else t for t in tensors))
    ctx.untracked = [t if t is not None and t.is_inference() else None for t in tensors]


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, asked for once in a backward: checkpointing recomputes for them and refuses a second time."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    return cast("tuple[Any, ...]", ctx.unpacked)


def _saved(ctx: Any) -> list[Tensor | None]:
    return [a if b is None else b for a, b in zip(_unpacked(ctx), ctx.untracked, strict=True)]


def _is_one(x: Tensor) -> bool:
    """Whether multiplying by x changes nothing, where that can be seen without waiting for a device."""
    return x.device.type == "cpu" and x.item() == 1.0


def _scale_(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Multiply in place: the buffers belong to us, and a copy of [V, H] would cost as much memory again."""
    # a factor of one dimension: a 0-d one would be rounded to a low-precision gradient's dtype before it multiplies
    return [g if not g.numel() or _is_one(f) else g.mul_(f.reshape(1)) for g, f in zip(gradients, factors, strict=True)]


class _Twice(torch.autograd.Function):
    """A gradient as it is, with a graph that raises: what is differentiated again must not be a silent zero."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradients of gopd_loss and token_logprobs cannot be differentiated twice: they are computed with the "
            "loss and have no graph. Second derivatives: fused_gopd.reference.gopd_loss, which is plain PyTorch"
        )


def _once_differentiable(backward: Any) -> Any:
    """A backward without a graph of its own.

    PyTorch's decorator of that name raises only where the upstream gradient requires one: a second derivative with
    respect to the inputs would be taken for zero.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.unpacked = None
        try:
            with torch.no_grad():
                gradients: tuple[Tensor | None, ...] = backward(ctx, *upstream)
            if not torch.is_grad_enabled():  # as it is but for create_graph=True
                return gradients
            sources = [t for t in (*upstream, *_unpacked(ctx)) if t is not None and t.requires_grad]
        finally:
            ctx.unpacked = None
        with_graph: Any = _Twice.apply
        return tuple(None if g is None else with_graph(g, *sources) for g in gradients)

    return wrapped


# ---------------------------------------------------------------------------------------------------------- Functions


class _WeightedLoss(torch.autograd.Function):
    """sum_i w_i loss_i with the gradients computed in the forward, each GEMM once.

    The backward hands out the forward's buffers, scaled in place by the upstream gradient: no second copy of them ever
    exists. A second backward (``retain_graph``) finds them gone and computes them anew, to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, job: Job, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        hook = None if job.advantage_fn is None else _Hook(job.advantage_fn)
        tensors, static = _pack(job, hook)
        needs = Needs(*(ctx.needs_input_grad[:3]))
        scaling = Scaling.of(job, weights)
        out = _forward_op(tensors, static, scaling.relative if any(needs) else None, needs)
        statistics, gradients = out[0], out[_BEFORE_GRADIENTS:]
        token_loss, _ = token_values(job, statistics)
        if hook is not None:
            # a second backward computes the loop anew, with these advantages: the hook is called once
            known = statistics[TokenRow.ADVANTAGE : TokenRow.REPORTED_ADVANTAGE + 1].clone()
            tensors, static = _pack(dataclasses.replace(job, advantages=known))
        ctx.static, ctx.scaling, ctx.needs, ctx.gradients = static, scaling, needs, gradients
        ctx.meta = _meta((rows, weight, bias))
        _save(ctx, tensors)
        ctx.mark_non_differentiable(token_loss, statistics)
        ctx.set_materialize_grads(False)
        return (token_loss * weights).sum(), token_loss, statistics

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        scaling: Scaling = ctx.scaling
        gradients: list[Tensor] | None = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            gradients = _forward_op(_saved(ctx), ctx.static, scaling.relative, ctx.needs)[_BEFORE_GRADIENTS:]
        rows, rest = (upstream if s is None else upstream * s for s in (scaling.rows, scaling.weight))
        return (*_like(_scale_(gradients, (rows, rest, rest)), ctx.needs, ctx.meta), None, None)


class _Recomputed(torch.autograd.Function):
    """What the two Functions below share: statistics in the forward, the student's logits again in the backward."""

    @staticmethod
    def statistics(ctx: Any, job: Job) -> Tensor:
        hook = None if job.advantage_fn is None else _Hook(job.advantage_fn)
        ctx.needs, ctx.meta = Needs(*(ctx.needs_input_grad[:3])), _meta(_student_tensors(job))
        out: list[Tensor] = _forward_op(*_pack(job, hook), None, ctx.needs)
        statistics, ids, values = out[:_BEFORE_GRADIENTS]
        tensors, ctx.static = _pack(job)  # the backward finds the advantages in the statistics
        _save(ctx, [*tensors, statistics, ids, values])
        ctx.set_materialize_grads(False)
        return statistics

    @staticmethod
    def saved(ctx: Any) -> tuple[Job, Tensor, Chosen | None]:
        *tensors, statistics, ids, values = _saved(ctx)
        assert statistics is not None
        assert ids is not None
        assert values is not None
        job = _unpack(tensors, ctx.static)
        return job, statistics, Chosen(ids, values) if job.truncated else None

    @staticmethod
    def gradients(ctx: Any, coefficients: Coefficients) -> tuple[Tensor | None, ...]:
        *tensors, statistics, _, _ = _saved(ctx)
        return (
            *_like(_backward_op(tensors, ctx.static, statistics, *coefficients, ctx.needs), ctx.needs, ctx.meta),
            None,
        )


class _TokenLosses(_Recomputed):
    """loss_i for every live token, for any upstream gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        statistics = _Recomputed.statistics(ctx, job)
        ctx.mark_non_differentiable(statistics)
        return token_values(job, statistics)[0], statistics

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 4
        job, statistics, chosen = _Recomputed.saved(ctx)
        coefficients = job.coefficients(statistics, chosen=chosen)
        return _Recomputed.gradients(ctx, coefficients.times(upstream.to(job.dtype).contiguous()))


def logprob_coefficients(job: Job, upstream: Tensor | None, upstream_entropy: Tensor | None) -> Coefficients:
    """Of log p of the given tokens and of the entropy, for upstream gradients (n,) of either."""
    # dH / dz = -p (log p + H) = -p (z - sum p z): the row operation's divergence of a model alone
    divergence = None if upstream_entropy is None else -upstream_entropy.to(job.dtype).contiguous()
    if upstream is None:
        return Coefficients(divergence)
    assert job.token_ids is not None
    return Coefficients(divergence, -upstream.to(job.dtype).contiguous(), job.token_ids[:, None])


class _TokenLogProbs(_Recomputed):
    """log p of the given tokens and the entropy, for any upstream gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        statistics = _Recomputed.statistics(ctx, job)
        return job.model_logprobs(statistics)[0], objective.entropy(statistics)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, upstream_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None and upstream_entropy is None:
            return (None,) * 4
        job, _, _ = _Recomputed.saved(ctx)
        return _Recomputed.gradients(ctx, logprob_coefficients(job, upstream, upstream_entropy))


_STUDENT = slice(len(_VECTORS) + 1, len(_VECTORS) + 4)


class _Transformed(torch.autograd.Function):
    """:class:`_TokenLosses` or :class:`_TokenLogProbs` under the transforms of :mod:`torch.func`.

    Transforms see the arguments of a Function and nothing else, so every tensor is one; and what a backward reads has
    to be an output. Eager code does not come here: it would have more to hold.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(statics: tuple[str, str], needs: Needs, scores: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        statistics, ids, values = _forward_op(tensors, statics[0], None, needs)[:_BEFORE_GRADIENTS]
        job = _unpack(tensors, statics[1])
        if scores:
            return job.model_logprobs(statistics)[0], objective.entropy(statistics), statistics, ids, values
        return token_values(job, statistics)[0], statistics.new_zeros(()), statistics, ids, values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        statics, ctx.needs, ctx.scores, *tensors = inputs
        _, _, statistics, ids, values = output
        ctx.static, ctx.inputs = statics[1], len(inputs)
        ctx.mark_non_differentiable(statistics, ids, values)
        ctx.set_materialize_grads(False)
        ctx.meta = _meta(tensors[_STUDENT])
        ctx.save_for_backward(*tensors, statistics, ids, values)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, upstream_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        out: list[Tensor | None] = [None] * ctx.inputs
        if upstream is None and upstream_entropy is None:
            return tuple(out)
        *tensors, statistics, ids, values = _unpacked(ctx)
        job = _unpack(tensors, ctx.static)
        if ctx.scores:
            coefficients = logprob_coefficients(job, upstream, upstream_entropy)
        else:
            assert upstream is not None
            coefficients = job.coefficients(statistics, chosen=Chosen(ids, values) if job.truncated else None)
            coefficients = coefficients.times(upstream.to(job.dtype).contiguous())
        gradients = _backward_op(tensors, ctx.static, statistics, *coefficients, ctx.needs)
        first = ctx.inputs - len(tensors) + _STUDENT.start
        out[first : first + 3] = _like(gradients, ctx.needs, ctx.meta)
        return tuple(out)

    @staticmethod
    def apply_to(job: Job, scores: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Token losses or log-probs, entropies, statistics."""
        hook = None if job.advantage_fn is None else _Hook(job.advantage_fn)
        tensors, static = _pack(job, hook)
        needs = Needs(*(t is not None and t.requires_grad for t in tensors[_STUDENT]))
        apply: Any = _Transformed.apply
        values, entropy, statistics, *_ = apply((static, _pack(job)[1]), needs, scores, *tensors)
        return values, entropy, statistics


def _transformed() -> bool:
    """Whether torch.func.grad or vjp is at work: :func:`fused_gopd.checks.require_reverse_mode` refuses the others."""
    return bool(torch._C._are_functorch_transforms_active()) and not torch.compiler.is_compiling()


def _call(function: Any, job: Job, *rest: Tensor) -> Any:
    tensors = _student_tensors(job)
    if not torch.is_grad_enabled():
        # a Function under no_grad is still told that its inputs require gradients, and would compute them in vain
        tensors = tuple(None if t is None else t.detach() for t in tensors)  # type: ignore[assignment]
    return function.apply(*tensors, job, *rest)


def gradient_waits(student: Head, ratio: object, unbounded: bool) -> bool:
    """Whether a loss with known token weights takes the recomputing path all the same.

    A low-precision ``Logits`` student does: no GEMM is repeated by it, and the gradient, which is the size of all
    logits, is rounded once with all factors applied. So do ratios of whole sequences, which are known only when all
    chunks are through, and float16 hidden states under ratios, importance weights, advantages or supervised weights of
    the caller's (``unbounded``), which may be so large that a gradient without its token weight overflows.
    """
    dtype = student.rows.dtype
    if isinstance(student, Logits):
        waits = dtype in (torch.float16, torch.bfloat16)
    else:
        waits = dtype == torch.float16 and unbounded
    return waits or ratio == "sequence"


def weighted_loss(job: Job, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, token losses (n,) and statistics (STATISTICS, n), for weights () or (n,) that are known now."""
    if _transformed():
        token_loss, _, statistics = _Transformed.apply_to(job, scores=False)
        return (token_loss * weights).sum(), token_loss.detach(), statistics
    factors = (job.old_logprobs, job.rollout_logprobs, job.advantage_fn, job.labels)
    if gradient_waits(job.student, job.surrogate.ratio, any(x is not None for x in factors)):
        token_loss, statistics = _call(_TokenLosses, job)
        return (token_loss * weights).sum(), token_loss.detach(), statistics
    loss, token_loss, statistics = _call(_WeightedLoss, job, weights)
    return loss, token_loss, statistics


def token_losses(job: Job) -> tuple[Tensor, Tensor]:
    """Differentiable token losses (n,) and the statistics."""
    if _transformed():
        token_loss, _, statistics = _Transformed.apply_to(job, scores=False)
        return token_loss, statistics
    token_loss, statistics = _call(_TokenLosses, job)
    return token_loss, statistics


def token_logprobs(job: Job) -> tuple[Tensor, Tensor]:
    """Differentiable log-probs (n,) of ``job.token_ids`` under the student, and its entropies."""
    if _transformed():
        logprobs, entropies, _ = _Transformed.apply_to(job, scores=True)
        return logprobs, entropies
    logprobs, entropies = _call(_TokenLogProbs, job)
    return logprobs, entropies


def token_topk(job: Job, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs, token shape + (k,), of the student's k most likely tokens; not differentiable."""
    with torch.no_grad(), without_autocast(job.device):
        return chunks.most_likely(job, k)
