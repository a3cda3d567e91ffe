"""Completions that the student did not just sample itself: of an engine with its own numbers, and of the dataset."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from datasets import Dataset
from transformers import HfArgumentParser
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer
from fused_gopd.integrations.trl.rollouts import RecordedEngine, sampler_logprobs, samples, token_ids_of
from ranks import run_on_ranks
from test_trl import PROMPTS, SGD, assert_same, config, difference, model, prompts, tokenizer, trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")

ENDS = frozenset(range(0, 320, 6))  # end-of-sequence ids of test_trl.model


class FakeEngine:
    """TRL's ``VLLMGeneration`` without vLLM: its arguments, its answers' shapes, and weights of its own.

    ``noise`` is the standard deviation of what its logits differ from the student's, as kernels of another precision
    would; ``greedy`` makes it take the likeliest token. A turn has at most ``longest`` tokens. ``gaps`` are positions
    whose log-prob is None, as vLLM's NaN.
    """

    noise = 0.0
    greedy = False
    longest = 100
    gaps: tuple[int, ...] = ()
    answers_logprobs = True

    def __init__(self, **options: Any) -> None:
        self.student, self.options = options["model"], options
        self.logprobs, self.temperature = options["logprobs"], options["temperature"]
        self.synced = 0

    def sync_weights(self) -> None:
        self.synced += 1
        self.own = copy.deepcopy(self.student).eval()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
        assert (images, num_generations) == (None, 1)
        completions, logprobs, token_ids = [], [], []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt))
            ids: list[int] = []
            own: list[list[float | None]] = []
            most = min(self.options["max_completion_length"], self.longest)
            while len(ids) < most and (not ids or ids[-1] not in ENDS):
                logits = self.own(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1] / self.temperature
                logits = logits + self.noise * torch.randn(logits.shape, generator=generator)
                p = logits.log_softmax(-1)
                token = int(p.argmax()) if self.greedy else int(torch.multinomial(p.exp(), 1, generator=generator))
                own.append([None if len(ids) in self.gaps else float(p[token])])
                ids.append(token)
            completions.append(ids)
            logprobs.append(own)
            token_ids.append([[token] for token in ids])
        if self.logprobs is None or not self.answers_logprobs:
            return prompts, completions, None, None
        return prompts, completions, logprobs, token_ids


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """vLLM in TRL's trainer is the fake engine, with these attributes."""

    def use(**attributes: Any) -> None:
        made = type("Engine", (FakeEngine,), attributes)
        monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
        monkeypatch.setattr(distillation_trainer, "VLLMGeneration", made)

    return use


