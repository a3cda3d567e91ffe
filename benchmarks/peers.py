"""Other packages, called by their public API as their documentation or trainer configures it.

Each docstring names the function that is called, so that a reader can compare it with the package's source. Versions
are pinned in constraints.txt; the extra ``bench-peers`` installs them. A package that lacks a model or
the lambda target is measured on the jobs that it supports. Packages that need a GPU are skipped elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_gopd import installing

from .providers import Loss, Provider, advantage, chunk_size, of_live, policy_loss
from .workloads import CLIP, JSD_BETA, Inputs, Workload

# beta of Liger's and TRL's generalized JSD: 0 is KL(teacher || student), 1 is KL(student || teacher)
_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD_BETA}
_DIVERGENCES = ("reverse-kl", "forward-kl", "jsd")


def _first(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.weights is not None
    return inputs.rows[0], inputs.weights[0]


def _torch_linear_cross_entropy(options: Callable[[Workload], dict[str, Any]]) -> Callable[[Workload], Loss]:
    """torch.nn.functional.linear_cross_entropy; without LinearCrossEntropyOptions it is dense"""

    def prepare(workload: Workload) -> Loss:
        chosen = torch.nn.LinearCrossEntropyOptions(**options(workload))

        def loss(inputs: Inputs) -> Tensor:
            return torch.nn.functional.linear_cross_entropy(*_first(inputs), inputs.token_ids, options=chosen)

        return loss

    return prepare


def _chunks_of_this_package(workload: Workload) -> dict[str, Any]:
    """Its default would be a few tokens per chunk at these shapes, and it adds the whole weight gradient in each."""
    return {"batch_chunk_size": chunk_size(workload), "chunking_method": None}


def _cce(**options: object) -> Callable[[Workload], Loss]:
    """cut_cross_entropy.linear_cross_entropy"""

    def prepare(_: Workload) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return lambda inputs: linear_cross_entropy(*_first(inputs), inputs.token_ids, **options)

    return prepare


def _liger_cross_entropy(_: Workload) -> Loss:
    """liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss, weight gradient accumulated in float32"""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def loss(inputs: Inputs) -> Tensor:
        hidden, weight = _first(inputs)
        return module(weight, hidden, inputs.token_ids)

    return loss


# Liger's chunks hold about this many elements for each of the hidden states'; 1 is its default
_LIGER_LONG = 16


def _liger_long_cross_entropy(_: Workload) -> Loss:
    """liger_kernel.transformers.functional.liger_fused_linear_cross_entropy with 16 times the default memory of a chunk

    By default a chunk's logits take no more memory than the hidden states: 128 tokens of 8192 at H = 2048 and
    V = 151936. With this it is 2048.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    options = {"accum_dtype": torch.float32, "chunk_mem_const": _LIGER_LONG}
    return lambda inputs: liger_fused_linear_cross_entropy(*_first(inputs), inputs.token_ids, **options)


def _liger_sm90_cross_entropy(_: Workload) -> Loss:
    """LigerFusedLinearCrossEntropySM90Function of liger_kernel.ops.cutedsl: CuTe DSL, all tokens in one piece

    By its own module, not by LIGER_KERNEL_IMPL=cutedsl, which is the kernel for compute capability 10.0.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import LigerFusedLinearCrossEntropySM90Function

    return lambda inputs: LigerFusedLinearCrossEntropySM90Function.apply(
        *_first(inputs), inputs.token_ids, -100, "mean"
    )


def _liger_scaled_cross_entropy(workload: Workload) -> Loss:
    """liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction, which takes its CuTe DSL kernels on a Hopper GPU

    Log-probs of the tokens without logits in memory; the job's loss is formed from them. Its gradient of the weight is
    accumulated in bfloat16. Its check of the targets, which waits for the device, is off.
    """
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def loss(inputs: Inputs) -> Tensor:
        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(*_first(inputs), inputs.token_ids, 1.0, -100, 1, False)
        return _of_logprobs(workload, -nll, inputs)

    return loss


def _quack(_: Workload) -> Loss:
    """quack.linear_cross_entropy.chunked_linear_cross_entropy, chunks of its default 4096 tokens

    On compute capability 9.0 with bfloat16 it stores exponentials in the product's epilogue (use_scaled_exp=None
    chooses); elsewhere it is a product, a row kernel and two products.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        return chunked_linear_cross_entropy(*_first(inputs), inputs.token_ids, chunk_size=4096, reduction="mean")

    return loss


