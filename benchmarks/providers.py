"""The implementations that are compared. A provider makes a function of a workload's inputs that does one step.

eager            fused_gopd.reference: dense PyTorch that also reports entropy and KL and supports -inf logits
eager-lean       the shortest dense PyTorch that is correct for finite logits, without other outputs
compile          torch.compile of eager-lean's function, one graph without breaks
compile-chunked  the same compiled function on chunks of tokens, with the gradients of each chunk
fused-NAME       this package on its backend NAME
others           peers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd import reference, rowops
from fused_gopd.loop.chunking import chunk_size_for, logits_buffers

from .workloads import CLIP, JOBS, JSD_BETA, REWARD_SCALE, Inputs, Workload


class Result(NamedTuple):
    loss: Tensor  # of the job "logprobs" (N,) log-probs
    gradients: tuple[Tensor, ...]  # of Inputs.leaves


Computation = Callable[[Inputs], Result]
Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    jobs: tuple[str, ...]
    prepare: Callable[[Workload], Computation]
    unavailable: Callable[[Workload], str | None]  # why it cannot run here; None if it can
    compiles: bool = False  # whether the first call compiles


# -------------------------------------------------------------------------------------------------- the work, densely


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logprob(logits: Tensor, token_ids: Tensor) -> Tensor:
    z = _wide(logits)
    return z.gather(-1, token_ids[:, None])[:, 0] - z.logsumexp(-1)


def advantage(log_p: Tensor, log_q: Tensor, log_r: Tensor) -> Tensor:
    """A = lambda log q + (1 - lambda) log r - log p, detached"""
    return (REWARD_SCALE * log_q + (1 - REWARD_SCALE) * log_r - log_p).detach()


def policy_loss(log_p: Tensor, inputs: Inputs) -> Tensor:
    """mean of max(-A rho, -A clamp(rho)), rho = p / p_old, A of the old policy"""
    old, log_q, log_r = inputs.scores
    a, rho = advantage(old, log_q, log_r), (log_p - old).exp()
    return torch.maximum(-a * rho, -a * rho.clamp(1 - CLIP, 1 + CLIP)).mean()


def _policy(logits: Sequence[Tensor], inputs: Inputs) -> Tensor:
    return policy_loss(logprob(logits[0], inputs.token_ids), inputs)


def _reverse_kl(logits: Sequence[Tensor], _: Inputs) -> Tensor:
    """mean of sum_v p (log p - log q)"""
    log_p, log_q = (_wide(x).log_softmax(-1) for x in logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _forward_kl(logits: Sequence[Tensor], _: Inputs) -> Tensor:
    """mean of sum_v q (log q - log p)"""
    log_p, log_q = (_wide(x).log_softmax(-1) for x in logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _jsd(logits: Sequence[Tensor], _: Inputs) -> Tensor:
    """mean of beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p"""
    log_p, log_q = (_wide(x).log_softmax(-1) for x in logits)
    log_m = torch.logaddexp(log_q + math.log(JSD_BETA), log_p + math.log(1 - JSD_BETA))
    terms = JSD_BETA * log_q.exp() * (log_q - log_m) + (1 - JSD_BETA) * log_p.exp() * (log_p - log_m)
    return terms.sum(-1).mean()


def _kl_ce(logits: Sequence[Tensor], inputs: Inputs) -> Tensor:
    """mean of sum_v q (log q - log p) - log p[token]"""
    return _forward_kl(logits, inputs) - logprob(logits[0], inputs.token_ids).mean()


def _sampled(logits: Sequence[Tensor], inputs: Inputs) -> Tensor:
    """mean of -A rho, rho = 1"""
    log_p, log_q, log_r = (logprob(x, inputs.token_ids) for x in logits)
    return -(advantage(log_p, log_q, log_r) * (log_p - log_p.detach()).exp()).mean()


def _full(logits: Sequence[Tensor], _: Inputs) -> Tensor:
    """mean of sum_v p [log p - lambda log q - (1 - lambda) log r]"""
    log_p, log_q, log_r = (_wide(x).log_softmax(-1) for x in logits)
    return (log_p.exp() * (log_p - REWARD_SCALE * log_q - (1 - REWARD_SCALE) * log_r)).sum(-1).mean()


OBJECTIVES: dict[str, Callable[[Sequence[Tensor], Inputs], Tensor]] = {
    "logprobs": lambda logits, inputs: logprob(logits[0], inputs.token_ids),
    "nll": lambda logits, inputs: -logprob(logits[0], inputs.token_ids).mean(),
    "policy": _policy,
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "kl_ce": _kl_ce,
    "sampled": _sampled,
    "full": _full,
}


def dense(workload: Workload) -> Loss:
    """The job's loss of unmasked inputs, with dense logits of every model."""
    objective, linear = OBJECTIVES[workload.kind.objective], workload.level == "hidden"

    def loss(inputs: Inputs) -> Tensor:
        if not linear:
            return objective(inputs.rows, inputs)
        assert inputs.weights is not None
        return objective([h @ w.T for h, w in zip(inputs.rows, inputs.weights, strict=True)], inputs)

    return loss


