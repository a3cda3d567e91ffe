"""The paper's settings in ``benchmarks/reproduction/scale`` and their page, as far as they go without weights and GPUs.

``python tests/helpers/write_pages.py`` writes the planner's figures into ``docs/paper-settings.md``.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_gopd as fg
import snapshots
from fused_gopd.cli.distill import options as distill
from fused_gopd.cli.plan.presets import PRESETS
from test_planning import _FENCE, gib, planned, with_outputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SCALE = ROOT / "benchmarks" / "reproduction" / "scale"
PAGE = ROOT / "docs" / "paper-settings.md"


def imported(name: str) -> Any:
    """A file of the folder, which is on the path only for this: it has folders called trl and verl."""
    sys.path.insert(0, str(SCALE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCALE))


SETTINGS = ("same-size", "multi-teacher", "strong-to-weak")
PLACES = 8  # processes of trl/accelerate.yaml
EVERY_SETTING = pytest.mark.parametrize("name", SETTINGS)

# Published sizes, as THUDM/slime has them in scripts/models/*.sh (commit 624b824b, 2026-08-21).
_QWEN3 = {"vocab_size": 151936, "head_dim": 128}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        **_QWEN3,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
}


def family(model: str) -> str:
    """The published sizes of a model that a setting names."""
    (found,) = [name for name in PUBLISHED if f"/{name}-" in f"{model.lower()}-"]
    return found


def teachers_of(setting: Any) -> dict[str, str]:
    """The teachers by route; one teacher has the route ""."""
    return setting.teachers if isinstance(setting.teachers, dict) else {"": setting.teachers}


def first_teacher(setting: Any) -> str:
    """All teachers of a setting are of one size."""
    teachers = list(teachers_of(setting).values())
    assert len(set(map(family, teachers))) == 1
    return teachers[0]


@functools.cache
def full_size(preset: str) -> Any:
    """A model of the published size, without its numbers."""
    config = (transformers.Qwen3MoeConfig if "num_experts" in PUBLISHED[preset] else transformers.Qwen3Config)(
        **PUBLISHED[preset]
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


# ----------------------------------------------------------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/reproduction/scale/train_trl.py"""
    pytest.importorskip("trl", minversion="1.16")
    pytest.importorskip("datasets")
    return imported("train_trl")


def parsed(script: Any, name: str, *options: str) -> tuple[Any, Any]:
    """A setting and its GOPDConfig. The file asks for bfloat16, which TRL refuses without a GPU unless told."""
    return script.parse(["--config", str(SCALE / "trl" / f"{name}.yaml"), "--use_cpu", "true", *options])


@EVERY_SETTING
def test_the_trl_file_has_the_papers_hyperparameters(script: Any, name: str) -> None:
    setting, args = parsed(script, name)
    assert (args.reward_scale, args.estimator, args.divergence) == (1.25, "sampled", "reverse_kl")
    assert args.reduction == "seq-mean-token-mean"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * PLACES == 1024
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-5, "constant", 0)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.01, 0.9, 0.999, 1.0)
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)
    assert (setting.max_prompt_length, args.max_completion_length, args.seed) == (2048, 16384, 42)
    assert args.vllm_max_model_length == setting.max_prompt_length + args.max_completion_length
    assert args.chat_template_kwargs == {"enable_thinking": False}
    assert args.max_steps == (100 if name == "strong-to-weak" else 50)


@EVERY_SETTING
def test_the_reference_is_the_student_before_training(script: Any, name: str) -> None:
    setting, _ = parsed(script, name)
    assert setting.ref_model == setting.model


def test_two_teachers_have_the_routes_of_the_published_data(script: Any) -> None:
    setting, args = parsed(script, "multi-teacher")
    assert set(setting.teachers) == {"math", "code"}
    assert args.route_column == imported("prepare").ROUTE


def test_several_teachers_without_routes_are_refused(script: Any) -> None:
    setting, _ = parsed(script, "same-size", "--teacher", "math=a", "b")
    with pytest.raises(ValueError, match="several teachers need a route each"):
        _ = setting.teachers


