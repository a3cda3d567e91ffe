"""Each row of docs/coming-from.md: the call as it stands there, against the framework's formula written out.

A formula is a function of the models' log-probs (B, T, V) and the page's names. It is in float64, and knows nothing of
this package.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from pages import ROOT, python_snippets

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")


def rows() -> dict[str, dict[str, tuple[str, str]]]:
    """By section and first cell: the call of a row, and its remark."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    section = ""
    for line in PAGE.split("\n"):
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[1].startswith("`") and section != "What differs everywhere":
            assert cells[0] not in found.setdefault(section, {}), cells[0]
            found[section][cells[0]] = cells[1].strip("`"), cells[2]
    return found


ROWS = rows()
FORMULAS: dict[tuple[str, str], Callable[[SimpleNamespace], Tensor]] = {}


def row(section: str, *cells: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for cell in cells:
            assert (section, cell) not in FORMULAS, cell
            FORMULAS[section, cell] = formula
        return formula

    return register


def test_every_row_has_a_formula_and_every_formula_a_row() -> None:
    assert {(section, cell) for section, found in ROWS.items() for cell in found} == set(FORMULAS)


@functools.cache
def page(dtype: torch.dtype) -> ModuleType:
    """The names of the page."""
    module = ModuleType("page")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(8)
    try:
        for snippet in python_snippets(PAGE):
            exec(compile(snippet.source, "docs/coming-from.md", "exec"), vars(module))
    finally:
        torch.set_default_dtype(before)
    return module


def dense(names: ModuleType) -> tuple[SimpleNamespace, list[Tensor]]:
    """The names of the page, in float64, with log-probs in place of models; and the student's leaves."""
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in vars(names).items()
    }
    d = SimpleNamespace(**wide)
    leaves = [x.detach().double().requires_grad_() for x in (names.student.hidden, names.student.weight)]
    d.z = leaves[0] @ leaves[1].T
    d.p = d.z.log_softmax(-1)
    d.q = (names.teacher.hidden.double() @ names.teacher.weight.double().T).log_softmax(-1)
    d.r = (names.ref.hidden.double() @ names.ref.weight.double().T).log_softmax(-1)
    d.y = names.teacher.hidden.double() @ names.teacher.weight.double().T
    index = names.token_ids[..., None]
    d.lp, d.lq, d.lr = (x.gather(-1, index)[..., 0] for x in (d.p, d.q, d.r))
    d.m = names.mask.double()
    d.ids = names.top_ids
    d.adv = d.A[:, None]
    return d, leaves


