"""G-OPD in TRL: tiny random Qwen3 models, a tokenizer made in memory, real trainers on a CPU."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.trainer_callback import ProgressCallback  # noqa: E402
from transformers.trainer_utils import set_seed  # noqa: E402
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer  # noqa: E402

import fused_gopd as fg  # noqa: E402
from fused_gopd.integrations.trl import (  # noqa: E402
    GOPDConfig,
    GOPDTrainer,
    GRPOGOPDConfig,
    GRPOGOPDTrainer,
    card,
    patch_distillation_loss,
    phases,
)
from fused_gopd.integrations.trl import loading as trl_loading  # noqa: E402
from fused_gopd.integrations.trl import models as trl_models  # noqa: E402
from fused_gopd.integrations.trl.batch import Batch  # noqa: E402
from fused_gopd.integrations.trl.checks import check_vocabulary, positions_of  # noqa: E402
from fused_gopd.integrations.trl.patch import fused_divergence_loss  # noqa: E402
from fused_gopd.integrations.trl.phases import Phase  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 320
# plain SGD where runs are compared: Adam divides by a gradient's own size, and makes steps of the rounding of zeros
# (and clipping a gradient's norm hides its scale)
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
PROMPTS = ["the cat", "one two three", "mat", "numbers one", "a", "four two", "the mat sat", "cat one"]


def tokenizer(first: str = "the cat sat on the mat") -> PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([first, "numbers one two three four"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def model(seed: int, hidden: int = 32, vocab: int = VOCAB) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    made = Qwen3ForCausalLM(config)
    # completions end at various lengths
    made.generation_config.eos_token_id = list(range(0, vocab, 6))
    return made


def prompts(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"prompt": PROMPTS, **columns})


def config(folder: Path, kind: type = GOPDConfig, **options: Any) -> Any:
    """Two steps of two accumulated batches of two prompts, in float32, unless told otherwise."""
    plain = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **{**plain, **options})


def trainer(folder: Path, kind: type = GOPDTrainer, student: Any = None, data: Any = None, **arguments: Any) -> Any:
    """A trainer; what its configuration and its constructor know go where they belong."""
    names = ("ref_model", "reward_scale_fn", "teacher_processing_class", "peft_config", "advantage_fn", "callbacks")
    names += ("teacher_prompt", "ref_prompt", "eval_dataset")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    own["teacher"] = arguments.pop("teacher") if "teacher" in arguments else model(1, hidden=48)
    return kind(
        model(0) if student is None else student,
        args=config(folder, **arguments),
        train_dataset=prompts() if data is None else data,
        processing_class=tokenizer(),
        **own,
    )


def weights(trained: Any) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in trained.model.state_dict().items()}


def trained(*args: Any, **arguments: Any) -> dict[str, Tensor]:
    run = trainer(*args, **arguments)
    run.train()
    return weights(run)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= tolerance, f"weights differ by {worst}"


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def recorded(seed: int) -> tuple[Qwen3ForCausalLM, list[int]]:
    """A model, and how many sequences each of its forwards has had."""
    made, rows = model(seed), list[int]()
    made.model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    return made, rows


# ------------------------------------------------------------------------------------------------------ same numbers


class Dense(GOPDTrainer):
    """The same trainer with logits from the models' own forward; its loss is made dense by ``dense_loss``."""

    def _hidden(self, model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logits[:, -batch.token_ids.shape[1] - 1 : -1]

    def _head(self, model: Any, hidden: Tensor) -> fg.Logits:
        return fg.Logits(hidden, temperature=self.temperature)

    def _at_head(self, model: Any, hidden: Tensor, function: Callable[[Any], Any]) -> Any:
        return function(self._head(model, hidden))


@pytest.fixture
def dense_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(trl_models, "gopd_loss", fg.reference.gopd_loss)


@pytest.mark.parametrize(
    "options",
    [
        {"reward_scale": 1.25},
        {"reward_scale": 1.0, "divergence": "forward_kl", "temperature": 0.7},
        {"reward_scale": 0.5, "divergence": "jsd", "reduction": "seq-mean-token-mean"},
        {"reward_scale": 1.5, "estimator": "sampled", "advantage_clip": 3.0},
        {"reward_scale": 1.25, "estimator": "sampled", "baseline": "expected"},
        {"reward_scale": 1.25, "estimator": "topk", "k": 8},
        {"divergence": "jsd", "kl_ref": "exact", "kl_ref_weight": 0.3, "entropy_weight": 0.1},
        {"estimator": "sampled", "kl_ref": "k3", "kl_ref_weight": 0.3},
        {"reward_scale": 1.25, "divergence": "mixed", "forward_weight": 0.3},
        {"reward_scale": 1.25, "estimator": "topk", "k": 8, "divergence": "skew_kl", "skew": 0.2},
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_two_steps_end_in_the_weights_of_a_dense_loss(
    tmp_path: Path, dense_loss: Callable[[], None], options: dict[str, Any]
) -> None:
    options = {**SGD, **options}
    fused = trained(tmp_path, ref_model=model(2), **options)
    dense_loss()
    dense = trained(tmp_path, kind=Dense, ref_model=model(2), **options)
    assert difference(fused, model(0).state_dict()) > 1e-3
    assert_same(fused, dense, 1e-5)


def test_lambda_1_with_trls_beta_ends_in_the_weights_of_trls_own_trainer(tmp_path: Path) -> None:
    own = DistillationTrainer(
        model(0),
        model(1, hidden=48),
        args=config(tmp_path, DistillationConfig, **SGD, beta=0.5),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    own.train()
    assert_same(trained(tmp_path, **SGD, beta=0.5), weights(own), 1e-5)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_accumulated_batches_are_one_big_batch(tmp_path: Path, reduction: str) -> None:
    """Greedy completions end at different lengths: a mean of means would be another number."""
    options: dict[str, Any] = {**SGD, "generation_kwargs": {"do_sample": False}, "max_steps": 1}
    options |= {"reward_scale": 1.25, "max_completion_length": 12, "shuffle_dataset": False, "reduction": reduction}
    big = trainer(tmp_path, ref_model=model(2), per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    big.train()
    assert big.state.log_history[0]["completions/min_length"] < big.state.log_history[0]["completions/max_length"]
    small = trained(
        tmp_path, ref_model=model(2), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    assert_same(weights(big), small, 1e-6)


def _run(folder: Path, batch: int, lora: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and first log of a greedy run, so that what is sampled does not depend on the rank. With an adapter one
    teacher is an adapter, too."""
    first: Any = model(1)
    if lora:
        torch.manual_seed(8)
        expert = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(model(0), expert).save_pretrained(folder / "expert")
        first = f"adapter:{folder / 'expert'}"
    run = trainer(
        folder,
        ref_model=model(2),
        data=prompts(domain=["a", "b"] * 4),
        teacher={"a": first, "b": model(3, hidden=48)},
        teacher_prompt={"b": lambda row: f"one two {row['prompt']}"},
        ref_prompt=lambda row: f"mat {row['prompt']}",
        route_column="domain",
        reward_scale=1.25,
        **SGD,
        generation_kwargs={"do_sample": False},
        max_completion_length=12,
        per_device_train_batch_size=batch,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    run.train()
    return weights(run), run.state.log_history[0]


def _sharded(whole: Qwen3ForCausalLM) -> Any:
    for layer in whole.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    return torch.distributed.fsdp.fully_shard(whole)


def _gradients(folder: Path, rows: list[int], shard: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Of one batch, all models sharded or none; accelerate shards nothing on a CPU."""
    data = prompts(domain=["a", "b"] * 4)
    run = trainer(
        folder,
        teacher={"a": shard(model(1)), "b": shard(model(3, hidden=48))},
        ref_model=shard(model(2)),
        data=data,
        route_column="domain",
        reward_scale=1.25,
        generation_kwargs={"do_sample": False},
        gradient_accumulation_steps=1,
        per_device_train_batch_size=len(rows),
    )
    inputs = run._prepare_inputs([data[i] for i in rows])
    shard(run.model)
    run.compute_loss(run.model, inputs).backward()
    gradients = {name: x.grad for name, x in run.model.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in gradients.items()}


def _ranks(folder: str) -> dict[str, Any]:
    """Over this process group: trained without and with an adapter, and gradients where all models are sharded."""
    rank = int(os.environ["RANK"])
    runs = [_run(Path(folder) / str(rank), 2, lora) for lora in (False, True)]
    # the second teacher has no prompt on the first rank, and must be called there all the same
    return {"runs": runs, "gradients": _gradients(Path(folder) / str(rank), [[0, 2], [1, 4]][rank], _sharded)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One launch for the tests below."""
    return run_on_ranks("test_trl:_ranks", 2, str(tmp_path_factory.mktemp("ranks")), timeout=120)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.ranks
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, ranks: list[dict[str, Any]], lora: bool) -> None:
    (first, log), (second, _) = (rank["runs"][lora] for rank in ranks)
    one, one_log = _run(tmp_path, 4, lora)
    assert_same(first, second)
    assert_same(first, one, 1e-5)
    for name in ("gopd/reward", "gopd/reward/a", "gopd/advantage_std/b", "gopd/length/b", "gopd/kl_target", "loss"):
        assert log[name] == pytest.approx(one_log[name], rel=1e-4), name


@pytest.mark.ranks
def test_sharded_models_have_the_gradients_of_whole_ones(tmp_path: Path, ranks: list[dict[str, Any]]) -> None:
    whole = _gradients(tmp_path, [0, 2, 1, 4], lambda x: x)
    for rank in ranks:
        assert_same(rank["gradients"], whole, 1e-5)


def _zero_3(folder: str) -> dict[str, Tensor]:
    """Gradients of :func:`_gradients` on this rank's part, all models under ZeRO-3, which accelerate leaves to GPUs."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    settings |= {"zero_allow_untested_optimizer": True}
    rank, data = int(os.environ["RANK"]), prompts()
    options = {"reward_scale": 1.25, "generation_kwargs": {"do_sample": False}, "gradient_accumulation_steps": 1}
    run = trainer(Path(folder) / str(rank), ref_model=model(2), **options)
    inputs = run._prepare_inputs([data[i] for i in [[0, 2], [1, 4]][rank]])
    alive = HfDeepSpeedConfig(settings)  # what tells TRL that parameters are sharded
    run._teachers[0], run._reference = (
        replace(x, model=deepspeed.initialize(model=x.model, config=settings)[0])
        for x in (run._teachers[0], run._reference)
    )
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=run.model, optimizer=optimizer, config=settings)
    assert run.model.lm_head.weight.numel() == 0
    engine.backward(run.compute_loss(engine, inputs))
    assert run.model.lm_head.weight.numel() == 0
    assert alive.is_zero3()
    return {name: safe_get_full_grad(x) for name, x in run.model.named_parameters()}


@pytest.mark.ranks
def test_zero_3_has_the_gradients_of_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks = run_on_ranks("test_trl:_zero_3", 2, str(tmp_path), timeout=120)
    data = prompts()
    options = {"reward_scale": 1.25, "generation_kwargs": {"do_sample": False}, "gradient_accumulation_steps": 1}
    run = trainer(tmp_path, ref_model=model(2), per_device_train_batch_size=4, **options)
    run.compute_loss(run.model, run._prepare_inputs([data[i] for i in [0, 2, 1, 4]])).backward()
    for gradients in ranks:
        assert_same(gradients, {name: x.grad for name, x in run.model.named_parameters()}, 1e-5)


# --------------------------------------------------------------------------------------------------- which model runs


def test_lambda_1_never_runs_the_reference(tmp_path: Path) -> None:
    ref, rows = recorded(2)
    alone = trained(tmp_path)
    assert_same(trained(tmp_path, ref_model=ref), alone)
    assert rows == []


def test_models_that_lambda_cancels_in_all_steps_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "other")
    model(2).save_pretrained(folder)
    monkeypatch.setattr(trl_loading, "create_model_from_path", never)
    trained(tmp_path, ref_model=folder, max_steps=1)
    trained(tmp_path, teacher=folder, ref_model=model(2), reward_scale=0.0, max_steps=1)
    with pytest.raises(AssertionError):
        trainer(tmp_path, ref_model=folder, reward_scale_end=1.25)


def test_lambda_0_never_runs_the_teacher(tmp_path: Path) -> None:
    teacher, rows = recorded(1)
    trainer(tmp_path, teacher=teacher, ref_model=model(2), reward_scale=0.0).train()
    assert rows == []


def test_a_teacher_runs_on_the_prompts_that_are_routed_to_it(tmp_path: Path) -> None:
    (a, rows_a), (b, rows_b) = recorded(1), recorded(3)
    data = prompts(domain=["a", "a", "a", "b", "a", "a", "a", "b"])
    run = trainer(tmp_path, teacher={"a": a, "b": b}, route_column="domain", data=data, max_steps=2)
    run.train()
    assert (sum(rows_a), sum(rows_b)) == (6, 2)
    assert 0 not in rows_b


def test_routed_losses_are_those_of_each_teacher_on_its_prompts(tmp_path: Path) -> None:
    teachers = {"a": model(1), "b": model(3, hidden=48)}
    data = prompts(domain=["a", "b"] * 4)
    run = trainer(tmp_path, teacher=teachers, route_column="domain", data=data, reward_scale=1.25, ref_model=model(2))
    batch = run._prepare_inputs([data[i] for i in range(4)])
    batch = Batch.from_trl(batch)
    out = run._loss(run.model, batch)
    for i, teacher in enumerate(teachers.values()):
        alone = trainer(tmp_path, teacher=teacher, reward_scale=1.25, ref_model=model(2))
        rows = batch.teacher_index == i
        expected = alone._loss(alone.model, replace(batch.take(rows), teacher_index=None))
        torch.testing.assert_close(out.token_loss[rows], expected.token_loss)


def test_the_base_of_an_adapter_is_the_reference_that_a_copy_would_be(tmp_path: Path) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    runs = [
        trained(tmp_path, peft_config=lora, ref_model=ref, reward_scale=1.25, max_steps=3) for ref in ("base", model(0))
    ]
    assert_same(*runs, 1e-6)


def test_padding_beyond_the_joint_vocabulary_is_never_sampled(tmp_path: Path) -> None:
    """As 151936 rows beside 152064: the student's own padding is as likely as any token here."""
    run = trainer(tmp_path, student=model(0, vocab=4 * VOCAB), teacher=model(1), max_completion_length=12)
    sampled = run._prepare_inputs([{"prompt": text} for text in PROMPTS[:4]])["completion_ids"]
    assert sampled.max() < VOCAB
    run.train()


def test_a_scorer_is_the_teacher_whose_log_probs_it_tells(tmp_path: Path) -> None:
    teacher = model(1, hidden=48).eval()

    def head(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.Logits:
        with torch.no_grad():
            logits = teacher(input_ids=input_ids, attention_mask=attention_mask).logits
        return fg.Logits(logits[:, -completion_mask.shape[1] - 1 : -1])

    def sampled(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.TokenLogProbs:
        token_ids = input_ids[:, -completion_mask.shape[1] :]
        return fg.TokenLogProbs(fg.token_logprobs(head(input_ids, attention_mask, completion_mask), token_ids))

    def likeliest(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.TopKLogProbs:
        return fg.TopKLogProbs(*fg.token_topk(head(input_ids, attention_mask, completion_mask), 8))

    def both(*scored: Tensor) -> fg.TopKLogProbs:
        listed = likeliest(*scored)
        return fg.TopKLogProbs(listed.token_ids, listed.logprobs, sampled(*scored).logprobs)

    topk = {"estimator": "topk", "k": 8}
    local = {"sampled": trained(tmp_path, teacher=teacher, **SGD, estimator="sampled")}
    local["topk"] = trained(tmp_path, teacher=teacher, **SGD, **topk)
    # a scorer lists as many tokens as it does: k need not be given, and must be that number if it is
    for scorer, options in ((sampled, {"estimator": "sampled"}), (likeliest, {"estimator": "topk"}), (likeliest, topk)):
        assert_same(trained(tmp_path, teacher=scorer, **SGD, **options), local[options["estimator"]], 1e-6)
    exact, served = (
        trained(tmp_path, teacher=x, **SGD, tail="sampled", estimator="topk", k=8) for x in (teacher, both)
    )
    assert_same(served, exact, 1e-6)


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
@pytest.mark.parametrize("routed", [False, True], ids=["one teacher", "two"])
def test_a_scorer_is_asked_about_the_student_s_tokens(tmp_path: Path, tail: str, routed: bool) -> None:
    """The weights after training are those of teachers that are here; a reference that is a scorer is asked too."""

    def asked(source: Any) -> Any:
        def scorer(
            input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, token_ids: Tensor
        ) -> fg.TopKLogProbs:
            with torch.no_grad():
                logits = source(input_ids=input_ids, attention_mask=attention_mask).logits
            head = fg.Logits(logits[:, -completion_mask.shape[1] - 1 : -1])
            own = fg.token_logprobs(head, input_ids[:, -completion_mask.shape[1] :])
            return fg.TopKLogProbs(token_ids, fg.selected_logprobs(head, token_ids), own)

        return scorer

    teachers, ref = {"a": model(1, hidden=48).eval(), "b": model(3).eval()}, model(2).eval()
    options: dict[str, Any] = {"estimator": "topk", "k": 4, "support": "student", "tail": tail, "reward_scale": 1.25}
    if routed:
        options |= {"route_column": "domain", "data": prompts(domain=["a", "b"] * 4)}
    given = teachers if routed else teachers["a"]
    served = {route: asked(x) for route, x in teachers.items()} if routed else asked(teachers["a"])
    local = trained(tmp_path, teacher=given, ref_model=ref, **SGD, **options)
    assert_same(trained(tmp_path, teacher=served, ref_model=ref, **SGD, **options), local, 1e-6)
    assert_same(trained(tmp_path, teacher=served, ref_model=asked(ref), **SGD, **options), local, 1e-6)


def test_scorers_may_be_some_of_the_teachers(tmp_path: Path) -> None:
    def scorer(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.TokenLogProbs:
        assert input_ids.shape == attention_mask.shape
        return fg.TokenLogProbs(torch.full(completion_mask.shape, -2.0))

    data = prompts(domain=["a", "b"] * 4)
    teachers = {"a": model(1), "b": scorer}
    run = trainer(tmp_path, teacher=teachers, route_column="domain", data=data, estimator="sampled")
    batch = Batch.from_trl(run._prepare_inputs([data[i] for i in range(4)]))
    out = run._loss(run.model, batch)
    assert (out.teacher_logprobs[(batch.teacher_index == 1)[:, None] & (batch.mask != 0)] == -2).all()


def test_a_scorer_may_return_a_target_of_several_models(tmp_path: Path) -> None:
    """Also as one of the teachers, whose weights of its prompts are spread over the batch."""

    def scorer(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.LogLinear:
        scores = [fg.TokenLogProbs(torch.full(completion_mask.shape, -x)) for x in (2.0, 1.0, 4.0)]
        return fg.LogLinear(scores, [1.0, 1.0, torch.full(completion_mask.shape[:1], -0.5)])  # -2 - 1 + 2

    data = prompts(domain=["a", "b"] * 4)
    teachers = {"a": model(1), "b": scorer}
    run = trainer(tmp_path, teacher=teachers, route_column="domain", data=data, estimator="sampled")
    batch = Batch.from_trl(run._prepare_inputs([data[i] for i in range(4)]))
    out = run._loss(run.model, batch)
    assert (out.teacher_logprobs[(batch.teacher_index == 1)[:, None] & (batch.mask != 0)] == -1).all()
    trainer(tmp_path, teacher=scorer, estimator="sampled").train()


# ----------------------------------------------------------------------------------------------- lambda, steps, resume


def test_lambda_moves_linearly_over_the_steps_that_are_given(tmp_path: Path) -> None:
    options = {"reward_scale": 1.0, "reward_scale_end": 1.5, "reward_scale_steps": 2, "max_steps": 4}
    run = trainer(tmp_path, ref_model=model(2), **options)
    run.train()
    assert [log["gopd/reward_scale"] for log in run.state.log_history[:4]] == [1.0, 1.25, 1.5, 1.5]


def test_lambda_may_be_a_function_of_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, ref_model=model(2), reward_scale_fn=lambda step: 1.0 + step)
    run.train()
    assert [log["gopd/reward_scale"] for log in run.state.log_history[:2]] == [1.0, 2.0]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_lambda_may_be_a_function_of_the_token_statistics(tmp_path: Path, estimator: str) -> None:
    """The step's function gives another function, or a number; the mean over the tokens is logged."""
    seen: list[int] = []

    def of_tokens(stats: fg.TokenStats) -> torch.Tensor:
        seen.append(stats.index.shape[0])
        return 1 + stats.teacher_entropy.sigmoid()

    def of_step(step: int) -> Any:
        return of_tokens if step == 0 else 1.25

    run = trainer(tmp_path, ref_model=model(2), reward_scale_fn=of_step, estimator=estimator)
    run.train()
    first, second = (log["gopd/reward_scale"] for log in run.state.log_history[:2])
    assert seen
    assert 1.5 < first < 2
    assert second == 1.25


@pytest.mark.parametrize(
    "options",
    [
        {"reward_scale": 1.0, "reward_scale_end": 1.5, "save_steps": 2},
        {"reward_scale": 1.25, "save_steps": 3, "optim": "sgd"},
        {"estimator": "sampled", "num_iterations": 2, "clip": [0.2, 0.2], "save_steps": 2},
    ],
    ids=["lambda-between-epochs", "within-the-second-epoch", "iterations"],
)
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    """An epoch has two steps, or four where each batch of completions has two."""
    options = {"max_steps": 4, "save_strategy": "steps", **options}
    whole = trained(tmp_path, ref_model=model(2), **options)
    resumed = trainer(tmp_path, ref_model=model(2), student=model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{options['save_steps']}"))
    assert_same(weights(resumed), whole)


@pytest.mark.parametrize("kind", ["distillation", "grpo"])
def test_checkpoints_come_with_our_card_which_replaces_nobody_elses(tmp_path: Path, kind: str) -> None:
    def run(scale: float) -> None:
        options = {"save_strategy": "steps", "max_steps": 1, "ref_model": model(2), "reward_scale": scale}
        (grpo if kind == "grpo" else trainer)(tmp_path, **options).train()

    page = tmp_path / "README.md"
    run(1.25)
    text = page.read_text(encoding="utf-8")
    assert "None" not in text
    for line in (
        f"# {tmp_path.name}",
        "| base | Qwen3ForCausalLM |",
        "| teacher | Qwen3ForCausalLM |",
        "| reference | Qwen3ForCausalLM |",
        "| λ (reward scale) | 1.25 |",
        "| loss | sampled |" if kind == "grpo" else "| loss | full, reverse_kl |",
        "| optimizer steps | 1 |",
        f"| torch | {torch.__version__} |",
    ):
        assert f"{line}\n" in text
    assert "| gopd/reward | " in text
    run(1.5)
    assert "| λ (reward scale) | 1.5 |" in page.read_text()
    page.write_text("the user's")
    run(1.5)
    assert page.read_text() == "the user's"
    assert card.is_unchanged(text)
    assert not card.is_unchanged(text.replace("1.25", "2.5"))


def test_a_card_names_models_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = model(0)
    named.config._name_or_path = str(tmp_path)
    found = [card.name_of(x) for x in (named, str(tmp_path), "org/model", lengths, functools.partial(lengths))]
    assert found == [tmp_path.name, tmp_path.name, "org/model", "a scorer, lengths", "a scorer, partial"]
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert [card.name_of(x) for x in (".", "..")] == ["model", "run"]
    (tmp_path / "run" / "fused-gopd.json").write_text("{}")  # as fused-gopd distill does
    assert [card.name_of(x) for x in (".", str(tmp_path / "run" / "model"))] == ["run/model"] * 2
    assert [card.hub_name(x) for x in ("org/model", str(tmp_path), "gpt2", "", "a/b/c")] == ["org/model"] + [None] * 4


def test_prompts_come_in_trls_own_order(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    own, ours = DistillationTrainer._get_train_sampler(run), run._get_train_sampler()
    for epoch in (0, 1, 2):
        run.state.epoch = float(epoch)
        assert list(ours) == list(own)


def test_a_run_that_resumes_within_iterations_samples_for_new_prompts_when_they_come(tmp_path: Path) -> None:
    options: dict[str, Any] = {"estimator": "sampled", "num_iterations": 2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, **options)
    resumed = trainer(tmp_path, **{**options, "max_steps": 6, "save_strategy": "no"})
    asked: list[list[str]] = []
    generate = resumed._generate
    resumed._generate = lambda texts: (asked.append(texts), generate(texts))[1]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # step 3 is the second on its prompts, whose completions the checkpoint does not have; 4 and 5 share others
    assert len(asked) == 2
    assert sorted(asked[0]) != sorted(asked[1])


def test_iterations_share_completions_and_clip_their_ratios(tmp_path: Path) -> None:
    run = trainer(tmp_path, estimator="sampled", num_iterations=2, clip=[0.05, 0.05], max_steps=2)
    run.train()
    first, second = run.state.log_history[:2]
    assert "completions/mean_length" in first
    assert "completions/mean_length" not in second
    assert first["gopd/clip_fraction"] == 0 < second["gopd/clip_fraction"]
    assert first["gopd/advantage"] == pytest.approx(second["gopd/advantage"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ logging


def test_metrics_are_means_over_all_tokens_since_the_last_log(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, ref_model=model(2), estimator="sampled", reward_scale=1.25, max_completion_length=12, seed=3
    )
    run.train()
    log = run.state.log_history[0]
    assert log["completions/min_length"] < log["completions/max_length"]
    # on-policy the loss of a token is -A, and TRL's loss is the mean over the tokens of both batches
    assert log["loss"] == pytest.approx(-log["gopd/advantage"], rel=1e-5)


def test_callbacks_are_told_of_each_phase_and_of_the_tokens_in_it(tmp_path: Path) -> None:
    class Listener(TrainerCallback):
        told: ClassVar[list[tuple[str, int, int, int]]] = []

        def on_phase(self, args: Any, state: Any, control: Any, *, phase: Phase) -> None:
            self.told.append((phase.name, phase.done, phase.total, phase.tokens))

    options = {"max_completion_length": 12, "gradient_accumulation_steps": 2, "max_steps": 1, "seed": 3}
    run = trainer(tmp_path, callbacks=[Listener()], **options)
    run.train()
    told = Listener.told
    names = [name for i, (name, *_) in enumerate(told) if i == 0 or told[i - 1][0] != name]
    assert names == ["step", "sample", "step", "score", "step", "score", "step"]
    assert [done for name, done, *_ in told if name == "step"] == [0, 0, 0, 1, 1]
    sampled = [x for x in told if x[0] == "sample"]
    assert [x[1] for x in sampled] == list(range(len(sampled)))
    assert {x[2] for x in sampled} == {12}
    log = run.state.log_history[0]
    assert log["completions/min_length"] < log["completions/max_length"] == sampled[-1][1], "the test needs both"
    tokens = log["completions/mean_length"] * 4  # answers of two batches
    assert sampled[-1][3] == tokens  # counted one by one: what follows an end of sequence is not
    assert log["gopd/tokens_per_second"] == pytest.approx(tokens / log["step_time"])
    assert 0 < log["gopd/sample_seconds"] + log["gopd/score_seconds"] < log["step_time"]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_of_transformers_shows_the_phase_on_a_terminal_alone(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        shown: ClassVar[list[str]] = []

        def set_postfix_str(self, text: str) -> None:
            self.shown.append(text)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    run = trainer(tmp_path, disable_tqdm=False)
    run.remove_callback(next(x for x in run.callback_handler.callbacks if isinstance(x, ProgressCallback)))
    listening = [x for x in run.callback_handler.callbacks if hasattr(x, "on_phase")]
    assert len(listening) == terminal
    for shown in listening:
        shown._progress = SimpleNamespace(training_bar=Bar())
        run.train()
        assert Bar.shown
        shown._drawn = 0
        shown.on_phase(None, None, None, phase=Phase("sample", "", 117, 256, 140.4))
        assert Bar.shown[-1] == "sample 117/256, 140 tokens/s"


class DeviceMark:
    """``torch.Event`` of a device that needs a second from one mark to the next, and is never done when it is asked."""

    made = 0

    def __init__(self, _: torch.device) -> None:
        DeviceMark.made += 1
        self.time, self.waited = DeviceMark.made, False

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: DeviceMark) -> float:
        assert end.waited
        return 1000.0 * (end.time - self.time)


def test_phases_on_a_device_are_timed_by_its_own_clock_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "_marks_on", lambda device: [DeviceMark(device)])
    monkeypatch.setattr(Phase, "seconds", property(lambda _: 1e6))  # the host's clock is not read
    monkeypatch.setattr(torch.accelerator, "synchronize", None)
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=prompts())
    run.train()
    log, evaluation, after = run.state.log_history[:3]
    assert "eval_loss" in evaluation
    for row in (log, after):  # what the evaluation in between has sampled and scored is not of a step
        assert row["gopd/sample_seconds"] == 1
        assert row["gopd/score_seconds"] == 2  # of both batches


def test_a_log_over_steps_with_and_without_the_reference_has_the_metrics_of_both(tmp_path: Path) -> None:
    run = trainer(tmp_path, ref_model=model(2), reward_scale=1.0, reward_scale_end=1.5, logging_steps=2)
    run.train()
    assert {"gopd/reward", "gopd/kl_ref_k3", "gopd/kl_teacher", "gopd/kl_target"} <= run.state.log_history[0].keys()


def test_evaluation_has_the_same_metrics(tmp_path: Path) -> None:
    run = trainer(tmp_path, ref_model=model(2), reward_scale=1.25, per_device_eval_batch_size=4)
    logged = run.evaluate(prompts())
    assert logged["eval_loss"] > 0
    assert {"eval_gopd/reward", "eval_gopd/kl_target"} <= run.state.log_history[-1].keys()
    assert all(x.grad is None for x in run.model.parameters())


@pytest.mark.parametrize("name", ["model", "teacher", "ref_model"])
def test_a_model_that_is_not_there_is_an_error_at_once(tmp_path: Path, name: str) -> None:
    models = {"student": model(0), "teacher": model(1), "ref_model": model(2)}
    models["student" if name == "model" else name] = "runs/missing"
    with pytest.raises(ValueError, match=rf"{name} must be a model: there is no folder runs/missing, and the"):
        trainer(tmp_path, reward_scale=1.25, **models)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_hooks_on_a_head_are_errors_before_the_first_step(tmp_path: Path, whose: str) -> None:
    models = {"student": model(0), "teacher": model(1)}
    models[whose].lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(TypeError, match=r"the head has a forward hook, \S*<lambda> on Linear"):
        trainer(tmp_path, **models)


def test_mixed_precision_multiplies_in_the_dtype_of_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def loss(student: Any, teacher: Any, *args: Any, **options: Any) -> Any:
        if isinstance(student, fg.LinearHead):
            seen.extend((student.hidden.dtype, teacher.hidden.dtype))
        return fg.gopd_loss(student, teacher, *args, **options)

    monkeypatch.setattr(trl_models, "gopd_loss", loss)
    run = trainer(tmp_path, bf16=True, max_steps=1)
    run.train()
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert {x.dtype for x in run.model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------- scores are those of the sampler


def learned(seed: int, dropout: float = 0.0) -> Any:
    """GPT-2: positions that are learned, and dropout."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    made = GPT2LMHeadModel(GPT2Config(**ids, **sizes, **drop, initializer_range=0.2))
    made.generation_config.eos_token_id = list(range(0, VOCAB, 6))
    return made


def lora_student() -> Any:
    config = peft.LoraConfig(**LORA, lora_dropout=0.5, init_lora_weights=False)
    return peft.get_peft_model(model(0), config)


@pytest.mark.parametrize("student", [lambda: learned(0, 0.1), lora_student])
def test_an_unchanged_policy_has_the_ratio_1_whatever_its_dropout(tmp_path: Path, student: Callable[[], Any]) -> None:
    run = trainer(
        tmp_path,
        student=student(),
        estimator="sampled",
        num_iterations=2,
        clip=[1e-4, 1e-4],
        max_steps=2,
        learning_rate=0.0,
        gradient_checkpointing=True,
    )
    run.train()
    logs = run.state.log_history[:2]
    assert [log["gopd/clip_fraction"] for log in logs] == [0, 0]
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-5) != 0


def test_a_teacher_in_training_mode_is_evaluated_and_put_back(tmp_path: Path) -> None:
    teacher = learned(1, 0.3).train()
    teacher.transformer.h[0].eval()
    modes = [m.training for m in teacher.modules()]
    run = trainer(tmp_path, student=learned(0), teacher=teacher, max_steps=1, **SGD)
    run.train()
    assert [m.training for m in teacher.modules()] == modes
    still = trained(tmp_path, student=learned(0), teacher=learned(1).eval(), max_steps=1, **SGD)
    assert_same(weights(run), still)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_padded_prompt_is_sampled_and_scored_at_the_positions_of_an_unpadded_one(
    tmp_path: Path, estimator: str
) -> None:
    run = trainer(tmp_path, student=learned(0), teacher=learned(1), ref_model=learned(2), reward_scale=1.25,
                  estimator=estimator, num_iterations=2, generation_kwargs={"do_sample": False})  # fmt: skip
    batch = Batch.from_trl(run._generate_and_score_completions([{"prompt": text} for text in PROMPTS[:3]]))
    out = run._loss(run.model, batch)
    models = (run.model, run._teachers[0].model, run._reference.model)
    scores = (out.student_logprobs, out.teacher_logprobs, out.ref_logprobs)
    assert (batch.attention_mask[:, 0] == 0).any()
    keep = batch.token_ids.shape[1]
    for i, mask in enumerate(batch.attention_mask.bool()):
        ids, live = batch.input_ids[i][mask][None], batch.mask[i].bool()
        for one, found in zip(models, scores, strict=True):
            with torch.no_grad():
                logits = one(input_ids=ids).logits[0, :-1]
            if one is run.model:  # greedy: what the student would say next, without padding
                assert torch.equal(logits.argmax(-1)[-int(live.sum()) :], batch.token_ids[i][live])
            want = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-int(live.sum()) :, 0]
            torch.testing.assert_close(found[i][live], want, rtol=1e-4, atol=1e-4)
            if one is run.model and batch.old_logprobs is not None:
                torch.testing.assert_close(batch.old_logprobs[i][live], want, rtol=1e-4, atol=1e-4)
    assert keep == out.student_logprobs.shape[1]


# --------------------------------------------------------------------------------------------------------------- GRPO


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def grpo(folder: Path, **arguments: Any) -> Any:
    plain = {"num_generations": 2, "beta": 0.0, "kind": GRPOGOPDConfig, "max_completion_length": 6}
    names = ("ref_model", "teacher", "reward_funcs", "peft_config")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    return GRPOGOPDTrainer(
        model(0),
        args=config(folder, **{**plain, **arguments}),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        **{"reward_funcs": lengths, "teacher": model(1, hidden=48), "ref_model": model(2), **own},
    )


def by_hand(run: Any, output: dict[str, Tensor], scale: float) -> Tensor:
    """lambda (log q - log r) - (log p - log r), from whole logits."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    keep = output["completion_ids"].shape[1]

    def logprobs(of: Any) -> Tensor:
        with torch.no_grad():
            logits = of(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        return (logits / run.temperature).log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]

    p, q, r = logprobs(run.model), logprobs(run._teachers[0].model), logprobs(run._reference.model)
    return (scale * (q - r) - (p - r)) * output["completion_mask"]


def test_grpo_adds_the_advantage_of_each_token_to_that_of_the_rewards(tmp_path: Path) -> None:
    run = grpo(tmp_path, reward_scale=1.25, gopd_weight=0.5, outcome_weight=2.0, temperature=0.8)
    inputs = [{"prompt": text} for text in PROMPTS[:2] for _ in range(2)]
    set_seed(0)
    output = run._generate_and_score_completions(copy.deepcopy(inputs))
    set_seed(0)
    plain = GRPOTrainer._generate_and_score_completions(run, copy.deepcopy(inputs))
    assert torch.equal(output["completion_ids"], plain["completion_ids"])
    expected = 2 * plain["advantages"][:, None] + 0.5 * by_hand(run, output, 1.25)
    live = output["completion_mask"] != 0
    torch.testing.assert_close(output["advantages"][live], expected[live], rtol=1e-4, atol=1e-4)


def test_grpo_in_place_of_rewards_learns_what_the_sampled_trainer_learns(tmp_path: Path) -> None:
    """One on-policy step: PPO's surrogate at ratio 1 has the gradient of -A log p."""
    shared: dict[str, Any] = {**SGD, "max_steps": 1, "reward_scale": 1.25, "shuffle_dataset": False}
    shared |= {"generation_kwargs": {"do_sample": False}}
    run = grpo(tmp_path, outcome_weight=0.0, reward_funcs=None, loss_type="dapo", **shared)
    run.train()
    data = datasets.Dataset.from_dict({"prompt": [text for text in PROMPTS for _ in range(2)]})
    distilled = trained(tmp_path, ref_model=model(2), data=data, estimator="sampled", **shared)
    assert_same(weights(run), distilled, 1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "sapo", "cispo", "vespo"])
def test_grpo_gives_each_token_its_own_advantage(tmp_path: Path, loss_type: str) -> None:
    """At ratio 1 a token's log-prob has a derivative of -A, to a factor of its sequence, or the options are refused."""
    for level in ("token", "sequence"):
        options = {"loss_type": loss_type, "importance_sampling_level": level, "num_generations": 2}
        if level == "sequence" and loss_type not in ("cispo", "vespo"):
            with pytest.raises(ValueError, match=r"importance_sampling_level must be 'token' .*mean of the sequence's"):
                config(tmp_path, GRPOGOPDConfig, **options)
            config(tmp_path, GRPOGOPDConfig, gopd_weight=0.0, **options)
            continue
        run = grpo(tmp_path, reward_scale=1.25, **options)
        run.current_gradient_accumulation_steps = 1
        logps = (-torch.rand(2, 4) - 0.1).requires_grad_()
        run._get_per_token_logps_and_entropies = lambda *_, x=logps, **__: (x, torch.zeros(2, 4), None)
        advantages = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 0.25, 2.0, -0.5]])
        ids, ones = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
        batch = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones,
                 "advantages": advantages, "num_items_in_batch": torch.tensor(8)}  # fmt: skip
        (gradient,) = torch.autograd.grad(run._compute_loss(run.model, batch), logps)
        assert_close = torch.testing.assert_close
        assert_close(gradient / gradient[:, :1], advantages / advantages[:, :1], rtol=1e-5, atol=0)
        assert (gradient * advantages < 0).all()


def test_grpo_scores_as_it_samples(tmp_path: Path) -> None:
    """Dropout, and positions that are learned, in three equal models: no advantage, and a ratio of 1."""
    same = learned(0, 0.2)
    run = GRPOGOPDTrainer(
        same,
        args=config(tmp_path, GRPOGOPDConfig, num_generations=2, reward_scale=1.25, num_iterations=2, max_steps=2,
                    outcome_weight=0.0, learning_rate=0.0, epsilon=1e-4),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        teacher=copy.deepcopy(same),
        ref_model=copy.deepcopy(same),
    )  # fmt: skip
    run.train()
    assert all(m.training for m in run.model.modules())
    logs = run.state.log_history[:2]
    assert logs[0]["gopd/advantage_std"] == pytest.approx(0, abs=1e-5)
    assert [log["clip_ratio/region_mean"] for log in logs] == [0, 0]
    output = run._generate_and_score_completions([{"prompt": text} for text in PROMPTS[:2] for _ in range(2)])
    batch = Batch.from_trl(output)
    with torch.no_grad():
        ours = run._loss(run.model, batch).student_logprobs
    live = batch.mask.bool()
    torch.testing.assert_close(output["old_per_token_logps"][live], ours[live], rtol=1e-4, atol=1e-4)


def test_grpo_scores_with_a_head_that_trl_has_cast_to_float32(tmp_path: Path) -> None:
    """TRL puts another forward in the place of the head's: the same product in float32."""
    run = grpo(tmp_path, reward_scale=1.25, max_steps=1, cast_lm_head_to_fp32=True)
    head = run.model.lm_head
    forward = head.forward
    hidden = torch.randn(2, 3, head.in_features)
    scored = run._frozen_head(run.model, hidden, ExitStack())
    assert scored.hidden.dtype == scored.weight.dtype == torch.float32
    assert torch.allclose(scored.hidden @ scored.weight.T, forward(hidden), atol=1e-6)
    run.train()
    assert head.forward is forward


def test_grpo_has_routes_and_logs_the_implicit_reward(tmp_path: Path) -> None:
    data = prompts(domain=["a", "b"] * 4)
    run = GRPOGOPDTrainer(
        model(0),
        lengths,
        config(tmp_path, GRPOGOPDConfig, num_generations=2, reward_scale=1.25, route_column="domain"),
        train_dataset=data,
        processing_class=tokenizer(),
        teacher={"a": model(1), "b": model(3, hidden=48)},
        ref_model=model(2),
    )
    run.train()
    assert {"gopd/reward", "gopd/advantage", "reward", "gopd/reward_scale"} <= run.state.log_history[0].keys()


# ------------------------------------------------------------------------------------- the loss of TRL's own trainer


def own_trainer(folder: Path, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        model(0),
        model(1, hidden=48),
        args=config(folder, DistillationConfig, **SGD, **options),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_patched_trainer_ends_in_the_weights_and_logs_of_trls_loss(tmp_path: Path, beta: float) -> None:
    options: dict[str, Any] = {"beta": beta, "temperature": 0.8, "max_completion_length": 12}
    plain = own_trainer(tmp_path, **options)
    plain.train()
    patched = own_trainer(tmp_path, **options)
    with patch_distillation_loss(patched):
        patched.train()
    assert_same(weights(patched), weights(plain), 1e-5)
    for ours, theirs in zip(patched.state.log_history[:2], plain.state.log_history[:2], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_patched_function_has_the_values_of_trls(beta: float, dtype: torch.dtype) -> None:
    """With bias, scales, softcaps and masked tokens, as TRL's own tests of its function have them."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    torch.manual_seed(0)
    hidden = [torch.randn(2, 6, h).to(dtype) for h in (8, 12)]
    weight = [torch.randn(17, h).to(dtype) for h in (8, 12)]
    bias = [torch.randn(17) for _ in range(2)]
    mask = (torch.rand(2, 6) > 0.3).int()
    results = []
    for function in (theirs, fused_divergence_loss):
        leaves = [x.clone().requires_grad_() for x in (hidden[0], weight[0], bias[0])]
        loss, entropy, count = function(
            leaves[0],
            hidden[1],
            leaves[1],
            weight[1],
            mask,
            beta,
            num_items_in_batch=torch.tensor(5.0),
            student_lm_head_bias=leaves[2],
            teacher_lm_head_bias=bias[1],
            student_logit_scale=0.7,
            teacher_logit_scale=1.3,
            student_final_logit_softcapping=5.0,
            teacher_final_logit_softcapping=3.0,
            temperature=0.8,
        )
        results.append([loss, entropy, count, *torch.autograd.grad(loss, leaves)])
    # the gradients of low precision are rounded once to it by both
    tolerance = {"rtol": 1.6e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours.detach(), expected.detach(), **tolerance)


def test_a_batch_without_a_live_token_keeps_its_graph() -> None:
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    mask = torch.zeros(2, 3)
    loss, _, count = fused_divergence_loss(hidden, torch.randn(2, 3, 8), weight, torch.randn(17, 8), mask, 0.5)
    loss.backward()
    assert loss == 0
    assert count == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_patch_reaches_its_trainer_alone_and_is_undone(tmp_path: Path) -> None:
    import trl.trainer.distillation_trainer as module

    theirs, function = module._chunked_divergence_loss, DistillationTrainer._compute_loss
    patched, other = own_trainer(tmp_path), own_trainer(tmp_path)
    patch = patch_distillation_loss(patched)
    assert module._chunked_divergence_loss is theirs
    assert patched._compute_loss.__globals__["_chunked_divergence_loss"] is not theirs
    assert other._compute_loss.__func__ is function
    patch.undo()
    patch.undo()
    assert patched._compute_loss.__func__ is function


def test_a_class_is_patched_for_all_its_trainers_and_undone(tmp_path: Path) -> None:
    function = DistillationTrainer._compute_loss
    with patch_distillation_loss(DistillationTrainer):
        assert own_trainer(tmp_path)._compute_loss.__func__ is not function
    assert DistillationTrainer._compute_loss is function


def test_what_cannot_be_patched_says_why(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="DistillationTrainer"):
        patch_distillation_loss(torch.nn.Linear)
    with pytest.raises(ValueError, match="GOPDTrainer has a loss of its own"):
        patch_distillation_loss(GOPDTrainer)
    with (
        patch_distillation_loss(DistillationTrainer),
        pytest.raises(ValueError, match=r"patched already: undo\(\)"),
    ):
        patch_distillation_loss(DistillationTrainer)
    run = own_trainer(tmp_path)
    run.teacher_model = copy.copy(run.model)
    with pytest.raises(ValueError, match="teacher_model is the student itself, which changes"):
        patch_distillation_loss(run)


# -------------------------------------------------------------------------------------------------------- wrong use


def test_options_are_read_from_the_command_line() -> None:
    line = ["--output_dir", "x", "--reward_scale", "1.25", "--clip", "0.2", "0.28", "--num_iterations", "2"]
    line += ["--estimator", "sampled", "--use_cpu", "--bf16", "False"]
    (args,) = HfArgumentParser(GOPDConfig).parse_args_into_dataclasses(line)
    assert (args.reward_scale, args.clip, args.estimator) == (1.25, [0.2, 0.28], "sampled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "estimator must be one of 'sampled', 'full', 'topk', got 'exact'"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "forward_kl", "beta": 1.0}, "divergence='forward_kl' and beta=1.0 disagree"),
        ({"divergence": "alpha", "beta": 0.5}, "beta is for divergence='reverse_kl' or 'forward_kl' or 'jsd', got"),
        ({"divergence": "alpha", "skew": 0.5}, "skew is an option of divergence='skew_kl' or 'skew_reverse_kl'"),
        ({"divergence": "mixed", "forward_weight": 2.0}, "forward_weight must satisfy 0 <= forward_weight <= 1"),
        ({"estimator": "sampled", "k": 8}, "k is an option of estimator='topk', got estimator='sampled'"),
        ({"reduction": "sum"}, "reduction must be one of"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"reward_scale_steps": 3}, "reward_scale_steps needs reward_scale_end"),
        ({"reward_scale": float("nan")}, "reward_scale must be finite"),
        ({"estimator": "sampled", "clip": [0.2, 0.2]}, "clip needs num_iterations of at least 2"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"chunk_dtype": "bf16"}, "chunk_dtype must be one of 'bfloat16', 'float16', got 'bf16'"),
        ({"chunk_dtype": "float16", "bf16": True}, "chunk_dtype='float16' needs models that compute in that dtype"),
    ],
)
def test_a_configuration_that_cannot_be_says_what_is_wrong(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


class Served:
    """A scorer that says its temperature and how many tokens it lists, as ServerTeacher does."""

    temperature = 1.0

    def __init__(self, top_k: int | None = None) -> None:
        self.top_k = top_k

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.TokenLogProbs:
        raise AssertionError("nothing was sampled yet")


@pytest.mark.parametrize("known", [False, True])
def test_a_scorer_whose_tokenizer_is_not_known_is_warned_of(
    tmp_path: Path, known: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Served, "tokenizer", tokenizer() if known else None, raising=False)
    with caplog.at_level("WARNING"):
        trainer(tmp_path, teacher=Served(), estimator="sampled")
    assert ("nothing shows that its ids are the student's" in caplog.text) is not known


class Asked(Served):
    """A scorer that takes tokens to score, as ServerTeacher does."""

    def __call__(self, *_: Tensor) -> fg.TokenLogProbs:
        raise AssertionError("nothing was sampled yet")

    def require_requested_ids(self, k: int) -> None:
        if self.top_k is not None:
            raise ValueError(f"make the teacher without top_k, got {k}")


STUDENTS = {"estimator": "topk", "k": 8, "support": "student"}


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the student was loaded before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_scale": 1.25}, "ref_model must be given for reward_scale=1.25"),
        ({"reward_scale_end": 1.5}, "ref_model must be given for reward_scale=1.0 to reward_scale_end=1.5"),
        ({"reward_scale_fn": lambda step: 1.0}, "ref_model must be given for a reward_scale_fn"),
        ({"kl_ref": "exact"}, "ref_model must be given for kl_ref='exact'"),
        ({"kl_ref": "k3", "estimator": "sampled"}, "ref_model must be given for kl_ref='k3'"),
        ({"teacher": None}, "teacher must be given"),
        ({"teacher": 3}, "teacher must be a model, its path, or a scorer, got int"),
        ({"teacher": {"a": "x"}}, "needs route_column"),
        ({"route_column": "domain"}, "needs a dict of teachers"),
        ({"teacher": {"a": "x"}, "route_column": "domain"}, r"train_dataset has no column 'domain'"),
        ({"estimator": "topk"}, "k must be given for estimator='topk'"),
        ({"baseline": "expected"}, "baseline is an option of estimator='sampled'"),
        ({"teacher": lambda *_: None}, "teacher is TokenLogProbs, which estimator='sampled' alone can use"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"estimator": "sampled", "num_iterations": 2, "clip": 0.2}, "clip must be a pair .*got 0.2"),
        ({"reward_scale_fn": lambda step: 1.0, "ref_model": "r", "reward_scale": 1.25}, "reward_scale_fn .*1.25"),
        ({"reward_scale_fn": lambda step: 1.0, "ref_model": "r", "reward_scale_end": 1.5}, "reward_scale_fn .*1.5"),
        ({"chunk_dtype": "bfloat16"}, "chunk_dtype=torch.bfloat16 is for bfloat16 and float16 heads on a CUDA GPU"),
        ({"teacher": lambda *_: None, "teacher_model_init_kwargs": {"dtype": "auto"}}, "no teacher is a model's path"),
        ({"teacher": Served(), "estimator": "sampled", "temperature": 0.6}, "teacher returns log-probs of temperature"),
        ({"ref_model": Served(), "reward_scale": 1.25, "temperature": 0.6}, "ref_model returns log-probs of"),
        ({"teacher": Served(8), "estimator": "topk", "k": 16}, r"TopKLogProbs have their own K=\[8\], got k=16"),
        ({"teacher": Served(), "estimator": "topk"}, "teacher is TokenLogProbs, which estimator='sampled' alone"),
        ({"teacher": Served(8), "estimator": "sampled"}, "teacher is TopKLogProbs"),
        ({"teacher": Served(8), **STUDENTS}, "support='student' needs a Linear"),
        ({"teacher": Asked(8), **STUDENTS}, "teacher: make the teacher without"),
        ({"teacher": Asked(), "estimator": "topk", "support": "student"}, "k must be given for support='student'"),
        (
            {"teacher": {**dict.fromkeys(PROMPTS, "x"), "a": Asked()}, "route_column": "prompt", **STUDENTS},
            r"support='student' has teacher\['a'\] score the student's tokens elsewhere, and teacher\['[^']*'\] here",
        ),
        (
            {"ref_model": Served(8), "reward_scale": 1.25, "estimator": "topk", "k": 8},
            "ref is TopKLogProbs, which goes with a teacher that is TopKLogProbs too",
        ),
        ({"ref_model": Served(), "reward_scale": 1.25}, "ref is TokenLogProbs, which estimator='sampled' alone"),
        ({"estimator": "topk", "k": "8"}, "k must be an int"),
    ],
)
def test_wrong_arguments_are_named_before_the_student_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("trl.trainer.distillation_trainer.create_model_from_path", never)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, student="a-path", **{"teacher": "another", **arguments})


def test_a_route_without_a_teacher_is_named_before_training(tmp_path: Path) -> None:
    data = prompts(domain=["math", "code"] * 4)
    with pytest.raises(ValueError, match=r"no teacher for the route 'code', which is in column 'domain' of train"):
        trainer(tmp_path, teacher={"math": model(1)}, route_column="domain", data=data)


def test_a_streamed_route_without_a_teacher_is_named_when_it_comes(tmp_path: Path) -> None:
    data = prompts(domain=["code"] * 8).to_iterable_dataset()
    run = trainer(tmp_path, teacher={"math": model(1)}, route_column="domain", data=data)
    with pytest.raises(ValueError, match="no teacher for the route 'code'"):
        run.train()


def test_a_tokenizer_that_says_other_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizers of the student and of teacher differ at \d+ ids"):
        trainer(tmp_path, teacher_processing_class=tokenizer("zebras zigzag zestfully in the zoo zone"))


def test_a_tokenizer_for_a_route_that_no_teacher_has_is_named(tmp_path: Path) -> None:
    arguments = {"teacher": {"math": model(1)}, "route_column": "domain", "data": prompts(domain=["math"] * 8)}
    with pytest.raises(ValueError, match="no teacher for the route 'maths', which is in teacher_processing_class"):
        trainer(tmp_path, teacher_processing_class={"maths": tokenizer()}, **arguments)


def test_a_tokenizer_beside_a_teacher_is_found_and_compared(tmp_path: Path) -> None:
    model(1).save_pretrained(tmp_path / "teacher")
    tokenizer("zebras zigzag zestfully in the zoo zone").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="the tokenizers of the student and of teacher differ"):
        trainer(tmp_path, teacher=str(tmp_path / "teacher"))
    tokenizer().save_pretrained(tmp_path / "teacher")
    trainer(tmp_path, teacher=str(tmp_path / "teacher"))
    for content in (b"{}", b"\xff", b"{"):
        (tmp_path / "teacher" / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"the tokenizer in .*teacher cannot be loaded"):
            trainer(tmp_path, teacher=str(tmp_path / "teacher"))


def test_a_teacher_that_lacks_tokens_of_the_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher has 200 tokens, and the student's tokenizer goes up to id 279"):
        trainer(tmp_path, teacher=model(1, vocab=200))
    check_vocabulary("teacher", 200, 200, tokenizer())  # which the student cannot say either
    with pytest.raises(ValueError, match=r"teacher has 199 tokens, and the student's tokenizer goes up to id 199"):
        check_vocabulary("teacher", 199, 200, tokenizer())


@pytest.mark.parametrize("make", [trainer, grpo])
def test_sequences_beyond_the_positions_of_a_model_are_refused(tmp_path: Path, make: Any) -> None:
    teacher = model(1)
    teacher.config.max_position_embeddings = 6
    run = make(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match=r"a prompt and its completion have \d+ tokens, and teacher has 6 positions"):
        run.train()


def test_scaled_rotary_embeddings_reach_beyond_the_original_positions() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for rope, positions, want in ((None, 40, 40), (yarn, 32, 128), (yarn, 128, 128), (yarn, 200, 200)):
        assert positions_of(Qwen3Config(max_position_embeddings=positions, rope_parameters=rope)) == want


def test_a_teacher_whose_weights_are_not_all_there_is_refused(tmp_path: Path) -> None:
    """from_pretrained makes the others up."""
    model(1).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"k_norm", b"a_norm"))
    for which in ({"teacher": str(path.parent)}, {"ref_model": str(path.parent), "reward_scale": 1.25}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(which))} \(.*\) lacks 2 of its weights, such as model.layers.0"
        ):
            trainer(tmp_path, **which)


LORA = {"r": 2, "target_modules": ["q_proj"]}


def with_layer_of(student: Any) -> Any:
    other = model(3)
    other.model.layers[0] = student.model.layers[0]
    return other


@pytest.mark.parametrize(("kind", "role"), [(GOPDTrainer, "ref_model"), (GRPOGOPDTrainer, "teacher")])
@pytest.mark.parametrize(
    ("of", "adapters"),
    [
        (lambda student: student, None),
        (lambda student: student, "peft_config"),
        (copy.copy, None),
        (copy.copy, "peft_config"),
        (lambda student: student.get_base_model(), "model"),
        (lambda student: peft.PeftModel(student.get_base_model(), peft.LoraConfig(**LORA), "second"), "model"),
        (with_layer_of, None),
        (with_layer_of, "peft_config"),
    ],
)
def test_the_student_under_another_name_is_refused(
    tmp_path: Path, kind: Any, role: str, of: Callable[[Any], Any], adapters: str | None
) -> None:
    student = model(0)
    if adapters == "model":
        student = peft.get_peft_model(student, peft.LoraConfig(**LORA))
    sources = {"teacher": model(1), "ref_model": model(2), role: of(student)}
    if adapters == "peft_config":
        sources["peft_config"] = peft.LoraConfig(**LORA)
    own = {"reward_funcs": lengths} if kind is GRPOGOPDTrainer else {}
    args = config(tmp_path, GOPDConfig, reward_scale=1.25)
    if kind is GRPOGOPDTrainer:
        args = config(tmp_path, GRPOGOPDConfig, reward_scale=1.25, num_generations=2)
    with pytest.raises(ValueError, match=f"{role} is the student itself, which changes: pass a copy"):
        kind(student, args=args, train_dataset=prompts(), processing_class=tokenizer(), **own, **sources)


def test_what_does_not_change_may_be_shared(tmp_path: Path) -> None:
    student, teacher, ref = model(0), model(1), model(2)
    teacher.model.embed_tokens.weight = ref.model.embed_tokens.weight = student.model.embed_tokens.weight
    adapter = peft.LoraConfig(**LORA)  # freezes them
    trainer(tmp_path, student=student, teacher=teacher, ref_model=ref, reward_scale=1.25, peft_config=adapter)
    student, ref = model(0), model(2)
    for name, parameter in student.named_parameters():  # the same weights in modules of its own, which have no adapter
        ref.get_submodule(name.rpartition(".")[0]).weight = parameter
    trainer(tmp_path, student=student, ref_model=ref, reward_scale=1.25, peft_config=adapter)
    teacher.model.embed_tokens.weight.requires_grad_(True)
    other = model(0)
    other.model.embed_tokens.weight = teacher.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"teacher is the student itself.*the parameter model\.embed_tokens\.weight"):
        trainer(tmp_path, student=other, teacher=teacher)


def test_the_base_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='ref_model="base" is the student without its PEFT adapter'):
        trainer(tmp_path, ref_model="base", reward_scale=1.25)


def test_trls_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be a GOPDConfig"):
        GOPDTrainer(model(0), model(1), config(tmp_path, DistillationConfig), prompts(), processing_class=tokenizer())
    with pytest.raises(TypeError, match="teacher_model: it is called teacher"):
        GOPDTrainer(model(0), teacher_model=model(1), args=config(tmp_path), processing_class=tokenizer())


def test_empty_completions_are_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.use_vllm, run._last_loaded_step = True, 0
    ids, logprobs = [[5, 6], [], [7], []], [[[-1.0], [-1.0]], [], [[-1.0]], []]
    run.vllm_generation = SimpleNamespace(generate=lambda **_: (None, ids, logprobs, None))
    with pytest.raises(ValueError, match=r"completions \[1, 3\] of 4 are empty"):
        run._generate([*PROMPTS[:4]])


def test_a_scorer_that_returns_something_else_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=lambda *_: torch.zeros(2, 6), estimator="sampled")
    with pytest.raises(TypeError, match=r"the scorer teacher must return fused_gopd.TokenLogProbs.* got Tensor"):
        run.train()