def differentiated(loss: Loss) -> Computation:
    """Loss and gradients of the leaves; without leaves, the forward alone."""

    def run(inputs: Inputs) -> Result:
        leaves = inputs.leaves
        if not leaves:
            with torch.no_grad():
                return Result(loss(inputs), ())
        value = loss(inputs)
        return Result(value.detach(), torch.autograd.grad(value, leaves))

    return run


def of_live(loss: Loss) -> Computation:
    return differentiated(lambda inputs: loss(inputs.live()))


def oracle(workload: Workload, inputs: Inputs) -> Result:
    """The dense function on these inputs, which should be float64."""
    return of_live(dense(workload))(inputs)


# ----------------------------------------------------------------------------------------------------- dense providers


def _compile(workload: Workload) -> Computation:
    return of_live(torch.compile(dense(workload), fullgraph=True, dynamic=False))


# Suffix of this package's providers whose chunks have logits in the dtype of the heads.
LOW_CHUNKS = "-low-chunks"


def buffers(workload: Workload) -> float:
    """Number of [C, V] logits buffers alive at once in a chunk."""
    joint = workload.kind.objective not in ("logprobs", "nll", "policy", "sampled")
    device_type, trained = torch.device(workload.device).type, not workload.frozen
    return logits_buffers(joint, workload.kind.models, weight_gradient=trained, device_type=device_type)


def chunk_size(workload: Workload, element_bytes: int = 4) -> int:
    """Tokens per chunk in this package, and in compile-chunked."""
    device_type = torch.device(workload.device).type
    fitting = chunk_size_for(workload.vocab, buffers(workload), device_type, element_bytes)
    return min(workload.live_tokens, fitting)


