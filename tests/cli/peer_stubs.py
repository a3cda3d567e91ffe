"""Stand-ins for packages that cannot be installed beside the others, or run on a CPU: their functions' own signatures.

Each is the public function that benchmarks/peers.py calls, as the version named in VERSIONS has it, with a dense body.
``test_benchmarks.py`` runs the adapters on them, and compares the signatures with the package where that is installed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VERSIONS = {"quack": "0.6.5", "liger_kernel": "0.8.5", "orda_kernel": "0.1.0", "unsloth_zoo": "2026.10.9"}


# --------------------------------------------------------------------------------------------------------------- quack


def chunked_linear_cross_entropy(
    x: Any,
    weight: Any,
    target: Any,
    chunk_size: Any = 4096,
    ignore_index: Any = -100,
    reduction: Any = "mean",
    tuned: Any = True,
    use_scaled_exp: Any = None,
) -> Any:
    assert x.shape[0] % 8 == chunk_size % 8 == 0
    return F.cross_entropy(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


class _LseTargetEpi:
    """An instance of quack.epilogue.frontend.EpiMod"""

    def __call__(
        self,
        A: Any,
        B: Any,
        C: Any = None,
        *,
        out: Any = None,
        out_dtype: Any = None,
        store_d: Any = True,
        config: Any = None,
        tuned: Any = True,
        dynamic_scheduler: Any = False,
        cu_seqlens_m: Any = None,
        A_idx: Any = None,
        SFA: Any = None,
        SFB: Any = None,
        bs_format_a: Any = None,
        bs_format_b: Any = None,
        rounding_mode: Any = 0,
        epi_key_overrides: Any = None,
        concat_layout: Any = None,
        transform_a: Any = None,
        transform_sf: Any = None,
        transform_operands: Any = None,
        add_to_output: Any = False,
        **operands: Any,
    ) -> dict[str, Tensor]:
        assert not store_d
        z = A @ B  # B is (k, n)
        return {"lse": z.logsumexp(-1), "target_logit": z.gather(-1, operands["target"][:, None])[:, 0]}


# --------------------------------------------------------------------------------------------------------------- Liger


class LigerFusedLinearCrossEntropySM90Function:
    @staticmethod
    def forward(
        ctx: Any,
        _input: Any,
        weight: Any,
        target: Any,
        ignore_index: Any = -100,
        reduction: Any = "mean",
        bias: Any = None,
        ce_weight: Any = None,
        label_smoothing: Any = 0.0,
        softcap: Any = None,
        lse_square_scale: Any = 0.0,
        use_token_scaling: Any = False,
        return_z_loss: Any = False,
        return_token_accuracy: Any = False,
    ) -> Any:
        return F.cross_entropy(_input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        return cls.forward(None, *arguments)


class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(
        _input: Any,
        weight: Any,
        target: Any,
        temperature: Any = 1.0,
        ignore_index: Any = -100,
        m_tiles_per_cluster: Any = 1,
        return_entropy: Any = False,
        selected_token_ids: Any = None,
    ) -> Any:
        assert not return_entropy
        z = (_input @ weight.T) / temperature
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction="none")


def liger_fused_linear_cross_entropy(
    input: Any,
    weight: Any,
    target: Any,
    bias: Any = None,
    ce_weight: Any = None,
    ignore_index: Any = -100,
    lse_square_scale: Any = 0.0,
    label_smoothing: Any = 0.0,
    reduction: Any = "mean",
    softcap: Any = None,
    return_z_loss: Any = False,
    accum_dtype: Any = None,
    use_token_scaling: Any = False,
    return_token_accuracy: Any = False,
    return_predicted_tokens: Any = False,
    chunk_mem_const: Any = 1,
) -> Any:
    assert chunk_mem_const > 1
    assert accum_dtype == torch.float32
    return F.cross_entropy(input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


# ---------------------------------------------------------------------------------------------------------------- orda


@dataclasses.dataclass(frozen=True)
class TiedTeacher:
    hidden: Any
    mode: Any = None


@dataclasses.dataclass(frozen=True)
class SeparateTeacher:
    hidden: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    grad_weight_accumulation: Any = None
    chunk_size: Any = None
    num_chunks: Any = None
    max_chunks: Any = None
    max_fused_size: Any = None
    kl_weight: Any = None
    kl_temperature: Any = None
    autotune: Any = None
    refresh_autotune: Any = None
    kl_divergence: Any = None
    assume_valid_labels: Any = None
    kl_alpha: Any = None
    kl_beta: Any = None
    entropy_gate: Any = None
    kl_teacher_temperature: Any = None


class DistillationLossOutput(NamedTuple):
    loss: Any
    student_ce: Any
    teacher_ce: Any
    kl: Any


def distillation_loss(
    student_hidden: Any,
    weight: Any,
    labels: Any,
    teacher: Any,
    *,
    student_ce_weight: Any = 1.0,
    teacher_ce_weight: Any = None,
    kl_weight: Any = 0.0,
    kl_temperature: Any = 1.0,
    kl_teacher_temperature: Any = None,
    kl_divergence: Any = "forward",
    kl_alpha: Any = None,
    kl_beta: Any = None,
    entropy_gate: Any = None,
    ignore_index: Any = -100,
    reduction: Any = "mean",
    profile: Any = "balanced",
    backend: Any = "auto",
    config: Any = None,
    gradient_materialization_scale: Any = None,
    grad_scaler: Any = None,
) -> DistillationLossOutput:
    assert teacher_ce_weight == 0.0
    assert profile in ("balanced", "fast", "debug")
    head = weight if isinstance(teacher, TiedTeacher) else teacher.weight
    z = student_hidden @ weight.T
    log_p, log_q = z.log_softmax(-1), (teacher.hidden @ head.T).detach().log_softmax(-1)
    ce = F.cross_entropy(z, labels, ignore_index=ignore_index, reduction=reduction)
    if kl_divergence == "skew_js":
        b = 0.5 if kl_beta is None else kl_beta
        log_m = torch.logaddexp(log_q + math.log(1 - b), log_p + math.log(b))
        kl = (1 - b) * log_q.exp() * (log_q - log_m) + b * log_p.exp() * (log_p - log_m)
    else:
        kl = {"forward": log_q.exp() * (log_q - log_p), "reverse": log_p.exp() * (log_p - log_q)}[kl_divergence]
    value = kl.sum(-1).mean()
    return DistillationLossOutput(student_ce_weight * ce + kl_weight * value, ce, z.new_zeros(()), value)


# ------------------------------------------------------------------------------------------------------------- unsloth


def distillation_chunked_jsd(
    student_hidden_states: Any,
    teacher_hidden_states: Any,
    student_lm_head: Any,
    teacher_lm_head: Any,
    completion_mask: Any,
    beta: Any = 0.5,
    chunk_size: Any = 256,
    num_items_in_batch: Any = None,
    student_lm_head_bias: Any = None,
    teacher_lm_head_bias: Any = None,
    student_logit_scale: Any = 1.0,
    teacher_logit_scale: Any = 1.0,
    student_final_logit_softcapping: Any = 0.0,
    teacher_final_logit_softcapping: Any = 0.0,
    temperature: Any = 1.0,
    scaler: Any = None,
) -> tuple[Any, Any, Any]:
    """Mixture (1 - beta) p_student + beta p_teacher; 0 is the forward KL, 1 the reverse."""
    log_p = (student_hidden_states @ student_lm_head.T).log_softmax(-1)
    log_q = (teacher_hidden_states @ teacher_lm_head.T).detach().log_softmax(-1)
    if beta in (0, 1):
        first, second = (log_q, log_p) if beta == 0 else (log_p, log_q)
        value = first.exp() * (first - second)
    else:
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        value = beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)
    valid = completion_mask != 0
    return (value.sum(-1) * valid).sum() / valid.sum(), None, valid.sum()


# ------------------------------------------------------------------------------------------------------------- modules

STUBS: dict[str, dict[str, Any]] = {
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": chunked_linear_cross_entropy},
    "quack.epilogue.library": {"lse_target_epi": _LseTargetEpi()},
    "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90": {
        "LigerFusedLinearCrossEntropySM90Function": LigerFusedLinearCrossEntropySM90Function
    },
    "liger_kernel.ops": {"LigerFusedLinearScaledCrossEntropyFunction": LigerFusedLinearScaledCrossEntropyFunction},
    "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy},
    "orda_kernel": {
        "KernelConfig": KernelConfig,
        "SeparateTeacher": SeparateTeacher,
        "TiedTeacher": TiedTeacher,
        "distillation_loss": distillation_loss,
    },
    "unsloth": {},
    "unsloth_zoo.rl_replacements": {"distillation_chunked_jsd": distillation_chunked_jsd},
}


def install(monkeypatch: Any) -> None:
    """Put the stubs in the place of the packages."""
    for name in STUBS:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i]))
            module.__path__ = []
            if i == len(parts):
                module.__dict__.update(STUBS[name])
            elif module.__name__ in STUBS or module.__name__ in installed(name):
                continue
            monkeypatch.setitem(sys.modules, module.__name__, module)


def installed(before: str) -> list[str]:
    """Modules and parents of the stubs that come before one in the list."""
    names = list(STUBS)[: list(STUBS).index(before)]
    return [".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)]