def _quack_logprobs(_: Workload) -> Loss:
    """quack.epilogue.library.lse_target_epi without storing the logits, as quack's own evaluation calls it"""
    from quack.epilogue.library import lse_target_epi

    def loss(inputs: Inputs) -> Tensor:
        hidden, weight = _first(inputs)
        found = lse_target_epi(hidden, weight.mT, store_d=False, target=inputs.token_ids, tuned=False)
        return found["target_logit"] - found["lse"]

    return loss


# orda's name of each divergence; its skew_js with kl_beta is this package's jsd with 1 - beta, the same at 0.5
_ORDA = {"reverse_kl": "reverse", "forward_kl": "forward", "jsd": "skew_js", "kl_ce": "forward"}


def _orda(workload: Workload) -> Loss:
    """orda_kernel.distillation_loss, profile "fast": cross entropy of the student, KL to the teacher, or both

    The teacher's own cross entropy, its third term, is left out: the teacher takes no gradient here. The weight's
    gradient is summed in float32, and labels are not checked on the host.
    """
    from orda_kernel import KernelConfig, SeparateTeacher, TiedTeacher, distillation_loss

    objective = workload.kind.objective
    config = KernelConfig(grad_weight_accumulation="fp32", assume_valid_labels=True)
    options: dict[str, Any] = {"teacher_ce_weight": 0.0, "profile": "fast", "config": config}
    options["student_ce_weight"] = float(objective in ("nll", "kl_ce"))
    options["kl_weight"] = float(objective != "nll")
    if objective != "nll":
        options["kl_divergence"] = _ORDA[objective]
    if objective == "jsd":
        options["kl_beta"] = 1.0 - JSD_BETA
    if torch.device(workload.device).type == "cuda":
        options["backend"] = "triton"  # or an error: "auto" may take PyTorch's dense code

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        hidden, weight = _first(inputs)
        one = len(inputs.rows) == 1  # no term looks at the teacher
        teacher = TiedTeacher(hidden.detach()) if one else SeparateTeacher(inputs.rows[1], inputs.weights[1])
        return distillation_loss(hidden, weight, inputs.token_ids, teacher, **options).loss

    return loss


def _unsloth_jsd(workload: Workload) -> Loss:
    """unsloth_zoo.rl_replacements.distillation_chunked_jsd, chunks as long as this package's

    Gradients in the forward, compiled; those of the weight are summed in the head's dtype.
    """
    import unsloth  # noqa: F401  # has to be imported before unsloth_zoo
    from unsloth_zoo.rl_replacements import distillation_chunked_jsd

    options = {"beta": _BETAS[workload.kind.objective], "chunk_size": chunk_size(workload)}

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        (h, h_q), (w, w_q) = inputs.rows, inputs.weights
        mask = torch.ones_like(inputs.token_ids)[None]
        return distillation_chunked_jsd(h[None], h_q[None], w, w_q, mask, **options)[0]

    return loss


def _liger_jsd(workload: Workload) -> Loss:
    """liger_kernel.transformers.LigerFusedLinearJSD, weight gradient accumulated in float32"""
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=_BETAS[workload.kind.objective], accum_dtype=torch.float32)

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        return module(inputs.rows[0], inputs.weights[0], inputs.rows[1], inputs.weights[1], None)

    return loss


