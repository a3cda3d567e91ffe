"""Trainers, the command, models of transformers and Liger's losses on the device at hand: a GPU where there is one.

On a CPU they are a part of what the other tests of each do in full: only a rehearsal of benchmarks/on_gpu.sh runs them
there. No GPU had run any of them on 2026-11-30.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_gopd as fg
from builders import assert_close, why_not
from distill_runs import Files, invoke, metrics_of, small
from fused_gopd.integrations import liger
from fused_gopd.integrations.transformers import head_of, last_hidden_state, patch_lm_head
from fused_gopd.integrations.trl import GOPDTrainer, GRPOGOPDConfig, GRPOGOPDTrainer, patch_distillation_loss
from interpreter import DEVICE
from test_trl import config, model, own_trainer, prompts, tokenizer, weights

GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.untried, pytest.mark.usefixtures("one_thread")]
pytestmark += [] if GPU else [pytest.mark.slow]

HERE: dict[str, Any] = {"use_cpu": not GPU}
OTHER = "a cat in another house"


class Told:
    """A callback that is told of phases."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    def on_phase(self, args: Any, state: Any, control: Any, *, phase: Any) -> None:
        if phase is not None:
            self.phases.append((phase.name, phase.seconds))


VARIANTS: dict[str, dict[str, Any]] = {
    "sampled": {
        "estimator": "sampled",
        "reward_scale": 1.0,
        "reward_scale_fn": lambda _: lambda s: 1 + 0.1 * (s.teacher_entropy - s.ref_entropy).tanh(),
    },
    "full": {"estimator": "full", "bf16": GPU},
    "topk": {"estimator": "topk", "k": 5, "support": "student"},
    "routes": {"teacher": "routes", "route_column": "domain", "estimator": "full"},
    "another tokenizer": {"teacher": "another tokenizer", "cross_tokenizer": True},
    "the student as it was": {
        "teacher": "student",
        "teacher_ema": 0.9,
        "teacher_prompt": lambda row: f"sat on {row['prompt']}",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trainer_trains_there(tmp_path: Path, variant: str) -> None:
    options = {"reward_scale": 1.25, **HERE, **VARIANTS[variant]}
    given = {"teacher": model(1, hidden=48), "ref_model": model(2)}
    for name in ("teacher", "reward_scale_fn", "teacher_prompt"):
        if name in options:
            given[name] = options.pop(name)
    if given["teacher"] == "routes":
        given["teacher"] = {"a": model(1), "b": model(3, hidden=48)}
    if given["teacher"] == "another tokenizer":
        given["teacher"] = model(1, vocab=len(tokenizer(OTHER)))
        given["teacher_processing_class"] = tokenizer(OTHER)
        printable = [i for i, piece in enumerate(tokenizer().convert_ids_to_tokens(range(280))) if not piece.isascii()]
        options["generation_kwargs"] = {"suppress_tokens": [*printable, 1, *range(280, 320)]}
    run = GOPDTrainer(
        model(0),
        args=config(tmp_path, **options),
        train_dataset=prompts(domain=["a", "b"] * 4),
        processing_class=tokenizer(),
        **given,
    )
    before = weights(run)
    run.train()
    assert run.model.device.type == DEVICE
    after = weights(run)
    assert all(x.isfinite().all() for x in after.values())
    assert any(not torch.equal(before[name], x.to(before[name].device)) for name, x in after.items())
    for row in run.state.log_history[:2]:
        assert math.isfinite(row["loss"])
        assert row["gopd/sample_seconds"] > 0
        assert row["gopd/score_seconds"] > 0
        assert row["gopd/tokens_per_second"] > 0


def test_phases_are_told_there(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    told = type("Callback", (Told, TrainerCallback), {})()
    run = GOPDTrainer(
        model(0),
        teacher=model(1, hidden=48),
        args=config(tmp_path, max_steps=1, **HERE),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        callbacks=[told],
    )
    run.train()
    assert {name for name, _ in told.phases} >= {"sample", "score", "step"}
    assert all(seconds >= 0 for _, seconds in told.phases)


def test_grpo_trains_there(tmp_path: Path) -> None:
    run = GRPOGOPDTrainer(
        model(0),
        args=config(tmp_path, GRPOGOPDConfig, num_generations=2, beta=0.0, reward_scale=1.25, **HERE),
        reward_funcs=lambda completions, **_: [float(len(x)) for x in completions],
        teacher=model(1, hidden=48),
        ref_model=model(2),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    run.train()
    assert run.model.device.type == DEVICE
    assert all(x.isfinite().all() for x in weights(run).values())


def test_trls_own_trainer_trains_with_this_loss_there(tmp_path: Path) -> None:
    run = own_trainer(tmp_path, beta=0.5, **HERE)
    with patch_distillation_loss(run):
        run.train()
    assert run.model.device.type == DEVICE
    assert math.isfinite(run.state.log_history[0]["loss"])


def test_the_command_distills_there(tmp_path: Path) -> None:
    files = Files(tmp_path)
    invoke(*small(files, tmp_path / "run", "--estimator", "full", "--lora", "2", steps=1))
    (row,) = metrics_of(tmp_path / "run")
    assert math.isfinite(row["loss"])
    assert (tmp_path / "run" / "report.html").is_file()
    assert "tokens" in invoke(*small(files, tmp_path / "dry", steps=1), "--dry-run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_transformers_models_there(dtype: torch.dtype) -> None:
    student, teacher = (model(seed).to(DEVICE, dtype).eval() for seed in (0, 1))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (2, 9), generator=g).to(DEVICE)
    live = torch.ones_like(ids)
    hidden = last_hidden_state(student, ids, live, keep=5)
    with torch.no_grad():
        frozen = head_of(teacher, last_hidden_state(teacher, ids, live, keep=5))
    out = fg.gopd_loss(head_of(student, hidden), frozen, token_ids=ids[:, -5:], estimator="full")
    out.loss.backward()

    def logprobs(of: nn.Module, states: Tensor) -> Tensor:
        return (states.detach().double() @ of.lm_head.weight.detach().double().T).log_softmax(-1)

    p, q = logprobs(student, hidden), logprobs(teacher, frozen.hidden)
    assert_close(out.kl, (p.exp() * (p - q)).sum(-1), 2e-5)
    assert all(x.grad.isfinite().all() for x in student.parameters() if x.grad is not None)
    student.train()
    patched = patch_lm_head(student)
    again = fg.gopd_loss(student(input_ids=ids).logits[:, -6:-1], frozen, token_ids=ids[:, -5:], estimator="full")
    patched.undo()
    assert_close(again.loss, out.loss, 2e-5 if dtype == torch.float32 else 2e-2)


def test_ligers_losses_there() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((11, 16), (320, 16), (11, 24), (320, 24))
    given = [torch.randn(shape, generator=g) for shape in shapes]
    labels = torch.randint(320, (11,), generator=g).masked_fill(torch.arange(11) % 3 == 0, -100)
    results = []
    for device in ("cpu", DEVICE):
        x, w, *teacher = (t.to(device) for t in given)
        x, w = x.requires_grad_(), w.requires_grad_()
        jsd = liger.LigerFusedLinearJSDLoss(0.3)(x, w, *teacher, labels.to(device))
        ids, ones = labels.clamp_min(0).to(device)[None], torch.ones(1, 11, device=device)
        grpo = liger.LigerFusedLinearGRPOLoss(use_ref_model=False)(x[None], w, ids, ones, ones[:, 0])[0]
        results.append([y.detach().cpu() for y in (jsd, grpo, *torch.autograd.grad(jsd + grpo, (x, w)))])
    for want, got in zip(*results, strict=True):
        assert_close(got, want, 2e-5)


@pytest.mark.skipif(not GPU and why_not("native") is not None, reason="doctor misses the native backend")
def test_doctor_finds_nothing_wrong_there() -> None:
    from distill_runs import runner
    from fused_gopd.cli import app

    found = runner.invoke(app, ["doctor"])
    assert found.exit_code == 0, found.output
