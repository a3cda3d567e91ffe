"""Other packages, called by their public API as their documentation or trainer configures it.

Each docstring names the function that is called, so that a reader can compare it with the package's source. Versions
are pinned in constraints.txt; ``pip install "fused-gopd[bench-peers]"`` installs them. A package that lacks a model or
the lambda target is measured on the jobs that it supports. Packages that need a GPU are skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


# _CHUNKED_LOGPROB_CHUNK_SIZE of trl.trainer.utils, which its trainers use
_TRL_VOCABULARY_CHUNK = 32768


def _trl_logprobs(workload: Workload) -> Loss:
    """trl.kernels.ChunkedLogProbFunction, log-probs alone; the job's loss is formed from them as its trainers do"""
    from trl.kernels import ChunkedLogProbFunction

    def loss(inputs: Inputs) -> Tensor:
        hidden, weight = _first(inputs)
        options = (1.0, _TRL_VOCABULARY_CHUNK, None, 1.0, ())
        logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, inputs.token_ids, *options)[0]
        if workload.job == "logprobs":
            return logprobs
        return -logprobs.mean() if workload.job == "nll" else policy_loss(logprobs, inputs)

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


def _needs(package: str | None, *, gpu: bool = False, half: bool = False) -> Callable[[Workload], str | None]:
    """Why a peer cannot run a workload here; None if it can."""

    def reason(workload: Workload) -> str | None:
        if package is not None and importlib.util.find_spec(package) is None:
            return f'{package} is not installed: pip install "fused-gopd[bench-peers]"'
        if gpu and torch.device(workload.device).type == "cpu":
            return "Triton kernels, for a GPU"
        if half and workload.dtype == torch.float32:
            return "its backward takes float16 and bfloat16 alone"
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


PEERS = {
    "torch-lce": _peer(("nll",), _torch_linear_cross_entropy(_chunks_of_this_package), _torch_reason),
    "torch-lce-auto": _peer(("nll",), _torch_linear_cross_entropy(lambda workload: {}), _torch_reason),
    "cce": _peer(("nll",), _cce(), _needs("cut_cross_entropy", gpu=True, half=True)),
    "cce-exact": _peer(("nll",), _cce(filter_eps=None), _needs("cut_cross_entropy", gpu=True, half=True)),
    "cce-compile": _peer(("nll",), _cce(impl="torch_compile"), _needs("cut_cross_entropy"), compiles=True),
    "liger-flce": _peer(("nll",), _liger_cross_entropy, _needs("liger_kernel", gpu=True)),
    "liger-grpo": _peer(("policy",), _liger_grpo, _needs("liger_kernel"), compiles=True),
    "liger-jsd": _peer(_DIVERGENCES, _liger_jsd, _needs("liger_kernel", gpu=True)),
    "liger-chunked-jsd": _peer(_DIVERGENCES, _liger_chunked_jsd, _needs("liger_kernel"), compiles=True),
    "trl-logprobs": _peer(("logprobs", "nll", "policy"), _trl_logprobs, _needs("trl")),
    "trl-divergence": _peer(_DIVERGENCES, _trl_divergence, _needs("trl")),
}