def _liger_chunked_jsd(workload: Workload) -> Loss:
    """liger_kernel.chunked_loss.LigerFusedLinearJSDLoss without its cross-entropy term, which it then skips"""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=_BETAS[workload.kind.objective])

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        return module(inputs.rows[0], inputs.weights[0], inputs.rows[1], inputs.weights[1], inputs.token_ids)

    return loss


def _liger_grpo(workload: Workload) -> Loss:
    """liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss without KL term: PPO's clipped surrogate, mean over tokens.

    It takes one advantage per sequence, so every token is a sequence. All are one chunk, within which it streams over
    tokens and vocabulary.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"beta": 0.0, "epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "bnpo"}
    module = LigerFusedLinearGRPOLoss(use_ref_model=False, chunk_size=workload.tokens, **options)

    def loss(inputs: Inputs) -> Tensor:
        hidden, weight = _first(inputs)
        old, q, r = inputs.scores
        ids = inputs.token_ids[:, None]
        found = module(
            hidden[:, None],
            weight,
            ids,
            torch.ones_like(ids),
            advantage(old, q, r),
            old_per_token_logps=old[:, None],
        )
        return found[0]  # type: ignore[no-any-return]

    return loss


def _of_logprobs(workload: Workload, logprobs: Tensor, inputs: Inputs) -> Tensor:
    """The loss of a job of one model, from the log-probs of its tokens."""
    if workload.job == "logprobs":
        return logprobs
    return -logprobs.mean() if workload.job == "nll" else policy_loss(logprobs, inputs)


# _CHUNKED_LOGPROB_CHUNK_SIZE of trl.trainer.utils, which its trainers use
_TRL_VOCABULARY_CHUNK = 32768


def _trl_logprobs(workload: Workload) -> Loss:
    """trl.kernels.ChunkedLogProbFunction, log-probs alone; the job's loss is formed from them as its trainers do"""
    from trl.kernels import ChunkedLogProbFunction

    def loss(inputs: Inputs) -> Tensor:
        hidden, weight = _first(inputs)
        options = (1.0, _TRL_VOCABULARY_CHUNK, None, 1.0, ())
        logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, inputs.token_ids, *options)[0]
        return _of_logprobs(workload, logprobs, inputs)

    return loss


def _trl_divergence(workload: Workload) -> Loss:
    """trl.kernels.chunked_divergence.ChunkedDivergenceFunction, which returns the student's entropy too"""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = _BETAS[workload.kind.objective]

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        (h, h_q), (w, w_q) = inputs.rows, inputs.weights
        return ChunkedDivergenceFunction.apply(h, w, None, h_q, w_q, None, beta)[0].mean()

    return loss


# ----------------------------------------------------------------------------------------------------------- registry


def _needs(
    package: str,
    *,
    gpu: bool = False,
    half: bool = False,
    bfloat16: bool = False,
    hopper: bool = False,
    also: tuple[str, ...] = (),
    extra: str = "bench-peers",
    packages: tuple[str, ...] = (),
    shape: Callable[[Workload], str | None] = lambda _: None,
) -> Callable[[Workload], str | None]:
    """Why a peer cannot run a workload here; None if it can.

    Args:
        package: the module that it is in.
        gpu: whether it has kernels for a GPU alone.
        half: whether it takes float16 and bfloat16 alone.
        bfloat16: whether it takes bfloat16 alone.
        hopper: whether it has kernels for compute capability 9.0 alone.
        also: further modules that its kernels need.
        extra, packages: what installs it: an extra of this package, or packages of its own.
        shape: what it cannot do of a workload's shape.
    """

    def reason(workload: Workload) -> str | None:
        for module in (package, *also):
            if not _installed(module):
                command = installing.packages(*packages) if packages else installing.extra(extra)
                return f"{module} is not installed: {command}"
        if gpu and torch.device(workload.device).type == "cpu":
            return "its kernels are for a GPU"
        if bfloat16 and workload.dtype != torch.bfloat16:
            return "it takes bfloat16 alone"
        if half and workload.dtype == torch.float32:
            return "it takes float16 and bfloat16 alone"
        if hopper and torch.device(workload.device).type != "cpu":
            major, minor = torch.cuda.get_device_capability(workload.device)
            if (major, minor) != (9, 0):
                return f"its kernels are for compute capability 9.0, this GPU has {major}.{minor}"
        return shape(workload)

    return reason


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _multiples(tokens: int, vocabulary: int) -> Callable[[Workload], str | None]:
    """A reason where tokens or vocabulary are not multiples of what a kernel's tiles need."""

    def reason(workload: Workload) -> str | None:
        for name, size, of in (("tokens", workload.live_tokens, tokens), ("entries", workload.vocab, vocabulary)):
            if size % of:
                return f"it takes a multiple of {of} {name}, here are {size}"
        return None

    return reason


