"""The public calls: a call becomes a problem, the loop runs, the output is reported. Nothing has a vocabulary axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, compiled, hints  # noqa: F401
from .checks import require_reverse_mode
from .heads import Head
from .nll import NLLCall, prepare_nll
from .option_checks import checked_options
from .options import OPTIONS, PARAMETERS, RULES, LossCall
from .output import GOPDOutput
from .prepare import prepare
from .report import report
from .scoring import prepare_scoring, topk_tokens
from .signatures import called_as
from .targets import Frozen
from .values import refuse_unknown


def _gopd_loss(call: LossCall) -> GOPDOutput:
    require_reverse_mode("gopd_loss", call.student)
    problem = prepare(call)
    if call.reduction == "none":
        token_loss, values, statistics = autograd.token_losses(problem)
        loss = problem.rows.scatter(token_loss * problem.weights if problem.weights.ndim else token_loss)
        values = values._replace(loss=values.loss.clone())  # the caller owns the loss, and may write to it
    else:
        loss, values, statistics = autograd.weighted_loss(problem)
    return report(problem, loss, values, statistics)


@called_as(LossCall)
def gopd_loss(call: LossCall) -> GOPDOutput:
    """The G-OPD loss of three models, without a [tokens, vocabulary] tensor ever existing.

    Maximises E sum_t [lambda (log q - log r) - (log p - log r)] for a student p, teacher q and reference r: the
    optimum is log p = lambda log q + (1 - lambda) log r + const. lambda = 1 is ordinary on-policy distillation and
    never touches the reference; lambda > 1 extrapolates beyond the teacher.

    Where hidden states and heads of teacher and reference are here, pass ``estimator="full"``: it has the same expected
    gradient without the noise of the sampled token. The default is ``"sampled"``, which needs only log-probs of the
    sampled tokens.

    Shapes: ``(...)`` is the token shape, usually (B, T) or (N,). ``hidden[t]`` or ``logits[t]`` scores
    ``token_ids[t]``: the caller shifts. Outputs are float32, float64 where any input is float64.

    Args:
        student: LinearHead or Logits; gradients flow to its hidden states, weight and bias, or to its logits.
        teacher, ref: LinearHead, Logits, TokenLogProbs (``sampled``) or TopKLogProbs (``topk``) of the same token
            shape; hidden sizes, vocabulary sizes and kinds may differ. Never receive gradients. A list of teachers is
            routed by ``teacher_index``; ref is then one model for all, or a list routed alike. A
            :class:`fused_gopd.LogLinear` or :class:`fused_gopd.Mixture` is made of several models; docs/targets.md.
        token_ids: (...) integer, the sampled tokens. Required by ``sampled`` and by ``tail="sampled"``; for the others
            only for reporting.
        teacher_index: (...) or (B,) integer, which teacher of the list each token or sequence has. Only the tokens
            routed to a model pass through its GEMM.
        mask: (...) bool, or 0 and 1 in any dtype; tokens with 0 are skipped, and NaN in them has no effect.
        reward_scale: lambda: a float, a tensor (...), or one value per sequence (B,). A tensor needs both models.
        reward_scale_fn: in place of reward_scale: called with the :class:`fused_gopd.TokenStats` of each chunk, once,
            returns lambda (C,), detached. Needs both models, costs no GEMM; what it costs to read a statistic is in
            ``docs/per-token.md``. Neither it nor an ``advantage_fn`` can be in ``torch.compile(fullgraph=True)``.
        estimator: ``"sampled"``, the policy gradient at the sampled tokens (paper, Eq. 14 with the right sign);
            ``"full"``, the exact divergence over the vocabulary; ``"topk"``, the divergence over K tokens of each
            position, which a teacher behind a server can return, see below.
        divergence: of ``full`` and ``topk``: ``"reverse_kl"`` (the paper's -J per token), ``"forward_kl"``
            KL(target || p), or ``"jsd"`` with ``beta``: beta KL(target || m) + (1 - beta) KL(p || m),
            m = beta target + (1 - beta) p. ``beta=0`` is ``"forward_kl"`` and ``beta=1`` is ``"reverse_kl"``, value and
            gradient, as in Liger, TRL and ms-swift; the JSD itself goes to 0 there. And, with t the target:
            ``"skew_kl"`` KL(t || skew t + (1 - skew) p), ``"skew_reverse_kl"`` KL(p || (1 - skew) t + skew p),
            ``"alpha"`` (sum t^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1)), ``"mixed"`` forward_weight times the
            forward KL plus 1 - forward_weight times the reverse KL. docs/objectives.md has them all.
        beta: of ``"jsd"``, 0 ... 1.
        skew: of the two skew KLs, 0 <= skew < 1, default 0.1; 0 is the KL without a mixture.
        alpha: of ``"alpha"``, any number, default 0.5; 1 is the forward KL and 0 the reverse KL, with its value.
        forward_weight: of ``"mixed"``, 0 ... 1, default 0.5: a number, a tensor (...), or one value per sequence (B,).
        reduction: ``"token-mean"``, ``"seq-mean-token-mean"``, ``"seq-mean-token-sum"`` (sequences are dim 0, or
            those of cu_seqlens), ``"sum"`` or ``"none"``. ``"none"`` recomputes the logits in the backward, as
            ``ratio="sequence"`` does and, with float16 hidden states, what may make a gradient overflow before its
            weight is applied, or underflow beside it (old_logprobs, rollout_logprobs, advantage_fn, sft_labels,
            token_weight); all others do not.
        token_weight: factor of each token's loss, detached: a tensor (...), or one value per sequence (B,), finite and
            not negative. A weight of 0 leaves the token in the divisor of a mean, ``mask`` takes it out. With a list
            of teachers ``w[teacher_index]`` weighs them. ``token_loss`` and metrics are those before the factor.
        normalizer: the divisor of the means: the global count of tokens (``token-mean``) or live sequences; a number
            or one-element tensor. Default: this call's own count.
        sequence_lengths: (B,) the global number of live tokens of each sequence, for ``seq-mean-token-mean``: at least
            as many as it has here.
        cu_seqlens: (B + 1,) int32 or int64 bounds of packed sequences in tokens of shape (N,), from 0 to N; for
            reductions and options that know sequences. Where B = N, values (N,) are per token.

    Options of ``sampled``, applied in this order:
        logprob_min: teacher's and reference's log-probs are at least this, before any arithmetic: a token that they
            rule out then has a finite advantage.
        advantage_fn: an advantage of one's own in place of A: called with the :class:`fused_gopd.TokenStats` of each
            chunk, once, returns (C,), detached. Costs no GEMM. ``docs/per-token.md`` has published ones. With it
            teacher and ref may both be None: the advantages are the function's own, and ``reward_scale``,
            ``logprob_min``, ``baseline`` and ``score_cancelled`` have nothing to act on and are refused.
        baseline: ``"expected"`` adds the ``full`` value to the advantage, whose mean over the vocabulary is then 0:
            an unbiased control variate. The reported loss leaves it out. Needs whole-vocabulary heads, whose logits it
            holds together (chunk buffers as in ``full``), and no further GEMM where none is repeated. As in ``full``
            all models are then normalised over the joint support: a token outside it has advantage 0, whatever
            ``logprob_min`` is.
        advantage_clip: a bound on the advantage's magnitude, or a pair (low, high).
        old_logprobs: (...) log-probs under the policy of the previous update, for the ratio rho = p / p_old. Like all
            log-probs that are given, they must not be above 0 by more than rounding makes them (0.25); with an
            advantage_fn, where they serve the ratio alone, they may be shifted to make a ratio of one's own.
        advantage_policy: whether A is relative to the ``"old"`` log-probs, where they are given, or to the
            ``"current"`` student's.
        ratio: ``"token"``, or ``"sequence"``: exp of the mean over a sequence of log p - log p_old, with the gradient
            of the token (GSPO-token; Zheng et al. 2025). ``"sequence-mean"``: with the gradient of that mean (GSPO).
            Both recompute the logits in the backward. ``"detached"``: -A sg(rho) log p with rho bounded by ``clip``
            (CISPO). ``"none"``: 1; old_logprobs serve A and the weights alone.
        clip: (epsilon_low, epsilon_high) of PPO's clipped surrogate.
        clip_dual: above 1: where A < 0 the token loss is at most -A clip_dual (Ye et al. 2020).
        trust_region: {statistic: (low, high)} as in rollout_mask, of p and p_rollout: a token has weight 0 where the
            statistic is above high and A > 0, or below low and A < 0.

    Options of ``topk``, a divergence over the tokens of a support S, one outcome each, and the rest of the vocabulary:
        k: how many tokens S has, where it is made here: the largest of a head. TopKLogProbs bring their own ids; those
            of the reference must contain the teacher's, matched by id.
        support_ids: (..., K) integer, the tokens of S at each position, scored under every model; -1 where there are
            fewer than K, and one that is there twice counts once. In the place of ``k``.
        support: whose tokens S holds: ``"teacher"`` (the reference where lambda = 0 has cancelled it) or
            ``"student"``, which needs heads, whose logits are then in memory together with the student's.
        tail: ``"bucket"``: the mass outside S is one more outcome, unless it is below 1e-6 in any of the models;
            ``"drop"``: that outcome's term is left out of the sum, so that equal models do not have gradient 0;
            ``"renormalize"``: each model is divided by its mass on S, and nothing outside S has a gradient;
            ``"sampled"``, of the reverse KL: a sampled token outside S adds what it has in ``sampled``, so that value
            and gradient have the expectation of ``full`` whatever S is, as long as S does not depend on that token.
            Without tokens in S (k=0) it is ``sampled``. TopKLogProbs have ``sampled_logprobs`` then.
            The student's log-probs have the full normaliser. A token of probability 0 under a model is not in S, unless
            ``logprob_min`` is given: teacher's and reference's log-probs of the tokens of S are then at least that, and
            the target is normalised with them, in ``"drop"`` without them. A position where S is empty has loss 0.
        student_logprob_min: of ``tail="drop"``: the student's log-probs of the tokens of S are at least this. One that
            this raises is a constant, without a gradient.

    Options of every estimator (docs/off-policy.md has the first six):
        rollout_logprobs: (...) log-probs under the engine that sampled. Token losses are multiplied by the detached
            weight p_old / p_rollout (truncated importance sampling; Yao et al. 2025); without old_logprobs the
            student's own p stands for p_old. Needs token_ids. ``full`` and ``topk`` take old_logprobs for it too.
        rollout_is: that weight is of a ``"token"``; the product over the ``"sequence"``; its ``"geometric"`` mean; or
            ``"none"``, 1. Of sequences and without old_logprobs the backward recomputes the logits.
        rollout_is_cap: upper bound of the weight, or a pair (low, high); None is 1.8e19, the most that there is.
        rollout_mask: {statistic: (low, high)}, None for no bound: tokens outside have weight 0. Of d = log p_old - log
            p_rollout: ``token_ratio`` exp(d), ``sequence_ratio`` (product), ``geometric_ratio``, ``seq_max_ratio``,
            ``seq_min_ratio``; k2 = d^2 / 2 and k3 = exp(d) - 1 - d as ``token_k2``, ``seq_sum_k2``, ``seq_mean_k2``,
            ``seq_max_k2``, ...; ``token_difference`` p_old - p_rollout.
        log_ratio_max: bound on the magnitude of log rho and of the log of the weight, before exp.
        loss_max: bound on the magnitude of the token loss before the weight; no gradient where it is in force.
        sft_labels: (...) integer, the label of a supervised term at each token, -100 for none. From the same logits:
            no GEMM more. A label with probability 0 under the student adds nothing.
        sft_weight: the token loss is that of the estimator plus ``sft_weight`` times -log p[label].
        sft_temperature: the temperature of that p alone, in place of the student's: Liger's hard loss at 1 beside a
            soft loss at T.
        entropy_weight: the token loss less ``entropy_weight`` times the student's entropy, over its own support.
        kl_ref: adds a KL penalty to the reference, which is then needed whatever lambda is: of ``sampled`` the
            estimates ``"k1"``, ``"k2"`` and ``"k3"`` at the sampled token, of ``full`` ``"exact"``, KL(p || r) over the
            vocabulary. Neither ratio nor advantage is applied to it. With an advantage_fn teacher may be None.
        kl_ref_weight: the factor of that penalty, at least 0. docs/terms.md has what each of these terms costs.

    More options:
        score_cancelled: score the model that lambda cancels too, forward only, for its log-probs.
        vocab_size: joint vocabulary; default the smallest of the models given. Rows past it are padding.
        chunk_size: tokens per chunk; default from a memory budget (``fused_gopd.loop.chunking.chunk_size_for``).
        chunk_dtype: dtype of the chunk's logits. Default float32 (float64). bfloat16 or float16, on a GPU where all
            heads are of that dtype: half the bytes, so faster and with chunks of more tokens. Logits are then rounded
            as a model that returns them in that dtype rounds them (bfloat16: by up to 0.06 between 16 and 32), and
            log-probs and gradients are as accurate as dense code makes them from such logits. What the ``triton``
            backend scores without a buffer is not rounded: teacher and reference in ``sampled``, the student where no
            gradient is asked for, ``token_logprobs`` (so the ratio to ``old_logprobs`` from there is 1 but for the
            rounding, where the policy is the same).
        grad_filter: leave the vocabulary entries whose logit gradient is below this at every token of a chunk out of
            the two gradient GEMMs; 0 leaves out none. The gradient meant is that with respect to the raw logits at
            unit scale: of l in ``full``, p - 1[v = y] in ``sampled``, over the token's largest entry in ``topk``, with
            labels and where a backward recomputes; w is what multiplies it later (weight, advantage). A biased
            approximation with a bound: dhidden of a token is off by at most ``|w| grad_filter`` times the sum of the
            norms of the weight's rows that are left out, and each of these rows of dweight by at most
            ``grad_filter sum_t |w_t| ||hidden_t||``. A bias keeps its exact gradient. Deterministic, but which entries
            are left out depends on chunk_size. Waits for the device once a chunk. (Idea: Apple's cut-cross-entropy.)
        store_exponentials: of ``sampled`` on ``triton``, for a ``LinearHead`` in bfloat16 without softcap or shard. The
            product that makes the student's logits stores exp(z - z[y]) in bfloat16 in their place: the logit gradient
            up to factors per token, so that no logit is written and no row read. The entry at y is put back in float32.
            Log-probs are those of float32 logits, gradients nearer to exact ones (docs/objectives.md). Not yet run on a
            GPU. Not with ``baseline``, ``grad_filter``, labels, ``reduction="none"`` or what recomputes for sequences.
        backend: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Memory: beyond inputs and gradients, chunk buffers, independent of the number of tokens: chunk_size x V of the
    student, in ``full`` as much for each other model (on a GPU a fourth of it where the weight is trainable), and one
    float32 V x H accumulator where a low-precision weight is trainable. ``topk`` keeps 12 bytes for each of the K
    tokens of a position where a backward recomputes.

    Work: 3 student GEMMs and one for each other model that is needed; 2 fewer GEMMs without gradients, one fewer for
    a frozen weight or frozen hidden states.

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what was expected and what was found.
        RuntimeError: a backend that was asked for by name is not available.
    """
    if not torch.compiler.is_compiling():
        return _gopd_loss(call)
    if call.advantage_fn is None and call.reward_scale_fn is None:
        return compiled.gopd_loss(call)
    from .dynamo import outside_of_graphs

    output: GOPDOutput = outside_of_graphs(_gopd_loss, call)
    return output


def token_logprobs(
    head: Head,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log-probs of given tokens under one model, and its entropy, at the memory bound of :func:`gopd_loss`.

    What a trainer scores teacher, reference and old policy with. Both results are differentiable in the head's
    tensors; the backward recomputes the logits. Under ``torch.no_grad()`` it is one GEMM and nothing is kept.

    Args:
        head: LinearHead or Logits with token shape (...).
        token_ids: (...) integer; ``hidden[t]`` scores ``token_ids[t]``.
        mask: (...) bool, or 0 and 1 in any dtype; masked tokens give 0 and cost nothing.
        return_entropy: also return the entropy in nats.
        vocab_size: entries past it are padding; default all.
        chunk_size, backend: as in :func:`gopd_loss`.

    Returns:
        (...) log-probs <= 0, or the pair (log-probs, entropies); float32, float64 for float64 inputs.
    """
    if token_ids is None:
        raise ValueError("token_ids must be given")
    options: dict[str, Any] = {"mask": mask, "vocab_size": vocab_size, "chunk_size": chunk_size, "backend": backend}
    if torch.compiler.is_compiling():
        logprobs, entropy = compiled.token_logprobs(head, token_ids, options)
        return (logprobs, entropy) if return_entropy else logprobs
    problem = prepare_scoring(head, token_ids, **options)
    results = tuple([problem.rows.scatter(x) for x in autograd.token_logprobs(problem, return_entropy)])
    return (results[0], results[1]) if return_entropy else results[0]


@called_as(NLLCall)
def linear_nll(call: NLLCall) -> Tensor:
    """The cross entropy of labels from hidden states and output weight, in the memory of :func:`gopd_loss`.

    Supervised fine-tuning. The token loss is, with e = ``label_smoothing`` and Z = sum_v exp z_v,

        (1 - e) (-log p[label]) + e mean_v(-log p_v) + z_loss (log Z)^2

    as in ``torch.nn.functional.cross_entropy`` and, with a z-loss, PaLM, Liger and quack. Three GEMMs: gradients are
    computed with the loss. Tokens without a label cost nothing.

    Args:
        head: LinearHead or Logits with token shape (...); gradients flow to its tensors.
        labels: (...) integer; ``hidden[t]`` predicts ``labels[t]``: the caller shifts. -100 for no label.
        mask: (...) bool, or 0 and 1 in any dtype: tokens with 0 have no label either.
        token_weight: factor of each token's loss, as in :func:`gopd_loss`.
        label_smoothing: 0 ... 1. The mean runs over the entries that exist: a logit of -inf is none.
        z_loss: weight of (log Z)^2, at least 0. Statistics and gradient are then two passes over a chunk's logits.
        reduction, normalizer, sequence_lengths, cu_seqlens: as in :func:`gopd_loss`. The tokens that count are those
            with a label. Without any the loss is 0.
        vocab_size: entries past it are padding; default all.
        chunk_size, chunk_dtype, grad_filter, backend: as in :func:`gopd_loss`.

    Returns:
        the loss (), or with ``reduction="none"`` the token losses (...), 0 where there is no label; float32, float64
        for float64 inputs. A label with probability 0 has the loss inf.

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what was expected and what was found.
    """
    if torch.compiler.is_compiling():
        return compiled.linear_nll(call)
    problem = prepare_nll(call)
    if call.reduction == "none":
        return problem.rows.scatter(autograd.token_losses(problem)[0] * problem.weights)
    return autograd.weighted_loss(problem)[0]


def selected_logprobs(
    head: Head,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log-probs of several given tokens of each position under one model, at the memory bound of :func:`gopd_loss`.

    :func:`token_logprobs` with K tokens a position: one GEMM, and K numbers a token are kept. Differentiable in the
    head's tensors; the backward recomputes the logits.

    Args:
        head: LinearHead or Logits with token shape (...).
        token_ids: (..., K) integer; -1 where there are fewer than K. A token may be there more than once.
        mask: (...) bool, or 0 and 1 in any dtype; masked tokens give 0 and cost nothing.
        vocab_size: entries past it are padding; default all.
        chunk_size, backend: as in :func:`gopd_loss`.

    Returns:
        (..., K) log-probs <= 0, normalised over the vocabulary, 0 where the id is -1; float32, float64 for float64
        inputs.
    """
    options: dict[str, Any] = {"mask": mask, "vocab_size": vocab_size, "chunk_size": chunk_size, "backend": backend}
    if token_ids is None:
        raise ValueError("token_ids must be given")
    if torch.compiler.is_compiling():
        return compiled.selected_logprobs(head, token_ids, options)
    problem = prepare_scoring(head, token_ids, selected=True, **options)
    return problem.rows.scatter_entries(autograd.selected_logprobs(problem))


def token_topk(
    head: Head,
    k: int,
    *,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each position under one model, at the memory bound of :func:`gopd_loss`.

    What a teacher's server sends: ``TopKLogProbs(*token_topk(teacher, k))``. One GEMM; not differentiable.

    Args:
        head: LinearHead or Logits with token shape (...).
        k: how many, at most the vocabulary.
        mask: (...) bool, or 0 and 1 in any dtype; masked tokens cost nothing and have ids -1 and log-probs 0.
        vocab_size: entries past it are padding; default all.
        chunk_size, backend: as in :func:`gopd_loss`.

    Returns:
        ids (..., k) int64, the likeliest first, and their log-probs (..., k), normalised over the vocabulary; float32,
        float64 for float64 inputs.
    """
    options: dict[str, Any] = {"mask": mask, "vocab_size": vocab_size, "chunk_size": chunk_size, "backend": backend}
    if torch.compiler.is_compiling():
        return compiled.token_topk(head, k, options)
    return topk_tokens(head, k, **options)


_HELD = frozenset(name for name, rule in RULES.items() if rule.held)
_POSITIONAL = {"student", "teacher", "ref", "token_ids"}
_PER_BATCH = frozenset(name for name, rule in RULES.items() if rule.per_batch) - _POSITIONAL


class GOPDLoss(nn.Module):
    """:func:`gopd_loss` with its options held in a module.

    Args:
        **options: any argument of :func:`gopd_loss` that is the same for all batches: its options, ``reward_scale``,
            ``reward_scale_fn`` and ``advantage_fn``.

    ``forward(student, teacher, ref=None, token_ids=None, **batch)`` takes the batch: all other arguments, and
    ``reward_scale``, ``reward_scale_fn`` and ``advantage_fn`` to override the module's.

    Raises:
        TypeError, ValueError: naming an option that is unknown or wrong, when the module is made. What an option needs
            of the batch is checked by ``forward``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        refuse_unknown(options, _HELD, "an option of GOPDLoss")
        checked_options(**{name: value for name, value in options.items() if name in (*OPTIONS, *PARAMETERS)})
        self.options = options

    def forward(
        self,
        student: Head,
        teacher: Frozen | Sequence[Frozen] | None,
        ref: Frozen | Sequence[Frozen] | None = None,
        token_ids: Tensor | None = None,
        **batch: Any,
    ) -> GOPDOutput:
        refuse_unknown(batch, _PER_BATCH, "an argument of GOPDLoss.forward")
        return gopd_loss(student, teacher, ref, token_ids, **{**self.options, **batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