def batches_of(run: GOPDTrainer) -> list[dict[str, Any]]:
    """The batches whose loss is computed, as they come."""
    seen: list[dict[str, Any]] = []
    compute = run._compute_loss

    def record(student: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        seen.append(dict(inputs))
        return compute(student, inputs, *rest)

    run._compute_loss = record
    return seen


def dense_logprobs(of: Any, batch: dict[str, Any]) -> Tensor:
    """(B, K, V) log-probs at the completions, from a model's own forward."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    k = batch["completion_ids"].shape[1]
    return of(input_ids=ids, attention_mask=mask).logits[:, -k - 1 : -1].log_softmax(-1)


def one_step(trained: Any, loss: Tensor, rate: float = SGD["learning_rate"]) -> dict[str, Tensor]:
    """Weights after a step of plain SGD on a loss, at this learning rate."""
    loss.backward()
    return {name: x.detach() - rate * (0 if x.grad is None else x.grad) for name, x in trained.named_parameters()}


def parameters(run: GOPDTrainer) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in run.model.named_parameters()}


ONE: dict[str, Any] = {**SGD, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}


# ------------------------------------------------------------------------------------------------ of the same numbers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_is_cap": 1.05},
        {"rollout_is_cap": None, "temperature": 0.7},
        {"rollout_is": "sequence"},
        {"rollout_is": "none"},
        {"rollout_is": "none", "rollout_mask": {"token_ratio": [0.9, 1.1]}},
    ],
    ids=str,
)
def test_a_step_has_the_importance_weights_of_the_engine(tmp_path: Path, engine: Any, options: dict[str, Any]) -> None:
    """loss = sum_t w_t KL(p || q) / N with w = min(p / p_rollout, cap), dense and by hand."""
    engine(noise=0.3)
    run = trainer(tmp_path, use_vllm=True, max_steps=1, **ONE, **options)
    seen = batches_of(run)
    student, teacher = copy.deepcopy(run.model), model(1, hidden=48)
    run.train()
    (batch,) = seen
    live, temperature = batch["completion_mask"].bool(), options.get("temperature", 1.0)
    p, q = ((dense_logprobs(of, batch) / temperature).log_softmax(-1) for of in (student, teacher))
    own = p.gather(-1, batch["completion_ids"][..., None])[..., 0].detach()
    d = torch.where(live, own - batch["rollout_logprobs"], 0)
    assert d.abs().max() > 0.1
    ratio = d.exp()
    cap = options.get("rollout_is_cap", 2.0) or math.inf
    w = {"token": ratio, "sequence": d.sum(1, keepdim=True).exp(), "none": torch.ones_like(d)}[
        options.get("rollout_is", "token")
    ].clamp(max=cap)
    if "rollout_mask" in options:
        w = torch.where((ratio >= 0.9) & (ratio <= 1.1), w, 0)
    loss = ((p.exp() * (p - q)).sum(-1) * w * live).sum() / live.sum()
    assert_same(parameters(run), one_step(student, loss), 1e-5)

    log = run.state.log_history[0]
    assert log["gopd/sampler_kl"] == pytest.approx(float((d.expm1() - d)[live].mean()), rel=1e-4)
    if options != {"rollout_is": "none"}:
        w = w.expand(live.shape)[live]
        assert log["gopd/importance"] == pytest.approx(float(w.mean()), rel=1e-4)
        assert log["gopd/importance_max"] == pytest.approx(float(w.max()), rel=1e-4)
        assert log["gopd/masked_fraction"] == pytest.approx(float((w == 0).float().mean()), rel=1e-4)
        ess = w.sum() ** 2 / len(w) / (w**2).sum()
        assert log["gopd/effective_sample_size"] == pytest.approx(float(ess), rel=1e-4)
    assert log["gopd/staleness"] == 0


def test_the_second_step_on_a_batch_has_ratio_and_weight(tmp_path: Path, engine: Any) -> None:
    """`sampled`: the ratio is p / p_old, the weight p_old / p_rollout, and the engine's weights are a step old."""
    engine(noise=0.3)
    run = trainer(tmp_path, use_vllm=True, estimator="sampled", num_iterations=2, clip=[0.01, 0.01], max_steps=2, **ONE)
    seen = batches_of(run)
    start, middle = copy.deepcopy(run.model), []
    optimizer_step = run.training_step

    def step(*args: Any) -> Any:
        middle.append(copy.deepcopy(run.model))
        return optimizer_step(*args)

    run.training_step = step
    run.train()
    first, batch = seen
    assert torch.equal(first["completion_ids"], batch["completion_ids"])
    live, teacher = batch["completion_mask"].bool(), model(1, hidden=48)
    ids = batch["completion_ids"][..., None]
    old, p, q = (dense_logprobs(of, batch).gather(-1, ids)[..., 0] for of in (start, middle[1], teacher))
    rho, w = (p - old.detach()).exp(), (old.detach() - batch["rollout_logprobs"]).exp().clamp(max=2.0)
    advantage = (q - old).detach()
    token = torch.maximum(-advantage * rho, -advantage * rho.clamp(0.99, 1.01))
    assert ((rho - 1).abs()[live] > 0.01).any()
    loss = torch.where(live, token * w, 0).sum() / live.sum()
    assert_same(parameters(run), one_step(middle[1], loss, SGD["learning_rate"] / 2), 1e-5)  # a linear schedule
    assert [log["gopd/staleness"] for log in run.state.log_history[:2]] == [0, 1]
    # the mismatch is of the policy that sampled, not of the one a step later
    kl = [log["gopd/sampler_kl"] for log in run.state.log_history[:2]]
    assert kl[1] == pytest.approx(kl[0], rel=1e-5)
    assert run.vllm_generation.synced == 1


@pytest.mark.parametrize("estimator", ["full", "sampled", "topk"])
def test_an_engine_of_the_students_numbers_changes_nothing(tmp_path: Path, engine: Any, estimator: str) -> None:
    engine()
    options = {"use_vllm": True, "estimator": estimator, "ref_model": model(2), "reward_scale": 1.25, **SGD}
    options |= {"k": 8} if estimator == "topk" else {}
    run, plain = (trainer(tmp_path, **options, rollout_is=kind) for kind in ("token", "none"))
    for each in (run, plain):
        each.train()
    assert difference(weights(run), model(0).state_dict()) > 1e-3
    assert_same(weights(run), weights(plain), 1e-5)
    log = run.state.log_history[0]
    for name in ("importance", "importance_max", "effective_sample_size"):
        assert log[f"gopd/{name}"] == pytest.approx(1, abs=1e-4)
    assert 0 <= log["gopd/sampler_kl"] < 1e-8


def test_a_token_without_log_prob_has_weight_one(tmp_path: Path, engine: Any) -> None:
    engine(noise=0.3, gaps=(0, 2))
    run = trainer(tmp_path, use_vllm=True, max_steps=1, rollout_is_cap=None, **ONE)
    seen = batches_of(run)
    own = dense_logprobs
    student = copy.deepcopy(run.model)
    run.train()
    (batch,) = seen
    logprobs = own(student, batch).gather(-1, batch["completion_ids"][..., None])[..., 0]
    ratio = (logprobs - batch["rollout_logprobs"]).exp()
    live = batch["completion_mask"].bool()
    torch.testing.assert_close(ratio[:, [0, 2]][live[:, [0, 2]]], torch.ones(int(live[:, [0, 2]].sum())))
    assert ((ratio - 1).abs()[:, 1][live[:, 1]] > 1e-3).all()


def test_options_of_a_command_line(tmp_path: Path) -> None:
    text = '{"token_ratio": [0.5, null], "seq_mean_k3": [null, 0.1]}'
    given = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--use_vllm", "true"]
    (parsed,) = HfArgumentParser(GOPDConfig).parse_args_into_dataclasses(
        [*given, "--rollout_mask", text, "--rollout_is", "geometric", "--estimator", "sampled", "--trust_region", text]
    )
    expected = {"token_ratio": [0.5, None], "seq_mean_k3": [None, 0.1]}
    assert (parsed.rollout_mask, parsed.trust_region, parsed.rollout_is_cap) == (expected, expected, 2.0)
    assert parsed._rollout_options["rollout_is"] == "geometric"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_is": "sequence"}, "rollout_is needs use_vllm=True"),
        ({"rollout_is_cap": 3.0}, "rollout_is_cap needs use_vllm=True"),
        ({"trust_region": {"token_ratio": [0.5, 2]}, "use_vllm": True}, "trust_region.*'sampled'"),
        ({"rollout_mask": {"ratio": [0.5, 2]}, "use_vllm": True}, "rollout_mask must be of the statistics"),
        ({"rollout_is": "none", "rollout_is_cap": 3.0, "use_vllm": True}, "rollout_is='none' makes all of them 1"),
        ({"rollout_is": "tokens", "use_vllm": True}, "rollout_is must be"),
        ({"lmbda": 1.5}, "lmbda must be a share"),
        ({"lmbda": 0.5, "estimator": "sampled"}, "lmbda=0.5 needs estimator='full' or 'topk'"),
        ({"sft_weight": 0.1}, "sft_weight=0.1 needs lmbda below 1"),
        ({"sft_weight": -1.0, "lmbda": 0.5}, "sft_weight must not be negative|sft_weight must be"),
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_an_engine_without_log_probs_is_named(tmp_path: Path, engine: Any) -> None:
    engine(answers_logprobs=False)
    with pytest.raises(ValueError, match="the engine returned no log-probs of the tokens that it sampled"):
        trainer(tmp_path, use_vllm=True).train()
    run = trainer(tmp_path, use_vllm=True, rollout_is="none")
    run.train()
    assert "gopd/sampler_kl" not in run.state.log_history[0]


# --------------------------------------------------------------------------------------------------------- the record


class Answers:
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def generate(self, prompts: Any, **_: Any) -> Any:
        return self.answers.pop(0)


def test_turns_between_tools_find_their_log_probs() -> None:
    """Two completions of one prompt, one of which calls a tool; the second turn is cut by TRL."""
    turns: dict[Any, Any] = {}
    engine = RecordedEngine(
        Answers(
            (None, [[5, 6], [7, 6]], [[[-1.0], [-2.0]], [[-3.0], [-4.0]]], [[[5], [6]], [[7], [6]]]),
            # with the likeliest tokens beside the sampled ones, in the order of their ranks
            (None, [[8, 9, 4]], [[[-0.1, -5.0], [-6.0], [None, -1.0]]], [[[3, 8], [9], [4, 2]]]),
        ),
        turns,
    )
    engine.generate(prompts=[[1, 2], [1, 2]], images=None)
    engine.generate(prompts=[[1, 2, 7, 6, 30, 31]], images=None)
    batch = {
        "prompt_ids": torch.tensor([[0, 1, 2], [0, 1, 2]]),
        "prompt_mask": torch.tensor([[0, 1, 1]] * 2),
        "completion_ids": torch.tensor([[5, 6, 0, 0, 0, 0], [7, 6, 30, 31, 8, 9]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6]),
        "tool_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]),
    }
    expected = torch.tensor([[-1.0, -2.0, 0, 0, 0, 0], [-3.0, -4.0, 0, 0, -5.0, -6.0]])
    assert torch.equal(sampler_logprobs(turns, batch), expected)
    batch["completion_ids"] = torch.tensor([[5, 6, 0, 0, 0, 0, 0], [7, 6, 30, 31, 8, 9, 4]])
    batch["completion_mask"] = batch["tool_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1]])
    assert sampler_logprobs(turns, batch)[1, -1].isnan()


def look() -> str:
    """Looks."""
    return "on the mat"


def test_completions_with_tools_have_the_log_probs_of_all_their_turns(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own loop over tools; every other completion calls one, and the second turn is cut to 3 tokens.

    The engine is the student: all weights are 1.
    """
    engine(longest=6)
    calls = itertools.count()

    def parse(_: Any, ids: list[int], **options: Any) -> dict[str, Any]:
        called = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
        return {"role": "assistant", "content": "", **({"tool_calls": called} if next(calls) % 2 else {})}

    monkeypatch.setattr(distillation_trainer, "parse_response", parse)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    run = trainer(tmp_path, data=data, use_vllm=True, max_completion_length=12, rollout_is_cap=None, **ONE, max_steps=2)
    for each in (run.processing_class, run._tokenizer):
        each.chat_template, each.response_template = TEMPLATE, "one"
    run.tools, run._tool_dict = [look], {"look": look}
    run.vllm_mode = "server"  # TRL asks an engine in this process for its positions
    run._get_tool_suffix_ids = lambda messages: [250, 251, 252]
    seen = batches_of(run)
    run.train()
    for batch in seen:
        live = batch["completion_mask"].bool() & batch["tool_mask"].bool()
        assert (batch["tool_mask"] == 0).any()
        assert batch["completion_ids"].shape[1] == 12
        assert (batch["rollout_logprobs"][~live] == 0).all()
        assert (batch["rollout_logprobs"][live] < 0).all()
    assert all(log["gopd/sampler_kl"] < 1e-8 for log in run.state.log_history[:2])
    assert all(log["gopd/importance_max"] == pytest.approx(1, abs=1e-4) for log in run.state.log_history[:2])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((None, [[5, 6]], [[[-1.0]]], [[[5]]]), "1 log-probs for a completion of 2 tokens"),
        ((None, [[5]], [[[-1.0]]], [[[4]]]), "log-probs of position 0 are not those of token 5"),
        ((None, [[5]], [[[-1.0, -2.0]]], None), "log-probs of position 0 are not those of token 5"),
    ],
)
def test_answers_that_are_not_the_tokens_log_probs_are_named(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordedEngine(Answers(answer), {}).generate(prompts=[[1]])


# ------------------------------------------------------------------------------------------ completions of the dataset

COMPLETIONS = [" sat on the mat", " four", "", " three two one", " cat", " mat", " one two three four one two", " x"]


def answered() -> Any:
    return prompts(completion=COMPLETIONS)


def test_the_datasets_completions_have_the_loss_of_trls_gkd(tmp_path: Path) -> None:
    """All prompts are one batch, so that their order does not matter; TRL's collator is in place of a chat template."""
    text = tokenizer()
    rows = []
    for row in answered():
        before = text(row["prompt"])["input_ids"]
        after = [*text(row["prompt"] + row["completion"])["input_ids"][len(before) :], text.eos_token_id]
        after = after[: 1 + next(t for t, token in enumerate(after) if token in ENDS)][:6]
        rows.append((before, after))

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(before) + len(after) for before, after in rows)
        ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (1, -100, 0))
        for i, (before, after) in enumerate(rows):
            n = len(before) + len(after)
            ids[i, :n], mask[i, :n] = torch.tensor([*before, *after]), 1
            labels[i, len(before) : n] = torch.tensor(after)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    options = {**SGD, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1, "beta": 0.3}
    run = trainer(tmp_path, data=answered(), lmbda=0.0, **options)
    run.train()
    plain = {name: getattr(run.args, name) for name in ("bf16", "use_cpu", "report_to", "save_strategy")}
    gkd = GKDTrainer(
        model(0),
        model(1),
        args=GKDConfig(str(tmp_path / "gkd"), lmbda=0.0, temperature=1.0, **plain, **options),
        data_collator=collate,
        train_dataset=answered(),
        processing_class=tokenizer(),
    )
    gkd.teacher_model = model(1, hidden=48)
    gkd.train()
    assert_same(weights(run), weights(gkd), 1e-5)
    assert run.state.log_history[0]["gopd/on_policy"] == 0
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(gkd.state.log_history[-1]["train_loss"], abs=1e-6)


@pytest.mark.parametrize("estimator", ["full", "topk"])
def test_a_batch_of_the_datasets_completions_has_a_supervised_term(tmp_path: Path, estimator: str) -> None:
    options = {"lmbda": 0.0, "sft_weight": 0.7, "max_steps": 1, "estimator": estimator, "k": None, **ONE}
    options |= {"k": 320} if estimator == "topk" else {}
    run = trainer(tmp_path, data=answered(), **options)
    seen = batches_of(run)
    student, teacher = copy.deepcopy(run.model), model(1, hidden=48)
    run.train()
    (batch,) = seen
    live = batch["completion_mask"].bool()
    p, q = (dense_logprobs(of, batch) for of in (student, teacher))
    label = p.gather(-1, batch["completion_ids"][..., None])[..., 0]
    loss = torch.where(live, (p.exp() * (p - q)).sum(-1) - 0.7 * label, 0).sum() / live.sum()
    assert_same(parameters(run), one_step(student, loss), 1e-5)
    expected = -float(label[live].detach().mean())
    assert run.state.log_history[0]["gopd/sft_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
def test_sampled_batches_have_no_supervised_term(tmp_path: Path, iterations: int) -> None:
    """Of steps 0 to 5 with seed 2 those that are sampled: `samples` says which, and each step logs it."""
    options: dict[str, Any] = {"data": answered(), "lmbda": 0.5, "sft_weight": 0.5, "max_steps": 6, **ONE}
    run = trainer(tmp_path, **options, num_iterations=iterations, seed=2)
    seen = batches_of(run)
    run.train()
    sampled = [samples(2, step // iterations, 0.5) for step in range(6)]
    assert 0 < sum(sampled) < 6
    assert ["sft_labels" not in batch for batch in seen] == sampled
    assert [log["gopd/on_policy"] for log in run.state.log_history[:6]] == sampled
    assert ["gopd/sft_loss" not in log for log in run.state.log_history[:6]] == sampled


def test_a_mixed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lmbda": 0.5, "sft_weight": 0.5, "max_steps": 6, "save_strategy": "steps"}
    options |= {"save_steps": 3}
    run = trainer(tmp_path, data=answered(), **options)
    run.train()
    resumed = trainer(tmp_path, data=answered(), student=model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed), weights(run))


def test_evaluation_samples(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=answered(), lmbda=0.0, max_steps=1)
    seen = batches_of(run)
    run.evaluate(answered())
    given = {tuple(ids) for ids in run._tokenize_completions([[]] * 8, list(zip(PROMPTS, COMPLETIONS, strict=True)))}
    sampled = [
        tuple(ids[mask.bool()].tolist())
        for batch in seen
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert len(sampled) == 8
    assert not given & set(sampled)


def test_shares_are_those_of_many_batches() -> None:
    for share in (0.0, 0.25, 1.0):
        found = sum(samples(7, i, share) for i in range(4000)) / 4000
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    assert samples(7, 3, 0.5) == samples(7, 3, 0.5)
    assert [samples(0, i, 0.5) for i in range(50)] != [samples(1, i, 0.5) for i in range(50)]


def test_importance_weights_are_of_sampled_batches_alone(tmp_path: Path, engine: Any) -> None:
    engine(noise=0.3)
    run = trainer(tmp_path, data=answered(), use_vllm=True, lmbda=0.5, max_steps=6, **ONE)
    seen = batches_of(run)
    run.train()
    assert ["rollout_logprobs" in batch for batch in seen] == [samples(42, step, 0.5) for step in range(6)]


def test_a_teacher_with_another_tokenizer_reads_the_datasets_completions(tmp_path: Path) -> None:
    """The same tokens under other ids: the run ends in the weights of the ordinary one."""
    import test_cross_tokenizer as cross

    same = tokenizer()
    other, order = cross.permuted(same)
    size = len(same)
    options = {"data": answered(), "lmbda": 0.0, "sft_weight": 0.2}
    expected = cross.run(tmp_path / "a", cross.own(2, size), None, same, **options)
    teacher = cross.with_other_ids(2, size, order)
    found = cross.run(tmp_path / "b", teacher, None, other, cross_tokenizer=True, **options)
    assert difference(found, cross.own(1, size).state_dict()) > 1e-3
    assert_same(found, expected, 1e-5)


def test_a_cache_has_the_datasets_completions_from_the_second_epoch_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=answered(), lmbda=0.0, teacher_cache=str(tmp_path / "cache"), max_steps=4, **ONE)
    run.train()
    assert [log.get("gopd/cache_hits") for log in run.state.log_history[:4]] == [0, 0, 1, 1]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ids_of(prompt: Any, completion: Any, longest: int = 100, template: str = TEMPLATE) -> tuple[Any, str]:
    text = tokenizer()

    def render(messages: Any, add_generation_prompt: bool = False) -> str:
        return str(
            text.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    first = prompt if isinstance(prompt, str) else render(prompt, add_generation_prompt=True)
    before = text(first, add_special_tokens=False)["input_ids"]
    options = {"tokenizer": text, "render": render, "end_ids": [0], "longest": longest}
    ids = token_ids_of(prompt, completion, before, **options)
    return ids, text.decode(ids)


def test_token_ids_of_completions() -> None:
    question = [{"role": "user", "content": "the cat"}]
    answer = [{"role": "assistant", "content": " sat on the mat"}]
    assert ids_of("the cat", " sat on the mat")[1] == " sat on the mat<eos>"
    assert ids_of("the cat", "")[1] == "<eos>"
    assert ids_of("the cat", " sat<eos> on")[1] == " sat<eos>"
    for completion in (answer, " sat on the mat"):
        assert ids_of(question, completion)[1] == " sat on the mat<eos>"
    ids, _ = ids_of("the cat", " sat on the mat")
    assert ids_of("the cat", " sat on the mat", longest=2)[0] == ids[:2]
    # "a" and "t" are one token together: the completion's tokens follow those of the prompt all the same
    text = tokenizer()
    assert text("the cat")["input_ids"][: len(text("the ca")["input_ids"])] != text("the ca")["input_ids"]
    assert ids_of("the ca", "t sat")[0] == [*text("t sat")["input_ids"], 0]


@pytest.mark.parametrize(
    ("prompt", "completion", "error", "message"),
    [
        ("a", [{"role": "assistant", "content": "b"}], TypeError, "'completion' of the dataset must have a text"),
        ("a", None, TypeError, "'completion' of the dataset must have a text, as the prompt is, got None"),
        ([{"role": "user", "content": "a"}], 3, TypeError, "must have a text or a list of messages, got 3"),
    ],
)
def test_completions_of_another_kind_are_named(prompt: Any, completion: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ids_of(prompt, completion)


def test_a_template_that_writes_prompts_otherwise_is_named() -> None:
    template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="the chat template writes a prompt otherwise when its answer follows"):
        ids_of([{"role": "user", "content": "a"}], "b", template=template)


def test_a_dataset_without_completions_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"lmbda=0\.5 needs a column 'completion' in train_dataset, which has only prompt"
    ):
        trainer(tmp_path, lmbda=0.5)
    stream = prompts(completion=[None] * 8).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"lmbda=0\.0 needs a column 'completion', and a row has none"):
        trainer(tmp_path, lmbda=0.0, data=stream).train()


# --------------------------------------------------------------------------------------------------------------- ranks


def _run(folder: Path, batch: int, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and logs of a run that depends on no random number of the ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
        patch.setattr(distillation_trainer, "VLLMGeneration", type("E", (FakeEngine,), {"noise": 0.3, "greedy": True}))
        run = trainer(folder, data=answered(), per_device_train_batch_size=batch, use_vllm=True, **SGD, **options)
        run.train()
    return weights(run), run.state.log_history


def _ranks(folder: str) -> Any:
    return _run(Path(folder), 2, lmbda=0.5, sft_weight=0.3, max_steps=6)


@pytest.mark.ranks
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    one, logs = _run(tmp_path / "one", 4, lmbda=0.5, sft_weight=0.3, max_steps=6)
    (first, found), (second, _) = run_on_ranks("test_trl_rollouts:_ranks", 2, str(tmp_path / "two"))
    assert_same(first, second)
    assert_same(first, one, 1e-5)
    assert 0 < sum(log["gopd/on_policy"] for log in logs[:6]) < 6
    for own, all_ranks in zip(logs[:6], found[:6], strict=True):
        for name in ("sampler_kl", "importance", "importance_max", "effective_sample_size", "sft_loss", "on_policy"):
            assert (f"gopd/{name}" in own) == (f"gopd/{name}" in all_ranks)
            if f"gopd/{name}" in own:
                assert all_ranks[f"gopd/{name}"] == pytest.approx(own[f"gopd/{name}"], rel=1e-3), name