@pytest.mark.parametrize(("section", "cell"), FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row(section: str, cell: str, dtype: torch.dtype) -> None:
    names = page(dtype)
    call, remark = ROWS[section][cell]
    result: Any = eval(call, vars(names))
    loss = result.loss if isinstance(result, fg.GOPDOutput) else result
    d, leaves = dense(names)
    want = FORMULAS[section, cell](d)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if not remark.startswith("gradient"):
        torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(loss, [names.student.hidden, names.student.weight])
    for got, expected in zip(gradients, torch.autograd.grad(want, leaves), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got.double(), expected, rtol=10 * tolerance, atol=tolerance)


BNPO = '`GRPOConfig(loss_type="bnpo'
TRLS: dict[str, dict[str, Any]] = {
    "`GKDConfig()`": {},
    "`DistillationConfig()`": {"beta": 1.0},
    "`DistillationConfig(beta=0.3)`, `num_items_in_batch=40`": {"beta": 0.3, "num_items_in_batch": 40},
    '`GRPOConfig(loss_type="luspo", importance_sampling_level="sequence")`': {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
    },
    '`GRPOConfig(loss_type="dapo")`, first update': {"loss_type": "dapo", "first": True},
    '`GRPOConfig(loss_type="cispo", epsilon_high=1.5)`': {"loss_type": "cispo", "epsilon_high": 1.5},
    f'{BNPO}", beta=0.1, entropy_coef=0.05)`': {"beta": 0.1, "entropy_coef": 0.05, "_entropy_bonus_enabled": True},
}


def trls_grpo(d: SimpleNamespace, first: bool = False, **options: Any) -> Tensor:
    """GRPOTrainer's loss of these log-probs, by a trainer of which nothing else is there."""
    grpo = pytest.importorskip("trl", minversion="1.16").GRPOTrainer
    plain = {"loss_type": "bnpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "aux_loss_enabled": False}
    plain |= {"importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    plain |= {
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
    }
    trainer = MagicMock(**{**plain, **options})
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (d.lp, entropy(d), None)
    trainer._metrics = {"train": defaultdict(list)}
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda x: x
    inputs = {"completion_ids": d.token_ids, "completion_mask": d.mask.long(), "advantages": d.A}
    inputs |= {"prompt_ids": d.token_ids, "prompt_mask": d.mask.long(), "num_items_in_batch": torch.tensor(40.0)}
    inputs |= {} if first else {"old_per_token_logps": d.old}
    return grpo._compute_loss(trainer, MagicMock(), {**inputs, "ref_per_token_logps": d.lr})


@pytest.mark.parametrize("cell", TRLS)
def test_a_formula_is_trls(cell: str) -> None:
    pytest.importorskip("trl", minversion="1.16")
    names = page(torch.float64)
    results = []
    for own in (False, True):
        d, leaves = dense(names)
        if not own:
            loss = FORMULAS["TRL", cell](d)
        elif "GRPO" in cell:
            loss = trls_grpo(d, **TRLS[cell])
        else:
            from trl.experimental.gkd.gkd_trainer import GKDTrainer

            loss = GKDTrainer.generalized_jsd_loss(d.p, d.q, names.labels, **TRLS[cell])
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------------------------------------- reductions


def token_mean(losses: Tensor, m: Tensor, divisor: float | Tensor | None = None) -> Tensor:
    return (losses * m).sum() / (m.sum() if divisor is None else divisor)


def mean_of_means(losses: Tensor, m: Tensor, divisor: float | Tensor) -> Tensor:
    return ((losses * m).sum(-1) / m.sum(-1).clamp_min(1)).sum() / divisor


def live(m: Tensor) -> Tensor:
    return (m.sum(-1) > 0).sum()


# ---------------------------------------------------------------------------------------------------------- divergences


def forward(p: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - p)).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * forward(m, q) + (1 - beta) * forward(m, p)


@row("Liger-Kernel", "`LigerFusedLinearJSD(jsd_beta=0.3)`")
@row("ms-swift", "`beta=0.3`")
def _(d):
    return token_mean(jsd(d.p, d.q, 0.3), d.m)


@row("Liger-Kernel", "`LigerFusedLinearJSD(jsd_beta=0)`")
def _(d):
    return token_mean(forward(d.p, d.q), d.m)


@row("Liger-Kernel", "`LigerFusedLinearJSD(jsd_beta=1)`")
@row("TRL", "`DistillationConfig()`")
def _(d):
    return token_mean(forward(d.q, d.p), d.m)


@row("Liger-Kernel", "`LigerFusedLinearJSDLoss(0.2, 0.8, beta=0.3)`")
def _(d):
    return 0.2 * token_mean(-d.lp, d.m) + 0.8 * token_mean(jsd(d.p, d.q, 0.3), d.m)


def at_2(d: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Both models at temperature 2."""
    return (d.z / 2).log_softmax(-1), (d.y / 2).log_softmax(-1)


@row("Liger-Kernel", "`LigerFusedLinearJSDLoss(0.2, 0.8, beta=0.3, temperature=2)`")
def _(d):
    return 0.2 * token_mean(-d.lp, d.m) + 0.8 * token_mean(jsd(*at_2(d), 0.3), d.m)


@row("ms-swift", "`beta=1`, `sft_alpha=0.25`, `temperature=2`")
def _(d):
    p, q = at_2(d)
    return token_mean(forward(q, p) - 0.25 * d.lp, d.m)


@row("Liger-Kernel", "`LigerFusedLinearJSDLoss(1.0, 0.0)`")
def _(d):
    return token_mean(-d.lp, d.m)


@row("Liger-Kernel", "`LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.01)`")
def _(d):
    return token_mean(-0.9 * d.lp - 0.1 * d.p.mean(-1) + 0.01 * d.z.logsumexp(-1) ** 2, d.m)


@row("TRL", "`DistillationConfig(beta=0.3)`, `num_items_in_batch=40`")
def _(d):
    return token_mean(jsd(d.p, d.q, 0.3), d.m, 40)


@row("TRL", "`GKDConfig()`")
def _(d):
    return token_mean(jsd(d.p, d.q, 0.5), d.m)


@row("ms-swift", "`beta=1`, `sft_alpha=0.25`")
def _(d):
    return token_mean(forward(d.q, d.p) - 0.25 * d.lp, d.m)


@row("verl", '`loss_agg_mode="token-mean"`, `batch_num_tokens=40`, `dp_size=2`')
def _(d):
    return token_mean(forward(d.q, d.p), d.m, 40) * 2


@row("verl", '`loss_agg_mode="token-sum"`')
def _(d):
    return (forward(d.q, d.p) * d.m).sum()


@row("verl", '`loss_agg_mode="seq-mean-token-sum"`')
def _(d):
    return (forward(d.q, d.p) * d.m).sum() / live(d.m)


@row("verl", '`loss_agg_mode="seq-mean-token-sum-norm"`')
def _(d):
    return (forward(d.q, d.p) * d.m).sum() / live(d.m) / d.T


@row("verl", '`loss_agg_mode="seq-mean-token-mean"`')
def _(d):
    return mean_of_means(forward(d.q, d.p), d.m, live(d.m))


# ------------------------------------------------------------------------------------------------------------ K tokens


def on_k(d: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Both models over the teacher's K tokens, normalised there."""
    p, q = (x.gather(-1, d.ids) for x in (d.p, d.q))
    return p.log_softmax(-1), q.log_softmax(-1)


@row("ms-swift", "`beta=0.3`, `gkd_logits_topk=K`")
def _(d):
    return token_mean(jsd(*on_k(d), 0.3), d.m)


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="forward"`')
def _(d):
    return token_mean(forward(*on_k(d)), d.m)


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="reverse"`')
def _(d):
    p, q = on_k(d)
    return token_mean(forward(q, p), d.m)


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="mixed"`, `mixed_kl_weight=0.3`')
def _(d):
    p, q = on_k(d)
    return token_mean(0.3 * forward(p, q) + 0.7 * forward(q, p), d.m)


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="forward"`, `zero_outside_topk=True`')
def _(d):
    return token_mean(forward(d.p.gather(-1, d.ids), on_k(d)[1]), d.m)


def reverse_with_the_rest(d: SimpleNamespace) -> Tensor:
    """NeMo-RL's: the reverse KL over K tokens, and for the rest of the student log q = -100."""
    p, q = d.p.gather(-1, d.ids), on_k(d)[1]
    rest = (d.p.exp() * d.p).sum(-1) - (p.exp() * p).sum(-1)
    return forward(q, p) + rest + 100 * (1 - p.exp().sum(-1))


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="reverse"`, `zero_outside_topk=True`')
def _(d):
    return token_mean(reverse_with_the_rest(d), d.m)


@row("NeMo-RL", '`DistillationLossFn`, `kl_type="mixed"`, `zero_outside_topk=True`')
def _(d):
    forwards = forward(d.p.gather(-1, d.ids), on_k(d)[1])
    return token_mean(0.5 * forwards + 0.5 * reverse_with_the_rest(d), d.m)


@row("verl", '`loss_mode="forward_kl_topk"`, `log_prob_min_clamp=None`, `loss_max_clamp=None`')
def _(d):
    losses = forward(d.p.gather(-1, d.ids), d.q.gather(-1, d.ids))
    assert (losses[d.mask] > 0).all()
    return token_mean(losses.clamp_min(0), d.m)


@row("verl", '`loss_mode="forward_kl_topk"`, `log_prob_min_clamp=-3.0`, `loss_max_clamp=None`')
def _(d):
    log_p, log_q = (x.gather(-1, d.ids).clamp_min(-3.0) for x in (d.p, d.q))
    raised = [(x == -3.0)[d.mask] for x in (log_p, log_q)]
    assert all(x.any() and not x.all() for x in raised)
    losses = forward(log_p, log_q)
    assert (losses[d.mask] > 0).all()
    return token_mean(losses.clamp_min(0), d.m)


@row("verl", '`loss_mode="forward_kl_topk"`, `log_prob_min_clamp=None`, `loss_max_clamp=0.5`')
def _(d):
    losses = forward(d.p.gather(-1, d.ids), d.q.gather(-1, d.ids))[d.mask]
    assert 0 < losses.min() < 0.5 < losses.max()
    return losses.clamp(0, 0.5).mean()


# ------------------------------------------------------------------------------------------------------- sampled tokens


@row("verl", '`loss_mode="k1"`, `use_policy_gradient=True`, first update')
def _(d):
    k1 = (d.lp - d.lq).clamp(-10, 10).detach()
    return token_mean(k1 * (d.lp - d.lp.detach()).exp(), d.m)


@row("verl", '`loss_mode="k2"`, `use_policy_gradient=False`, `loss_max_clamp=None`')
def _(d):
    return token_mean((d.lp - d.lq) ** 2 / 2, d.m)


@row("verl", '`loss_mode="k3"`, `use_policy_gradient=False`, `loss_max_clamp=None`')
def _(d):
    k3 = (d.lq - d.lp).exp() - (d.lq - d.lp) - 1
    assert k3[d.mask].max() < 10  # verl clamps at 10, whatever loss_max_clamp is
    return token_mean(k3, d.m)


@row("verl", '`loss_mode="abs"`, `use_policy_gradient=False`, `loss_max_clamp=None`')
def _(d):
    return token_mean((d.lp - d.lq).abs(), d.m)


# -------------------------------------------------------------------------------------------------------------- policy


def ppo(d: SimpleNamespace, advantages: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """PPO's clipped surrogate, whose ratio is cut at delta before the clip, as in TRL and Liger."""
    ratio = (d.lp - d.old).exp()
    clamped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum((ratio if delta is None else ratio.clamp(max=delta)) * advantages, clamped * advantages)


def dual(d: SimpleNamespace, high: float, c: float) -> Tensor:
    """PPO's clipped surrogate with an upper bound where A < 0, as in verl, NeMo-RL and slime."""
    plain = ppo(d, d.adv, 0.2, high)
    return torch.where(d.adv < 0, torch.minimum(plain, -d.adv * c), plain)


def gspo(d: SimpleNamespace) -> Tensor:
    """The surrogate of each sequence (B, 1), with the gradient through the mean of its log-ratios."""
    mean = ((d.lp - d.old) * d.m).sum(-1, keepdim=True) / d.m.sum(-1, keepdim=True).clamp_min(1)
    return -torch.minimum(mean.exp() * d.adv, mean.exp().clamp(0.8, 1.2) * d.adv)


GRPO = "LigerFusedLinearGRPOLoss(beta=0, loss_type="


@row("Liger-Kernel", f'`{GRPO}"grpo")`')
def _(d):
    return mean_of_means(ppo(d, d.adv, 0.2, 0.2), d.m, d.B)


@row("Liger-Kernel", f'`{GRPO}"bnpo")`')
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2), d.m)


@row("Liger-Kernel", f'`{GRPO}"dr_grpo", max_completion_length=9)`')
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2), d.m, d.B * 9)


@row("Liger-Kernel", f'`{GRPO}"dapo")`, `num_items_in_batch=40`')
@row("slime", "`--calculate-per-token-loss`")
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2), d.m, 40)


@row("Liger-Kernel", f'`{GRPO}"bnpo", delta=1.3)`')
def _(d):
    losses = ppo(d, d.adv, 0.2, 0.2, delta=1.3)
    assert (losses != ppo(d, d.adv, 0.2, 0.2))[d.mask].any()
    return token_mean(losses, d.m)


@row("Liger-Kernel", f'`{GRPO}"grpo", importance_sampling_level="sequence")`')
def _(d):
    return mean_of_means(gspo(d), d.m, d.B)


@row("NeMo-RL", "`ClippedPGLossFn`, `sequence_level_importance_ratios=True`")
def _(d):
    return mean_of_means(gspo(d), d.m, live(d.m))


@row("Liger-Kernel", f'`{GRPO}"luspo", importance_sampling_level="sequence")`')
@row("TRL", '`GRPOConfig(loss_type="luspo", importance_sampling_level="sequence")`')
def _(d):
    return (gspo(d) * d.m.sum(-1, keepdim=True)).mean()


@row("Liger-Kernel", f'`{GRPO}"bnpo")`, `vllm_is_ratio=weights`')
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2) * d.weights, d.m)


@row("TRL", '`GRPOConfig(loss_type="dapo")`, first update')
def _(d):
    return token_mean(-d.adv * (d.lp - d.lp.detach()).exp(), d.m, 40)


@row("verl", '`policy_loss.loss_mode="vanilla"`, `clip_ratio_low=0.2`, `clip_ratio_high=0.28`, `clip_ratio_c=3`')
@row("NeMo-RL", "`ClippedPGLossFn`, `ratio_clip_min=0.2`, `ratio_clip_max=0.28`, `ratio_clip_c=3`")
def _(d):
    return token_mean(dual(d, 0.28, 3), d.m)


@row("verl", '`policy_loss.loss_mode="gspo"`')
def _(d):
    mean = ((d.lp - d.old) * d.m).sum(-1, keepdim=True) / d.m.sum(-1, keepdim=True).clamp_min(1)
    ratio = (mean.detach() + d.lp - d.lp.detach()).exp()
    return token_mean(-torch.minimum(ratio * d.adv, ratio.clamp(0.8, 1.2) * d.adv), d.m)


@row("NeMo-RL", "`ClippedPGLossFn`, `token_level_loss=False`")
def _(d):
    return mean_of_means(ppo(d, d.adv, 0.2, 0.2), d.m, live(d.m))


@row("NeMo-RL", "`ClippedPGLossFn`, `disable_ppo_ratio=True`")
def _(d):
    return token_mean(-d.adv * d.lp, d.m)


@row("NeMo-RL", "`ClippedPGLossFn`, `force_on_policy_ratio=True`")
def _(d):
    return token_mean(-d.adv * (d.lp - d.lp.detach()).exp(), d.m)


def k3(d: SimpleNamespace) -> Tensor:
    """Of the reference, at the sampled token."""
    return (d.lr - d.lp).exp() - (d.lr - d.lp) - 1


def entropy(d: SimpleNamespace) -> Tensor:
    return -(d.p.exp() * d.p).sum(-1)


@row("Liger-Kernel", '`LigerFusedLinearGRPOLoss(beta=0.1, loss_type="bnpo")`')
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2) + 0.1 * k3(d), d.m)


@row("TRL", '`GRPOConfig(loss_type="bnpo", beta=0.1, entropy_coef=0.05)`')
def _(d):
    return token_mean(ppo(d, d.adv, 0.2, 0.2) + 0.1 * k3(d), d.m) - 0.05 * token_mean(entropy(d), d.m)


@row("verl", '`use_kl_loss=True`, `kl_loss_type="low_var_kl"`, `kl_loss_coef=0.1`, `entropy_coeff=0.05`')
def _(d):
    assert k3(d)[d.mask].max() < 10
    return token_mean(dual(d, 0.2, 3) + 0.1 * k3(d) - 0.05 * entropy(d), d.m)


@row("verl", '`use_kl_loss=True`, `kl_loss_type="k2"`, `kl_loss_coef=0.1`')
def _(d):
    return token_mean(dual(d, 0.2, 3) + 0.1 * (d.lp - d.lr) ** 2 / 2, d.m)


@row("NeMo-RL", "`ClippedPGLossFn`, `force_on_policy_ratio=True`, `reference_policy_kl_penalty=0.1`")
def _(d):
    one = (d.lp - d.lp.detach()).exp()  # 1, with the gradient of a score function
    return token_mean(-d.adv * one + 0.1 * k3(d) * one, d.m)


@row("slime", "`--use-kl-loss`, `--kl-loss-type k3`, `--kl-loss-coef 0.1`, `--entropy-coef 0.05`")
def _(d):
    return mean_of_means(ppo(d, d.adv, 0.2, 0.2) + 0.1 * k3(d) - 0.05 * entropy(d), d.m, d.B)


def cispo(d: SimpleNamespace, low: float, high: float) -> Tensor:
    return -(d.lp - d.old).exp().clamp(low, high).detach() * d.adv * d.lp


@row("Liger-Kernel", f'`{GRPO}"cispo", epsilon_high=1.5)`')
def _(d):
    return token_mean(cispo(d, 0, 1.5), d.m)


@row("TRL", '`GRPOConfig(loss_type="cispo", epsilon_high=1.5)`')
def _(d):
    return token_mean(cispo(d, 0, 1.5), d.m, 40)


@row("verl", '`policy_loss.loss_mode="cispo"`')
@row("NeMo-RL", "`ClippedPGLossFn`, `use_cispo=True`")
def _(d):
    return token_mean(cispo(d, 0.8, 1.2), d.m)


@row("slime", "`--advantage-estimator cispo`")
def _(d):
    return mean_of_means(cispo(d, 0.8, 1.2), d.m, d.B)


@row("slime", "`--advantage-estimator gspo`")
def _(d):
    return mean_of_means(gspo(d), d.m, d.B)


@row("verl", '`loss_mode="k1"`, `use_policy_gradient=True`, later updates')
def _(d):
    advantages = (d.lq - d.lp).detach().clamp(-10, 10)
    plain = ppo(d, advantages, 0.2, 0.2)
    return token_mean(torch.where(advantages < 0, torch.minimum(plain, -advantages * 3), plain), d.m)


@row("slime", "`--use-opd`, rewards of 0, `--opd-kl-coef 1`")
def _(d):
    return mean_of_means(ppo(d, d.lq - d.old, 0.2, 0.28), d.m, d.B)


@row("slime", "`--use-opd`, `--opd-kl-coef 0.5`, with rewards")
def _(d):
    return mean_of_means(ppo(d, d.adv - 0.5 * (d.old - d.lq), 0.2, 0.2), d.m, d.B)


@row("slime", "`--eps-clip-c 3`")
def _(d):
    return mean_of_means(dual(d, 0.2, 3), d.m, d.B)
