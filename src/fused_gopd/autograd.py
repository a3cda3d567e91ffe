"""The thin autograd Functions around the chunk loop: when gradients are computed, and what is kept for a backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import chunks
from .agreement import Agreement
from .chunks import Chosen, Coefficients, Job, Needs, Route, Scaling
from .heads import Head, LinearHead, Logits
from .objective.divergences import divergence_value
from .objective.statistics import TokenRow, entropy
from .rowops import triton
from .tokens import TokenRows

# ----------------------------------------------------------------------------------------- a job apart from its tensors


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor stands in the list of them."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Frame:
    """An object whose tensors are elsewhere."""

    kind: Any
    fields: dict[str, Any]


def _apart(x: Any, tensors: list[Tensor]) -> Any:
    """A job, or a part of one, with places for its tensors, which go to the list: autograd is to keep them."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Place(len(tensors) - 1)
    if isinstance(x, (Route, Agreement)):
        return _Frame(type(x), {name: _apart(y, tensors) for name, y in x._asdict().items()})
    if isinstance(x, (Job, TokenRows, LinearHead, Logits)):
        return _Frame(type(x), {f.name: _apart(getattr(x, f.name), tensors) for f in dataclasses.fields(x)})
    return tuple(_apart(y, tensors) for y in x) if type(x) is tuple else x


def _together(x: Any, tensors: Sequence[Tensor | None]) -> Any:
    """The way back."""
    if isinstance(x, _Place):
        return tensors[x.number]
    if isinstance(x, _Frame):
        return x.kind(**{name: _together(y, tensors) for name, y in x.fields.items()})
    return tuple(_together(y, tensors) for y in x) if type(x) is tuple else x


# ------------------------------------------------------------------------------------------------------- token values