def test_a_misspelt_option_in_a_file_is_refused(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text((SCALE / "trl" / "same-size.yaml").read_text() + "reward_scal: 1.5\n")
    with pytest.raises(ValueError, match="reward_scal"):
        script.parse(["--config", str(file), "--use_cpu", "true"])


def test_accelerate_takes_its_file() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(SCALE / "trl" / "accelerate.yaml"))
    assert (config.num_processes, config.deepspeed_config["zero_stage"], config.mixed_precision) == (PLACES, 3, "bf16")


@EVERY_SETTING
def test_sizes_are_the_published_ones_and_fit_together(script: Any, name: str) -> None:
    """The loss of a few tokens with heads of full size, on the meta device: shapes of weights and gradients."""
    setting, args = parsed(script, name)
    shape = (1, 16)

    def head(preset: str) -> fg.LinearHead:
        weight = full_size(preset).get_output_embeddings().weight
        assert tuple(weight.shape) == (PRESETS[preset].vocab, PRESETS[preset].hidden)
        assert PRESETS[preset].tied == PUBLISHED[preset]["tie_word_embeddings"]
        return fg.LinearHead(torch.empty(*shape, weight.shape[1], device="meta", requires_grad=True), weight)

    student = head(family(setting.model))
    out = fg.gopd_loss(
        student,
        head(family(first_teacher(setting))),
        head(family(setting.ref_model)),
        torch.zeros(shape, dtype=torch.int64, device="meta"),
        mask=torch.ones(shape, dtype=torch.bool, device="meta"),
        reward_scale=args.reward_scale,
        estimator=args.estimator,
        reduction=args.reduction,
    )
    out.loss.backward()
    assert out.advantages is not None
    assert out.advantages.shape == shape
    assert student.hidden.grad is not None
    assert student.hidden.grad.shape == (*shape, PRESETS[family(setting.model)].hidden)


