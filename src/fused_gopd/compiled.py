"""The public calls under ``torch.compile``: each is one custom op around the code that runs without it.

Whatever depends on values (checks, which tokens are live, routes, the loop itself) happens inside the op, on real
tensors: the same code, the same bits, and the same errors, raised when the compiled function runs. A compiler sees
tensors of the token shape alone, so that no number of tokens is built into what it makes.

A loss's gradients are outputs of its op where they are computed in the forward. Where they are recomputed a second op
takes the call's arguments once more, with the statistics, which are padded from the live tokens to all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .autograd import core
from .heads import Head, LinearHead, Logits, TokenLogProbs, TopKLogProbs, require_kind
from .loop import run
from .loop.accumulator import Gradients, RequiresGrad
from .loop.estimators import estimator_of
from .loop.estimators.base import LogProbsAndEntropy, SelectedLogProbs
from .loop.run import Entries, MakeEstimator
from .models import as_tuple, dtype_of, support_width
from .nll import NLLCall, prepare_nll
from .objective.layout import STATISTICS, statistics_rows
from .options import ARGUMENTS, LossCall
from .output import GOPDOutput
from .plan import recomputes_in_backward, reported_fields
from .prepare import prepare
from .problem import Problem
from .report import report
from .rowops.torch import accumulation_dtype
from .scoring import prepare_scoring, topk_tokens
from .shards import VocabShard
from .targets import LogLinear, Mixture

# ------------------------------------------------------------------------------------------ a call as an op's arguments

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (LinearHead, Logits, TokenLogProbs, TopKLogProbs, LogLinear, Mixture)
}


class _Parts(NamedTuple):
    """What the static string of an op refers to.

    Numbers are passed separately, so that a changed value does not trigger recompilation.
    """

    tensors: list[Any]
    ints: list[Any]
    floats: list[Any]


class _Packed(NamedTuple):
    """The arguments of an op."""

    rows: Tensor  # the student's hidden states or logits
    weight: Tensor | None
    bias: Tensor | None
    tensors: list[Tensor]  # all others
    ints: list[int]
    floats: list[float]
    static: str


_SCHEMA = "Tensor rows, Tensor? weight, Tensor? bias, Tensor[] tensors, SymInt[] ints, float[] floats, str static"


@functools.lru_cache(maxsize=256)
def _loads(static: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(static))


def _pack(name: str, value: Any, parts: _Parts) -> Any:
    """What JSON can say of an argument; its tensors and numbers go to the lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    lists = (("Tensor", Tensor, parts.tensors), ("int", int, parts.ints), ("float", float, parts.floats))
    for kind, python_type, part in lists:
        if isinstance(value, python_type):
            part.append(value)
            return {kind: len(part) - 1}
    if isinstance(value, VocabShard):
        return {"VocabShard": value.described}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value).__name__ in _KINDS:
        fields = {f.name: _pack(name, getattr(value, f.name), parts) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if isinstance(value, dict):  # from statistics to bounds; as pairs it is the same option
        value = tuple(value.items())
    if isinstance(value, (list, tuple)):
        # names written out, here and above: Dynamo of PyTorch 2.11 does not follow the __name__ of a built-in type
        return {"list" if isinstance(value, list) else "tuple": [_pack(name, x, parts) for x in value]}
    raise TypeError(f"{name} is a {type(value).__name__}, which a compiled graph cannot hold")


def _unpack(value: Any, parts: _Parts) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _KINDS:
        return _KINDS[kind](**{name: _unpack(x, parts) for name, x in content.items()})
    if kind == "VocabShard":
        return VocabShard.of(content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind in ("list", "tuple"):
        values = [_unpack(x, parts) for x in content]
        return values if kind == "list" else tuple(values)
    return {"Tensor": parts.tensors, "int": parts.ints, "float": parts.floats}[kind][content]


def _packed(name: str, student: Head, arguments: dict[str, Any]) -> _Packed:
    """A call under a compiler; ``name`` is what the call calls the student."""
    require_kind(name, student)
    parts = _Parts([], [], [])
    static = {name: _pack(name, student, parts)}
    own = parts.tensors + [None] * (3 - len(parts.tensors))
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in own]
    # a Function is told that its inputs require gradients even where nobody wants any
    rows, weight, bias = [x if x is None or needed else x.detach() for x, needed in zip(own, needs, strict=True)]
    parts = parts._replace(tensors=[None] * 3)
    for key, value in arguments.items():
        static[key] = _pack(key, value, parts)
    others = [x.detach() for x in parts.tensors[3:]]
    # PyTorch keeps compiled code on disk by the ops and their arguments, not by the shapes that ops return: with the
    # number of statistics among the arguments, code that was compiled for another version of this package is not taken
    from .dynamo import dumps

    text = dumps({"needs": needs, "arguments": static, "statistics": STATISTICS})
    return _Packed(rows, weight, bias, others, parts.ints, parts.floats, text)


class _Call(NamedTuple):
    arguments: dict[str, Any]
    needs: RequiresGrad


def _call(packed: Sequence[Any]) -> _Call:
    """A call from the arguments of its op; symbols in them stay symbols."""
    *student, tensors, ints, floats, static = packed
    parts, parsed = _Parts([*student, *tensors], ints, floats), _loads(static)
    return _Call({name: _unpack(x, parts) for name, x in parsed["arguments"].items()}, RequiresGrad(*parsed["needs"]))


# ---------------------------------------------------------------------------------------------- what the ops have alike


def _op(name: str, extra: str = "") -> Callable[[Callable[..., list[Tensor]]], Any]:
    """Register an op that takes a call, after ``extra`` arguments, and returns tensors."""
    return torch.library.custom_op(
        f"fused_gopd::{name}",
        mutates_args=(),
        schema=f"({extra}{_SCHEMA}) -> Tensor[]",
        # the host waits in it for the number of live tokens: nothing that a CUDA graph can contain
        tags=(torch.Tag.cudagraph_unsafe,),
    )


def _dense(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """An op returns tensors only: an empty one in the place of None."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def _padded(x: Tensor, shape: Sequence[int], fill: float = 0) -> Tensor:
    """x in the corner of a larger tensor."""
    if x.shape == torch.Size(shape):
        return x
    out = x.new_full(tuple(shape), fill)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


def _fake_gradients(packed: Sequence[Any]) -> list[Tensor]:
    """Shapes and dtypes of the loop's gradients."""
    rows, weight, bias = packed[:3]
    needs, dtype = RequiresGrad(*_loads(packed[-1])["needs"]), accumulation_dtype(rows)
    gradients = Gradients(
        rows.new_empty(math.prod(rows.shape[:-1]), rows.shape[-1]) if needs.rows else None,
        weight.new_empty(weight.shape, dtype=dtype) if needs.weight else None,
        bias.new_empty(bias.shape, dtype=dtype) if needs.bias else None,
    )
    return _dense(gradients, rows.new_empty(0, dtype=dtype))


def _keep(ctx: Any, packed: Sequence[Any], made: Sequence[Tensor], recomputes: bool) -> None:
    """Keep what a backward needs: what the op made for it, and the call itself where it recomputes."""
    *student, tensors, ints, floats, static = packed
    ctx.needs, ctx.meta, ctx.recomputes = RequiresGrad(*_loads(static)["needs"]), core.meta_of(student), recomputes
    ctx.constants, ctx.others, ctx.made = (ints, floats, static), len(tensors), len(made)
    ctx.save_for_backward(*made, *((*student, *tensors) if recomputes else ()))
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """What the op made for the backward, and the call."""
    made, inputs = ctx.saved_tensors[: ctx.made], ctx.saved_tensors[ctx.made :]
    return list(made), (*inputs[:3], list(inputs[3:]), *ctx.constants)


def _given(ctx: Any, gradients: Sequence[Tensor] | None) -> tuple[Any, ...]:
    """What a backward gives for each argument of an op; None is nothing at all."""
    student: tuple[Tensor | None, ...] = (None,) * 3
    if gradients is not None:
        needed = [g if needs else None for g, needs in zip(gradients, ctx.needs, strict=True)]
        student = core.in_shape_of(needed, ctx.meta)
    # PyTorch takes an empty list for one of tensors
    numbers: list[Any] = [None if x else [] for x in ctx.constants[:2]]
    return (*student, [None] * ctx.others, *numbers, None)


# ------------------------------------------------------------------------------------------------------------- the loss

# Of the reported vectors that are not of the dtype of accumulation.
_DTYPES = {"clipped": torch.bool, "labelled": torch.bool, "teacher_index": torch.int64}


def _loss_call(packed: Sequence[Any]) -> tuple[LossCall, RequiresGrad]:
    """A loss from the arguments of its op."""
    arguments, requires = _call(packed)
    return LossCall(**arguments), requires


def _made(problem: Problem, requires: RequiresGrad, fields: Callable[..., list[Tensor]]) -> list[Tensor]:
    """A loss, the vectors that are reported, and what a backward needs.

    That is the student's gradients and two factors of them, or statistics of all tokens and the entries of topk.
    ``fields`` makes the vectors from the loss, its token values and the statistics.
    """
    rows, dtype = problem.rows, problem.dtype
    fused, entries = None, None
    if any(requires) and not problem.recomputes:
        fused = core.fused_forward(problem, requires)
        loss, values, statistics = fused.loss, fused.values, fused.statistics
    else:
        (token_loss,), maybe, statistics, entries = core.forward(problem, estimator_of, requires)
        assert maybe is not None
        values = maybe
        # cloned: no two results of an op may share memory
        weighted = token_loss * problem.weights
        loss = weighted.sum() if problem.options.reduction != "none" else rows.scatter(weighted).clone()
    result = [loss.to(dtype), *fields(loss, values, statistics)]
    if fused is not None:
        scaling = fused.scaling
        factors = (scaling.deferred_rows, scaling.deferred_weight)
        result += _dense(fused.gradients or (None,) * 3, statistics)
        result += [loss.new_ones((), dtype=dtype) if x is None else x.to(dtype, copy=True) for x in factors]
    elif any(requires):
        tokens = rows.shape.numel()
        result.append(_padded(statistics.to(dtype), (statistics.shape[0], tokens)))
        if entries is not None:
            shape = (tokens, problem.width)
            result += [_padded(entries.token_ids, shape, -1), _padded(entries.values.to(dtype), shape)]
    return result


class _Shapes(NamedTuple):
    """What the shapes of :func:`_made` follow from."""

    reduction: str
    dtype: torch.dtype
    reported: tuple[str, ...]
    recomputes: bool
    statistics: int  # rows
    width: int | None = None  # of topk


def _fake_made(packed: Sequence[Any], requires: RequiresGrad, call: _Shapes) -> list[Tensor]:
    rows, dtype = packed[0], call.dtype
    shape = rows.shape[:-1]
    result = [rows.new_empty(shape if call.reduction == "none" else (), dtype=dtype)]
    result += [rows.new_empty(shape, dtype=_DTYPES.get(name, dtype)) for name in call.reported]
    if any(requires) and not call.recomputes:
        result += [*_fake_gradients(packed), *(rows.new_empty((), dtype=dtype) for _ in range(2))]
    elif any(requires):
        tokens = math.prod(shape)
        result.append(rows.new_empty(call.statistics, tokens, dtype=dtype))
        if call.width is not None:
            result += [rows.new_empty(tokens, call.width, dtype=x) for x in (torch.int64, dtype)]
    return result


def _recomputed(problem: Problem, requires: RequiresGrad, upstream: Tensor, made: Sequence[Tensor]) -> list[Tensor]:
    """The student's gradients from the statistics and entries of :func:`_made`, its logits recomputed."""
    n = problem.rows.count
    statistics = made[0][:, :n].to(problem.dtype).contiguous()
    entries = None
    if len(made) > 1:
        ids, values = (x[:n].contiguous() for x in made[1:])
        entries = Entries(ids, values.to(problem.dtype))
    each = problem.rows.take(upstream) if problem.options.reduction == "none" else upstream.expand(n)
    each = each * problem.weights
    estimator = run.estimator_for(problem, estimator_of)
    return _dense(run.backward(estimator, requires, statistics, entries, each), statistics)


def _differentiable(op: Any, backward_op: Any, shapes: Callable[[Sequence[Any]], _Shapes]) -> None:
    """Give the op of a loss its gradients; ``backward_op`` computes them anew."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        call = shapes(inputs)
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, inputs, output[1 + len(call.reported) :], call.recomputes)

    def backward(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
        upstream = upstreams[0]
        if upstream is None:
            return _given(ctx, None)
        made, packed = _kept(ctx)
        if ctx.recomputes:
            return _given(ctx, backward_op(upstream, made, *packed))
        *gradients, rows, rest = made
        # not in place, as without a compiler: whoever compiles this finds that the buffers can be reused.
        # factors of one dimension: a 0-d one would be rounded to a low-precision gradient's dtype before it multiplies
        factors = [(upstream * x).reshape(1) for x in (rows, rest, rest)]
        return _given(ctx, [g * f if needed else g for g, f, needed in zip(gradients, factors, ctx.needs, strict=True)])

    op.register_autograd(backward, setup_context=keep)


@_op("loss")
def _loss_op(*packed: Any) -> list[Tensor]:
    call, requires = _loss_call(packed)
    with torch.no_grad():
        problem = prepare(call, weight_gradient=requires.weight)

        def fields(*made: Any) -> list[Tensor]:
            out = report(problem, *made)
            return [getattr(out, name).to(_DTYPES.get(name, problem.dtype)) for name in problem.reported]

        return _made(problem, requires, fields)


def _loss_shapes(packed: Sequence[Any]) -> _Shapes:
    call, _ = _loss_call(packed)
    return _Shapes(
        reduction=call.reduction,
        dtype=dtype_of(call),
        reported=reported_fields(call),
        recomputes=recomputes_in_backward(call),
        statistics=statistics_rows(call.estimator, call.joint, len(call.passes)),
        width=support_width(call) if call.estimator == "topk" else None,
    )


@_loss_op.register_fake  # type: ignore[untyped-decorator]
def _(*packed: Any) -> list[Tensor]:
    return _fake_made(packed, _loss_call(packed)[1], _loss_shapes(packed))


@_op("loss_backward", "Tensor upstream, Tensor[] made, ")
def _loss_backward_op(upstream: Tensor, made: Sequence[Tensor], *packed: Any) -> list[Tensor]:
    call, requires = _loss_call(packed)
    with torch.no_grad():
        return _recomputed(prepare(call, weight_gradient=requires.weight), requires, upstream, made)


@_loss_backward_op.register_fake  # type: ignore[untyped-decorator]
def _(upstream: Tensor, made: Sequence[Tensor], *packed: Any) -> list[Tensor]:
    return _fake_gradients(packed)


_differentiable(_loss_op, _loss_backward_op, _loss_shapes)


def gopd_loss(call: LossCall) -> GOPDOutput:
    """:func:`fused_gopd.gopd_loss` under a compiler."""
    arguments = {name: getattr(call, name) for name in ARGUMENTS if name != "student"}
    loss, *out = _loss_op(*_packed("student", call.student, arguments))
    fields: dict[str, Any] = dict.fromkeys(("advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "kl"))
    fields |= {"reward_scale": call.reward_scale}
    fields |= dict(zip(reported_fields(call), out, strict=False))
    mask = None if call.mask is None else call.mask != 0
    teachers = max(1, len(as_tuple(call.teacher)), len(as_tuple(call.ref)))
    return GOPDOutput(loss=loss, **fields, mask=mask, teachers=teachers, joint=call.joint)


# ------------------------------------------------------------------------------------------------------ cross entropy


def _nll_call(packed: Sequence[Any]) -> tuple[NLLCall, RequiresGrad]:
    arguments, requires = _call(packed)
    return NLLCall(**arguments), requires


@_op("nll")
def _nll_op(*packed: Any) -> list[Tensor]:
    call, requires = _nll_call(packed)
    with torch.no_grad():
        return _made(prepare_nll(call, weight_gradient=requires.weight), requires, lambda *_: [])


def _nll_shapes(packed: Sequence[Any]) -> _Shapes:
    call, _ = _nll_call(packed)
    return _Shapes(call.reduction, call.dtype, (), call.recomputes, STATISTICS)


@_nll_op.register_fake  # type: ignore[untyped-decorator]
def _(*packed: Any) -> list[Tensor]:
    return _fake_made(packed, _nll_call(packed)[1], _nll_shapes(packed))


@_op("nll_backward", "Tensor upstream, Tensor[] made, ")
def _nll_backward_op(upstream: Tensor, made: Sequence[Tensor], *packed: Any) -> list[Tensor]:
    call, requires = _nll_call(packed)
    with torch.no_grad():
        return _recomputed(prepare_nll(call, weight_gradient=requires.weight), requires, upstream, made)


@_nll_backward_op.register_fake  # type: ignore[untyped-decorator]
def _(upstream: Tensor, made: Sequence[Tensor], *packed: Any) -> list[Tensor]:
    return _fake_gradients(packed)


_differentiable(_nll_op, _nll_backward_op, _nll_shapes)


def linear_nll(call: NLLCall) -> Tensor:
    """:func:`fused_gopd.linear_nll` under a compiler."""
    arguments = {name: value for name, value in vars(call).items() if name != "head"}
    loss: Tensor = _nll_op(*_packed("head", call.head, arguments))[0]
    return loss


# --------------------------------------------------------------------------------------------------- one model's scores


@_op("token_logprobs")
def _logprobs_op(*packed: Any) -> list[Tensor]:
    """log-probs, entropies (of one token a position), and the statistics where a backward needs them."""
    arguments, requires = _call(packed)
    with torch.no_grad():
        problem = prepare_scoring(**arguments)
        values, _, statistics, _ = core.forward(problem, _scoring(arguments), requires)
        rows = problem.rows
        kept = [_padded(statistics, (statistics.shape[0], rows.shape.numel()))] if any(requires) else []
        if arguments.get("selected"):
            return [rows.scatter_entries(values[0]).clone(), statistics.new_empty(0), *kept]
        return [*(rows.scatter(x).clone() for x in values), *kept]


def _scoring(arguments: dict[str, Any]) -> MakeEstimator:
    return SelectedLogProbs if arguments.get("selected") else LogProbsAndEntropy


@_logprobs_op.register_fake  # type: ignore[untyped-decorator]
def _(*packed: Any) -> list[Tensor]:
    rows, dtype, (arguments, requires) = packed[0], accumulation_dtype(packed[0]), _call(packed)
    shape, ids = rows.shape[:-1], arguments["token_ids"]
    shapes, kept = ((ids.shape, (0,)), ids.shape[-1]) if arguments.get("selected") else ((shape, shape), 0)
    made = [rows.new_empty(x, dtype=dtype) for x in shapes]
    return made + [rows.new_empty(STATISTICS + kept, math.prod(shape), dtype=dtype)] * any(requires)


@_op("token_logprobs_backward", "Tensor? upstream, Tensor? upstream_entropy, Tensor statistics, ")
def _logprobs_backward_op(
    upstream: Tensor | None, upstream_entropy: Tensor | None, statistics: Tensor, *packed: Any
) -> list[Tensor]:
    arguments, requires = _call(packed)
    with torch.no_grad():
        problem = prepare_scoring(**arguments)
        statistics = statistics[:, : problem.rows.count].contiguous()
        given = (upstream,) if arguments.get("selected") else (upstream, upstream_entropy)
        each = (None if x is None else problem.rows.take(x) for x in given)
        estimator = run.estimator_for(problem, _scoring(arguments))
        return _dense(run.backward(estimator, requires, statistics, None, *each), statistics)


@_logprobs_backward_op.register_fake  # type: ignore[untyped-decorator]
def _(upstream: Tensor | None, upstream_entropy: Tensor | None, statistics: Tensor, *packed: Any) -> list[Tensor]:
    return _fake_gradients(packed)


def _keep_logprobs(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, inputs, output[2:], recomputes=True)


def _logprobs_backward(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream, upstream_entropy = upstreams[:2]
    if upstream is None and upstream_entropy is None:
        return _given(ctx, None)
    (statistics,), packed = _kept(ctx)
    return _given(ctx, _logprobs_backward_op(upstream, upstream_entropy, statistics, *packed))


_logprobs_op.register_autograd(_logprobs_backward, setup_context=_keep_logprobs)


def token_logprobs(head: Head, token_ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """:func:`fused_gopd.token_logprobs` and entropies under a compiler."""
    arguments = {"token_ids": token_ids, **options}
    logprobs, entropy, *_ = _logprobs_op(*_packed("head", head, arguments))
    return logprobs, entropy


def selected_logprobs(head: Head, token_ids: Tensor, options: dict[str, Any]) -> Tensor:
    """:func:`fused_gopd.selected_logprobs` under a compiler."""
    arguments = {"token_ids": token_ids, "selected": True, **options}
    logprobs: Tensor = _logprobs_op(*_packed("head", head, arguments))[0]
    return logprobs


@_op("token_topk")
def _topk_op(*packed: Any) -> list[Tensor]:
    return list(topk_tokens(**_call(packed).arguments))


@_topk_op.register_fake  # type: ignore[untyped-decorator]
def _(*packed: Any) -> list[Tensor]:
    rows = packed[0]
    shape = (*rows.shape[:-1], _call(packed).arguments["k"])
    return [rows.new_empty(shape, dtype=dtype) for dtype in (torch.int64, accumulation_dtype(rows))]


def token_topk(head: Head, k: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """:func:`fused_gopd.token_topk` under a compiler."""
    with torch.no_grad():
        ids, logprobs = _topk_op(*_packed("head", head, {"k": k, **options}))
    return ids, logprobs