def token_values(job: Job, statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token losses and, but for ``sampled``, KL(p || target): (n,) each."""
    kl: Tensor | None = None
    if job.estimator == "sampled":
        loss = job.policy_term(statistics).loss
    elif job.truncated:
        loss, kl = statistics[TokenRow.TRUNCATED_LOSS], statistics[TokenRow.TRUNCATED_KL]
    else:
        loss, kl = divergence_value(job.divergence, job.beta, job.reward_scale, statistics, job.has)
    return (loss if job.labels is None else loss + job.supervised(statistics)[1]), kl


def _student_tensors(job: Job) -> tuple[Tensor, Tensor | None, Tensor | None]:
    student = job.student
    if isinstance(student, LinearHead):
        return student.hidden, student.weight, student.bias
    return student.logits, None, None


_Meta = tuple[torch.Size, torch.dtype]


def meta(tensors: Sequence[Tensor | None]) -> list[_Meta | None]:
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


def like(gradients: Sequence[Tensor | None], sources: Sequence[_Meta | None]) -> tuple[Tensor | None, ...]:
    """Gradients as the loop leaves them, in the shapes and dtypes of the student's tensors."""
    out: list[Tensor | None] = []
    for gradient, source in zip(gradients, sources, strict=True):
        if gradient is not None:
            assert source is not None
            gradient = gradient.reshape(source[0]).to(source[1])
        out.append(gradient)
    return tuple(out)


def _save(ctx: Any, job: Job, *more: Tensor | None) -> None:
    """Keep a job and other tensors for the backward, if there will be one.

    Tensors made in inference mode (a teacher's) are kept beside those that autograd tracks.
    """
    if not any(ctx.needs_input_grad):
        return
    own: list[Tensor] = []
    # the ranks have agreed on the call: a second backward need not compare it again
    job = job if job.agreement is None else dataclasses.replace(job, agreement=None)
    ctx.frame, ctx.more = _apart(job, own), len(more)
    tensors = [*own, *more]
    ctx.save_for_backward(*(None if t is None or t.is_inference() else t for t in tensors))
    ctx.untracked = [t if t is not None and t.is_inference() else None for t in tensors]


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, asked for once in a backward: checkpointing recomputes for them and refuses a second time."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    return cast("tuple[Any, ...]", ctx.unpacked)


def _saved(ctx: Any) -> tuple[Job, list[Tensor | None]]:
    """The job and the other tensors."""
    tensors = [a if b is None else b for a, b in zip(_unpacked(ctx), ctx.untracked, strict=True)]
    own = len(tensors) - ctx.more
    return _together(ctx.frame, tensors[:own]), tensors[own:]


def _is_one(x: Tensor) -> bool:
    """Whether multiplying by x changes nothing, where that can be seen without waiting for a device."""
    return x.device.type == "cpu" and x.item() == 1.0


def _scale_(gradient: Tensor | None, factor: Tensor, source: _Meta | None, backend: str) -> Tensor | None:
    """Multiply in place: the buffers belong to us, and a copy of [V, H] would cost as much memory again.

    Unless there has to be one, in the dtype of what it is the gradient of.
    """
    if gradient is None or _is_one(factor):
        return gradient
    assert source is not None
    if backend == "triton" and factor.dtype == torch.float32:
        return triton.scaled(gradient, factor, source[1])
    # a factor of one dimension: a 0-d one would be rounded to a low-precision gradient's dtype before it multiplies
    return gradient.mul_(factor.reshape(1))


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
        needs = Needs(*(ctx.needs_input_grad[:3]))
        scaling = Scaling.of(job, weights)
        statistics, gradients, _ = chunks.run(job, needs, relative=scaling.relative if any(needs) else None)
        token_loss, _ = token_values(job, statistics)
        if job.advantage_fn is not None:
            # a second backward computes the loop anew, with these advantages: the function is called once
            known = statistics[TokenRow.ADVANTAGE : TokenRow.REPORTED_ADVANTAGE + 1].clone()
            job = dataclasses.replace(job, advantage_fn=None, advantages=known)
        ctx.scaling, ctx.needs, ctx.gradients = scaling, needs, gradients
        ctx.meta, ctx.backend = meta((rows, weight, bias)), job.ops.name
        _save(ctx, job)
        ctx.mark_non_differentiable(token_loss, statistics)
        ctx.set_materialize_grads(False)
        return (token_loss * weights).sum(), token_loss, statistics

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        scaling: Scaling = ctx.scaling
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = chunks.run(_saved(ctx)[0], ctx.needs, relative=scaling.relative).gradients
        rows, rest = (upstream if s is None else upstream * s for s in (scaling.rows, scaling.weight))
        scaled = [
            _scale_(gradient, factor, source, ctx.backend)
            for gradient, factor, source in zip(gradients, (rows, rest, rest), ctx.meta, strict=True)
        ]
        return (*like(scaled, ctx.meta), None, None)


class _Recomputed(torch.autograd.Function):
    """What the two Functions below share: statistics in the forward, the student's logits again in the backward."""

    @staticmethod
    def statistics(ctx: Any, job: Job) -> Tensor:
        ctx.needs, ctx.meta = Needs(*(ctx.needs_input_grad[:3])), meta(_student_tensors(job))
        statistics, _, chosen = chunks.run(job, ctx.needs)
        # the backward finds the advantages in the statistics
        _save(ctx, dataclasses.replace(job, advantage_fn=None), statistics, *(chosen or (None, None)))
        ctx.set_materialize_grads(False)
        return statistics

    @staticmethod
    def saved(ctx: Any) -> tuple[Job, Tensor, Chosen | None]:
        job, (statistics, ids, values) = _saved(ctx)
        assert statistics is not None
        return job, statistics, None if ids is None or values is None else Chosen(ids, values)

    @staticmethod
    def gradients(ctx: Any, job: Job, statistics: Tensor, coefficients: Coefficients) -> tuple[Tensor | None, ...]:
        gradients = chunks.run(job, ctx.needs, statistics=statistics, coefficients=coefficients).gradients
        return (*like(gradients, ctx.meta), None)


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
        coefficients = job.coefficients(statistics, chosen=chosen).times(upstream.to(job.dtype).contiguous())
        return _Recomputed.gradients(ctx, job, statistics, coefficients)


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
        return job.model_logprobs(statistics)[0], entropy(statistics)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, upstream_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None and upstream_entropy is None:
            return (None,) * 4
        job, statistics, _ = _Recomputed.saved(ctx)
        return _Recomputed.gradients(ctx, job, statistics, logprob_coefficients(job, upstream, upstream_entropy))


class _Transformed(torch.autograd.Function):
    """:class:`_TokenLosses` or :class:`_TokenLogProbs` under the transforms of :mod:`torch.func`.

    Transforms see the arguments of a Function and nothing else, so every tensor is one; and what a backward reads has
    to be an output. Eager code does not come here: it would have more to hold.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(frame: _Frame, needs: Needs, scores: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        job: Job = _together(frame, tensors)
        statistics, _, chosen = chunks.run(job, needs)
        kept = (statistics, *(chosen or (statistics.new_empty(0), statistics.new_empty(0))))
        if scores:
            return job.model_logprobs(statistics)[0], entropy(statistics), *kept
        return token_values(job, statistics)[0], statistics.new_zeros(()), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.frame, ctx.needs, ctx.scores, *tensors = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, upstream_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        own = len(tensors) - 3
        out: list[Tensor | None] = [None] * (3 + own)
        if upstream is None and upstream_entropy is None:
            return tuple(out)
        for x in (upstream, upstream_entropy):
            if x is not None and torch._C._functorch.is_batchedtensor(x):
                raise NotImplementedError(
                    "gopd_loss and token_logprobs take one upstream gradient at a time, not a batch of them "
                    "(torch.func.vmap over a vjp): torch.func.jacrev(..., chunk_size=1) goes through them one by one"
                )
        apply: Any = _TransformedBackward.apply
        gradients = iter(apply(ctx.frame, ctx.needs, ctx.scores, upstream, upstream_entropy, *tensors))
        student = ctx.frame.fields["student"].fields
        places = [student[name] for name in (("logits",) if "logits" in student else ("hidden", "weight", "bias"))]
        for place, needed in zip(places, ctx.needs, strict=False):
            if needed:
                out[3 + place.number] = next(gradients)
        return tuple(out)

    @staticmethod
    def apply_to(job: Job, scores: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Token losses or log-probs, entropies, statistics."""
        tensors: list[Tensor] = []
        frame = _apart(job, tensors)
        needs = Needs(*(t is not None and t.requires_grad for t in _student_tensors(job)))
        apply: Any = _Transformed.apply
        values, entropy, statistics, *_ = apply(frame, needs, scores, *tensors)
        return values, entropy, statistics


class _TransformedBackward(torch.autograd.Function):
    """The gradients of :class:`_Transformed`: inside a Function a transform's tensors are plain ones."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        frame: _Frame,
        needs: Needs,
        scores: bool,
        upstream: Tensor | None,
        upstream_entropy: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        *own, statistics, ids, values = tensors
        # the advantages are in the statistics
        job: Job = dataclasses.replace(_together(frame, own), advantage_fn=None)
        if scores:
            coefficients = logprob_coefficients(job, upstream, upstream_entropy)
        else:
            assert upstream is not None
            coefficients = job.coefficients(statistics, chosen=Chosen(ids, values) if job.truncated else None)
            coefficients = coefficients.times(upstream.to(job.dtype).contiguous())
        gradients = chunks.run(job, needs, statistics=statistics, coefficients=coefficients).gradients
        return tuple(g for g in like(gradients, meta(_student_tensors(job))) if g is not None)

    setup_context = _Twice.setup_context
    backward = _Twice.backward


def _transformed() -> bool:
    """Whether torch.func.grad or vjp is at work: :func:`fused_gopd.checks.require_reverse_mode` refuses the others."""
    return bool(torch._C._are_functorch_transforms_active())


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
    with torch.no_grad():
        return chunks.most_likely(job, k)