# One step of the script itself. Reduced: one layer of width 32 (four experts of width 16), four prompts, answers of six
# tokens, float32, generation by transformers. Not reduced: the vocabulary, the kinds of models, their number, the file.

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if enable_thinking is not false %}think{% endif %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
REDUCED = {
    "--max_steps": "1",
    "--per_device_train_batch_size": "2",
    "--gradient_accumulation_steps": "2",
    "--max_completion_length": "6",
    "--use_vllm": "false",
    "--bf16": "false",
    "--report_to": "none",
    "--save_strategy": "no",
    "--disable_tqdm": "true",
}
PROMPTS = ["one and two", "two and two", "print one", "sort two and one"]


def save_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<eos>", "<pad>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(PROMPTS, trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)


def save_small(name: str, folder: Path, seed: int) -> str:
    """A model of a named one's kind and vocabulary, random and small."""
    sizes = {
        **PUBLISHED[family(name)],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    kind = transformers.Qwen3Config
    if "num_experts" in sizes:
        sizes.update(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        kind = transformers.Qwen3MoeConfig
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(kind(**sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def write_prompts(file: Path) -> None:
    """Rows as the published data has them: messages, test cases, and the teacher's name in extra_info."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [
        {
            "data_source": "none",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"ground_truth": "3", "style": "rule"},
            "extra_info": {"index": i, "opd_teacher": ("math", "code")[i % 2]},
        }
        for i, text in enumerate(PROMPTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_prompts_without_a_teacher_are_refused(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"prompt": "a", "extra_info": {"opd_teacher": teacher}} for teacher in ("math", None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(SystemExit, match=r"1 of 2 prompts have no extra_info\.opd_teacher"):
        imported("prepare").main(str(tmp_path / "train.parquet"), str(tmp_path / "routed.parquet"))


@pytest.mark.usefixtures("one_thread")
@EVERY_SETTING
def test_one_step_with_small_random_models_of_the_same_kind(script: Any, tmp_path: Path, name: str) -> None:
    setting, _ = parsed(script, name)
    student = save_small(setting.model, tmp_path / "student", 0)
    small = {
        route: save_small(m, tmp_path / f"teacher{route}", i)
        for i, (route, m) in enumerate(teachers_of(setting).items(), 1)
    }
    ref = save_small(setting.ref_model, tmp_path / "ref", 9)
    write_prompts(tmp_path / "train.parquet")
    prompts = tmp_path / "routed.parquet"
    imported("prepare").main(str(tmp_path / "train.parquet"), str(prompts))
    given = ["--model", student, "--ref_model", ref, "--prompts", str(prompts), "--output_dir", str(tmp_path / "run")]
    given += ["--teacher", *(f"{route}={path}" if route else path for route, path in small.items())]
    given += [part for option in REDUCED.items() for part in option]
    trainer = script.trainer_of(*parsed(script, name, *given))
    before = {key: x.clone() for key, x in trainer.model.state_dict().items()}
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "gopd/reward" in entry]
    assert log["gopd/reward_scale"] == 1.25
    assert math.isfinite(log["loss"])
    # q, r and p are different models
    assert min(abs(log["gopd/reward"]), log["gopd/kl_teacher_k3"], log["gopd/kl_ref_k3"]) > 0.1
    assert all((before[key] != x).any() for key, x in trainer.model.state_dict().items() if x.ndim == 2)


def test_prompts_that_are_too_long_are_left_out(script: Any, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    write_prompts(tmp_path / "train.parquet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lengths = {text: len(tokenizer(f"<s>{text}<s>")["input_ids"]) for text in PROMPTS}  # as the template has them
    most = sorted(lengths.values())[1]
    given = ["--prompts", str(tmp_path / "train.parquet"), "--max_prompt_length", str(most)]
    setting, args = parsed(script, "same-size", *given)
    kept = [prompt[0]["content"] for prompt in script.prompts_of(setting, args, tokenizer)["prompt"]]
    assert kept == [text for text in PROMPTS if lengths[text] <= most] != PROMPTS


# ---------------------------------------------------------------------------------------------------------------- verl


@functools.cache
def composed(name: str) -> Any:
    hydra = pytest.importorskip("hydra")
    pytest.importorskip("verl")
    import verl_cpu  # noqa: F401  (before verl asks for its device)
    from fused_gopd.integrations import verl  # noqa: F401

    with hydra.initialize_config_dir(str(SCALE / "verl"), version_base=None):
        return hydra.compose(name)


@EVERY_SETTING
def test_the_verl_file_passes_verls_check_and_the_plugins(name: str) -> None:
    config = composed(name)
    from verl.utils import config as verl_config

    verl_config.validate_config(config, use_reference_policy=True, use_critic=False)
    distillation = verl_config.omega_conf_to_dataclass(config.distillation)
    assert distillation.distillation_loss.reward_scale == 1.25
    used = sum(teacher.world_size for teacher in distillation.teacher_models.values())
    assert used + config.trainer.n_gpus_per_node == 8


@EVERY_SETTING
def test_verl_and_trl_have_the_same_models_and_hyperparameters(name: str) -> None:
    config, yaml = composed(name), pytest.importorskip("yaml")
    trl = yaml.safe_load((SCALE / "trl" / f"{name}.yaml").read_text())
    actor, data = config.actor_rollout_ref.actor, config.data
    assert config.actor_rollout_ref.model.path == trl["model"]
    models = {teacher.model_path for teacher in config.distillation.teacher_models.values() if teacher.model_path}
    assert models == {entry.split("=")[-1] for entry in trl["teacher"]}
    assert data.train_files == trl["prompts"]
    assert config.trainer.total_training_steps == trl["max_steps"]
    assert (actor.optim.lr, actor.optim.weight_decay) == (trl["learning_rate"], trl["weight_decay"])
    assert actor.loss_agg_mode == trl["reduction"]
    assert data.train_batch_size == trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] * PLACES
    assert (data.max_prompt_length, data.max_response_length) == (
        trl["max_prompt_length"],
        trl["max_completion_length"],
    )
    assert config.distillation.distillation_loss.reward_scale == trl["reward_scale"]
    if "route_column" in trl:
        assert config.distillation.teacher_key == trl["route_column"]


# ---------------------------------------------------------------------------------------------------------------- page


def rows(script: Any) -> list[list[str]]:
    """A rank's memory, for each setting."""
    found = []
    for name in SETTINGS:
        setting, args = parsed(script, name)
        teachers = teachers_of(setting).values()
        student = family(setting.model)
        tokens = args.per_device_train_batch_size * args.max_completion_length * PLACES
        job = [
            "--model",
            student,
            "--teacher-model",
            family(first_teacher(setting)),
            "--tokens",
            str(tokens),
            "--dp",
            str(PLACES),
        ]

        def plan(estimator: str, job: list[str] = job) -> dict[str, Any]:
            return dict(json.loads(planned([*job, "--gpu", "h100", "--estimator", estimator, "--json"])))

        sampled, full = plan("sampled"), plan("full")
        frozen = 2 * sum(full_size(family(model)).num_parameters() for model in (*teachers, setting.ref_model))
        found.append(
            [
                f"`{name}`",
                *(gib(side) for plan_ in (sampled, full) for side in (plan_["dense"]["peak"], plan_["fused"]["peak"])),
                f"{sampled['gemm_ms']:.0f} ms",
                gib(16 * full_size(student).num_parameters() / PLACES),
                gib(frozen / PLACES),
            ]
        )
    return found


def with_table(page: str, script: Any) -> str:
    head = [
        "",
        "loss, dense",
        "loss, fused",
        "`full`, dense",
        "`full`, fused",
        "GEMMs",
        "student, its gradient, Adam",
        "teachers, reference",
    ]
    return snapshots.fill(page, "scale", snapshots.markdown(head, rows(script), numbers=True))


def test_the_page_has_the_figures_of_the_planner(script: Any) -> None:
    page = PAGE.read_text()
    assert len(_FENCE.findall(page)) == 1
    assert with_table(with_outputs(page), script) == page, (
        "run python tests/helpers/write_pages.py and read what changed"
    )


def test_dense_code_would_take_a_third_of_80_gib_and_full_more_than_half() -> None:
    job = ["--model", "qwen3-4b", "--tokens", "131072", "--dp", "8", "--json"]
    sampled, full = (json.loads(planned([*job, "--estimator", e]))["dense"]["peak"] for e in ("sampled", "full"))
    assert 80 * 0.3 < sampled / 2**30 < 80 * 0.36
    assert full / 2**30 > 80 * 0.5


def test_the_commands_of_the_page_are_commands_of_these_files(script: Any) -> None:
    page = PAGE.read_text().replace("\\\n", " ")
    launches = re.findall(r"train_trl\.py( --config trl/[^\n]*)", page)
    assert len(launches) >= 3
    for launch in launches:
        words = shlex.split(launch)
        parsed(script, Path(words[1]).stem, *words[2:])
    assert set(re.findall(r"--config-name (\S+)", page)) <= set(SETTINGS)
    assert all((SCALE / path).exists() for path in re.findall(r"(?:trl|verl)/[\w-]+\.yaml", page))


def test_the_one_gpu_command_of_the_page_passes_distills_own_check(tmp_path: Path) -> None:
    for package in ("trl", "datasets", "peft", "httpx", "tensorboard", "matplotlib"):
        pytest.importorskip(package)
    import typer

    from fused_gopd.cli import app

    (command,) = re.findall(r"fused-gopd distill ((?:[^\n]*\\\n)*[^\n]*)", PAGE.read_text())
    context = (
        typer.main.get_command(app)
        .commands["distill"]
        .make_context("distill", shlex.split(command.replace("\\\n", " ")))
    )
    write_prompts(tmp_path / "prompts.parquet")
    given = {**context.params, "prompts": str(tmp_path / "prompts.parquet")}
    options = distill.for_new_run(
        tmp_path, {key: value for key, value in given.items() if key in distill.RunOptions.names()}
    )
    assert (options.reward_scale, options.estimator, options.ref) == (1.25, "sampled", "student")


def write() -> None:
    PAGE.write_text(with_table(with_outputs(PAGE.read_text()), imported("train_trl")))