def _torch_reason(_: Workload) -> str | None:
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"PyTorch {torch.__version__} has no linear_cross_entropy"


def _peer(
    jobs: tuple[str, ...],
    prepare: Callable[[Workload], Loss],
    unavailable: Callable[[Workload], str | None],
    compiles: bool = False,
) -> Provider:
    return Provider(jobs, lambda workload: of_live(prepare(workload)), unavailable, compiles)


_liger_cute = functools.partial(
    _needs,
    "liger_kernel",
    gpu=True,
    bfloat16=True,
    hopper=True,
    also=("cutlass.cute",),
    extra="bench-peers-gpu",
)
_quack_needs = functools.partial(_needs, "quack", gpu=True, half=True, extra="bench-peers-gpu")

PEERS = {
    "torch-lce": _peer(("nll",), _torch_linear_cross_entropy(_chunks_of_this_package), _torch_reason),
    "torch-lce-auto": _peer(("nll",), _torch_linear_cross_entropy(lambda workload: {}), _torch_reason),
    "cce": _peer(("nll",), _cce(), _needs("cut_cross_entropy", gpu=True, half=True)),
    "cce-exact": _peer(("nll",), _cce(filter_eps=None), _needs("cut_cross_entropy", gpu=True, half=True)),
    "cce-compile": _peer(("nll",), _cce(impl="torch_compile"), _needs("cut_cross_entropy"), compiles=True),
    "liger-flce": _peer(("nll",), _liger_cross_entropy, _needs("liger_kernel", gpu=True)),
    "liger-flce-long": _peer(("nll",), _liger_long_cross_entropy, _needs("liger_kernel", gpu=True)),
    "liger-flce-sm90": _peer(("nll",), _liger_sm90_cross_entropy, _liger_cute(shape=_multiples(128, 256))),
    "liger-scaled-ce": _peer(("logprobs", "nll", "policy"), _liger_scaled_cross_entropy, _liger_cute()),
    "quack": _peer(("nll",), _quack, _quack_needs(shape=_multiples(8, 8))),
    "quack-lse": _peer(("logprobs",), _quack_logprobs, _quack_needs(shape=_multiples(8, 8))),
    "orda": _peer(("nll", *_DIVERGENCES, "kl-ce"), _orda, _needs("orda_kernel")),
    "unsloth-jsd": _peer(
        _DIVERGENCES,
        _unsloth_jsd,
        # its trl is older than the other peers': an environment of its own
        _needs("unsloth_zoo", also=("unsloth",), packages=("unsloth", "unsloth_zoo")),
        compiles=True,
    ),
    "liger-grpo": _peer(("policy",), _liger_grpo, _needs("liger_kernel"), compiles=True),
    "liger-jsd": _peer(_DIVERGENCES, _liger_jsd, _needs("liger_kernel", gpu=True)),
    "liger-chunked-jsd": _peer(_DIVERGENCES, _liger_chunked_jsd, _needs("liger_kernel"), compiles=True),
    "trl-logprobs": _peer(("logprobs", "nll", "policy"), _trl_logprobs, _needs("trl")),
    "trl-divergence": _peer(_DIVERGENCES, _trl_divergence, _needs("trl")),
}