def _chunks(inputs: Inputs, size: int) -> list[Inputs]:
    """Chunks of at most two sizes, so that two shapes are compiled; the student's hidden states are leaves."""
    tokens = inputs.token_ids.shape[0]
    count = -(-tokens // size)
    parts = []
    for i in range(count):
        s = slice(tokens * i // count, tokens * (i + 1) // count)
        student, *others = (h.detach()[s] for h in inputs.rows)
        student.requires_grad_(inputs.rows[0].requires_grad)
        scores = tuple(x[s] for x in inputs.scores)
        parts.append(
            Inputs(
                rows=(student, *others), weights=inputs.weights, token_ids=inputs.token_ids[s], mask=None, scores=scores
            )
        )
    return parts


def _compile_chunked(workload: Workload) -> Computation:
    """Gradients of each chunk in the forward, the weight's accumulated in float32."""
    loss, size = torch.compile(dense(workload), fullgraph=True, dynamic=False), chunk_size(workload)

    def forward(inputs: Inputs) -> Result:
        with torch.no_grad():
            return Result(torch.cat([loss(part) for part in _chunks(inputs.live(), size)]), ())

    def run(inputs: Inputs) -> Result:
        live = inputs.live()
        tokens, total = live.token_ids.shape[0], torch.zeros((), device=workload.device)
        dhidden: list[Tensor] = []
        dweight: Tensor | None = None
        for part in _chunks(live, size):
            value = loss(part) * (part.token_ids.shape[0] / tokens)
            total += value.detach()
            dh, *dw = torch.autograd.grad(value, part.leaves)
            dhidden.append(dh)
            if dw:
                dweight = dw[0].float() if dweight is None else dweight.add_(dw[0])
        dh = torch.cat(dhidden)
        if inputs.mask is not None:
            dh = dh.new_zeros(inputs.rows[0].shape).index_copy_(0, inputs.mask.nonzero()[:, 0], dh)
        return Result(total, (dh,) if dweight is None else (dh, dweight.to(dh.dtype)))

    return run if workload.kind.backward else forward


# -------------------------------------------------------------------------------------------------------- this package


def _heads(inputs: Inputs) -> tuple[fg.LinearHead | fg.Logits, ...]:
    if inputs.weights is None:
        return tuple(fg.Logits(x) for x in inputs.rows)
    return tuple(fg.LinearHead(h, w) for h, w in zip(inputs.rows, inputs.weights, strict=True))


def gopd(
    gopd_loss: Callable[..., fg.GOPDOutput], workload: Workload, inputs: Inputs, backend: str, **options: Any
) -> Tensor:
    """The job as a call of this package, or of its dense reference with the same signature."""
    objective, heads = workload.kind.objective, _heads(inputs)
    options |= {"reward_scale": REWARD_SCALE, "mask": inputs.mask, "backend": backend}
    ids: Tensor | None = inputs.token_ids
    if objective == "policy":
        old, q, r = inputs.scores
        heads = (*heads, fg.TokenLogProbs(q), fg.TokenLogProbs(r))  # type: ignore[assignment]
        options |= {"old_logprobs": old, "clip": (CLIP, CLIP)}
    elif objective != "sampled":
        ids = None
        options["estimator"] = "full"
    if len(heads) == 2:
        heads = (*heads, None)  # type: ignore[assignment]
        options |= {"reward_scale": 1.0, "divergence": "forward_kl" if objective == "kl_ce" else objective}
        if objective == "jsd":
            options["beta"] = JSD_BETA
        if objective == "kl_ce":
            options |= {"sft_labels": inputs.token_ids, "sft_weight": 1.0}
    return gopd_loss(*heads, ids, **options).loss


def _package(backend: str) -> Callable[[Workload], Computation]:
    def prepare(workload: Workload) -> Computation:
        def logprobs(inputs: Inputs) -> Tensor:
            found = fg.token_logprobs(_heads(inputs)[0], inputs.token_ids, mask=inputs.mask, backend=backend)
            assert isinstance(found, Tensor)
            return found

        if workload.job == "logprobs":
            return differentiated(logprobs)
        if workload.job == "nll":
            return differentiated(lambda inputs: -logprobs(inputs).sum() / live_count(inputs))
        return differentiated(lambda inputs: gopd(fg.gopd_loss, workload, inputs, backend))

    return prepare


def _low_chunks(backend: str) -> Callable[[Workload], Computation]:
    """This package with a chunk's logits in the dtype of the heads."""

    def prepare(workload: Workload) -> Computation:
        return differentiated(lambda i: gopd(fg.gopd_loss, workload, i, backend, chunk_dtype=workload.dtype))

    return prepare


def _stored(backend: str) -> Callable[[Workload], Computation]:
    """This package with exponentials stored by the product of the student's logits."""

    def prepare(workload: Workload) -> Computation:
        return differentiated(lambda i: gopd(fg.gopd_loss, workload, i, backend, store_exponentials=True))

    return prepare


def live_count(inputs: Inputs) -> int | Tensor:
    return inputs.token_ids.shape[0] if inputs.mask is None else inputs.mask.sum()


def _one_pass(backend: str, low: bool = False, stored: bool = False) -> Callable[[Workload], Computation]:
    """NLL with its gradient in the forward; ``stored`` by gopd_loss at a constant advantage of 1."""

    def prepare(workload: Workload) -> Computation:
        def run(inputs: Inputs) -> Result:
            (student,) = _heads(inputs)
            if not stored:
                more: dict[str, Any] = {"chunk_dtype": workload.dtype} if low else {}
                loss = fg.linear_nll(student, inputs.token_ids, mask=inputs.mask, backend=backend, **more)
                return Result(loss, torch.autograd.grad(loss, inputs.leaves))
            nothing = fg.TokenLogProbs(torch.zeros(inputs.token_ids.shape, device=inputs.token_ids.device))
            options: dict[str, Any] = {"advantage_fn": lambda stats: torch.ones_like(stats.student_logprobs)}
            options |= {"store_exponentials": True, "backend": backend}
            out = fg.gopd_loss(student, nothing, None, inputs.token_ids, mask=inputs.mask, **options)
            gradients = torch.autograd.grad(out.loss, inputs.leaves)
            assert out.student_logprobs is not None
            return Result(-out.student_logprobs.sum() / live_count(inputs), gradients)

        return run

    return prepare


# ----------------------------------------------------------------------------------------------------------- registry

FUSED_PREFIX = "fused-"
BACKENDS = tuple(reversed(rowops.BACKENDS))
_ALL = tuple(JOBS)
_HIDDEN = tuple(name for name, job in JOBS.items() if job.level == "hidden")
_REFERENCE = tuple(name for name, job in JOBS.items() if job.models > 1)
_LOSS = tuple(name for name in _HIDDEN if name not in ("logprobs", "nll"))  # jobs of gopd_loss from hidden states


def _free_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # else memory cached by the allocator counts as used
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _too_dense(tensors: int) -> Callable[[Workload], str | None]:
    """Why dense code cannot run: its [tokens, vocabulary] tensors do not fit, which could take the machine down."""

    def reason(workload: Workload) -> str | None:
        needed, free = tensors * workload.live_tokens * workload.vocab * 4, _free_memory(workload.device)
        if needed <= free:
            return None
        return f"its logits take {needed / 2**30:.0f} GiB of {free / 2**30:.0f} GiB free memory"

    return reason


def _backend_reason(backend: str) -> Callable[[Workload], str | None]:
    def reason(workload: Workload) -> str | None:
        made_for = rowops.BACKENDS[backend].default_on
        if made_for not in (None, torch.device(workload.device).type):
            return f"for a {'CPU' if made_for == 'cpu' else 'GPU'}"
        return rowops.unavailable_reason(backend)

    return reason


def _low_reason(backend: str) -> Callable[[Workload], str | None]:
    def reason(workload: Workload) -> str | None:
        if torch.device(workload.device).type == "cpu":
            return "for a GPU"
        return "the heads are float32" if workload.dtype == torch.float32 else _backend_reason(backend)(workload)

    return reason


def _stored_reason(workload: Workload) -> str | None:
    if torch.device(workload.device).type == "cpu":
        return "for a GPU"
    return _backend_reason("triton")(workload) if workload.dtype == torch.bfloat16 else "the heads are not bfloat16"


def _one_chunk(workload: Workload) -> str | None:
    return (
        "all tokens fit one chunk: the same as without chunks" if chunk_size(workload) == workload.live_tokens else None
    )


def _fused() -> dict[str, Provider]:
    found = {}
    for backend in BACKENDS:
        found[FUSED_PREFIX + backend] = Provider(_ALL, _package(backend), _backend_reason(backend))
        found[f"{FUSED_PREFIX}{backend}-one-pass"] = Provider(("nll",), _one_pass(backend), _backend_reason(backend))
    low_chunks = {"": Provider(_LOSS, _low_chunks("triton"), _low_reason("triton"))}
    low_chunks["-one-pass"] = Provider(("nll",), _one_pass("triton", low=True), _low_reason("triton"))
    found |= {f"{FUSED_PREFIX}triton{name}{LOW_CHUNKS}": provider for name, provider in low_chunks.items()}
    found[FUSED_PREFIX + "triton-stored"] = Provider(("policy", "hidden-sampled"), _stored("triton"), _stored_reason)
    one_pass = _one_pass("triton", stored=True)
    return found | {FUSED_PREFIX + "triton-one-pass-stored": Provider(("nll",), one_pass, _stored_reason)}


# float32 tensors of [tokens, vocabulary] alive at once; fused_gopd.cli.plan.cost.dense_peak says where
OWN = {
    **_fused(),
    "compile-chunked": Provider(_HIDDEN, _compile_chunked, _one_chunk, compiles=True),
    "compile": Provider(_ALL, _compile, _too_dense(2), compiles=True),
    "eager-lean": Provider(_ALL, lambda w: of_live(dense(w)), _too_dense(5)),
    "eager": Provider(
        _REFERENCE, lambda w: differentiated(lambda i: gopd(reference.gopd_loss, w, i, "auto")), _too_dense(9)
    ),
}
