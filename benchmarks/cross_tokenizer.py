"""A teacher with another tokenizer on a toy task: numbers in words, by two tiny models trained here.

``python -m benchmarks.cross_tokenizer [--json FILE] [PAGE.md ...]`` prints the table and fills it in between
``<!-- cross-tokenizer -->`` and ``<!-- /cross-tokenizer -->`` of a page. Needs TRL and datasets; minutes on a CPU.

The student has byte-level BPE, the teacher SentencePiece with bytes for what its vocabulary lacks. Both learn from
right answers, the teacher until it knows the task, the student a little. Then the student learns on its own answers to
other prompts, by :class:`fused_gopd.integrations.trl.GOPDTrainer` with ``cross_tokenizer=True``. The reward is the
fraction of held-out numbers that greedy decoding writes without a mistake.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from .arguments import parse, publish
from .run import origin, write

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ONES_LIST = [*ONES.split(), "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TEACHER_STEPS, STUDENT_STEPS, STEPS, BATCH, LENGTH = 600, 250, 100, 64, 24
FEW = 60  # answers from which the student has learnt
HELD_OUT, SEEDS = 200, (0,)
RUNS: dict[str, dict[str, Any]] = {
    "sampled, spread": {"estimator": "sampled"},
    "sampled, last": {"estimator": "sampled", "span_credit": "last"},
    "full": {"estimator": "full"},
    "full, also where the token is not common": {"estimator": "full", "everywhere": True},
    "sampled, spread, λ = 1.25": {"estimator": "sampled", "reward_scale": 1.25},
}


def words(n: int) -> str:
    """A number below a million, in English."""
    if n < 20:
        return ONES_LIST[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES_LIST[n % 10]}" if n % 10 else "")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {words(n % size)}" if n % size else ""
            return f"{words(n // size)} {name}{rest}"
    raise AssertionError


def question(n: int) -> str:
    return f"{n} ="


def tokenizers_of_both() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [f"{question(n)} {words(n)}" for n in range(0, 1000)]
    student = Tokenizer(models.BPE())
    student.pre_tokenizer, student.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": ["<eos>", "<pad>"], "show_progress": False}
    student.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options))
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    options["special_tokens"] = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=70, **options))
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    teacher = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    teacher.pre_tokenizer = trained.pre_tokenizer
    teacher.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return (
        PreTrainedTokenizerFast(tokenizer_object=student, eos_token="<eos>", pad_token="<pad>", padding_side="left"),
        PreTrainedTokenizerFast(tokenizer_object=teacher, eos_token="</s>", pad_token="<s>", padding_side="left"),
    )


def model(tokenizer: Any, width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": layers}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "vocab_size": len(tokenizer)}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, max_position_embeddings=128))


def learn(trained: Any, tokenizer: Any, numbers: list[int], steps: int, seed: int) -> None:
    """Cross entropy on right answers."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = generator.choices(numbers, k=BATCH)
        rows = []
        for n in chosen:
            front = tokenizer(question(n))["input_ids"]
            whole = tokenizer(f"{question(n)} {words(n)}")["input_ids"] + [tokenizer.eos_token_id]
            rows.append((whole, len(front)))
        width = max(len(whole) for whole, _ in rows)
        ids = torch.tensor([whole + [tokenizer.pad_token_id] * (width - len(whole)) for whole, _ in rows])
        labels = ids.clone()
        for row, (whole, front) in enumerate(rows):
            labels[row, :front] = -100
            labels[row, len(whole) :] = -100
        loss = trained(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def reward(scored: Any, tokenizer: Any, numbers: list[int]) -> float:
    """The fraction of numbers that greedy decoding writes without a mistake."""
    was_training = scored.training
    scored.eval()
    given = tokenizer([question(n) for n in numbers], return_tensors="pt", padding=True, return_token_type_ids=False)
    out = scored.generate(**given, max_new_tokens=LENGTH, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    scored.train(was_training)
    return sum(text.strip() == words(n) for text, n in zip(texts, numbers, strict=True)) / len(numbers)


def distil(
    student: Any, teacher: Any, ref: Any, tokenizers: tuple[Any, Any], numbers: list[int], seed: int, **options: Any
) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback

    from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer

    curve: list[tuple[int, float]] = []
    held_out = numbers[:HELD_OUT]
    everywhere = options.pop("everywhere", False)
    data = Dataset.from_dict({"prompt": [question(n) for n in numbers[HELD_OUT:]]})

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 25 == 0:
                random_state = torch.get_rng_state()
                curve.append((state.global_step, reward(student, tokenizers[0], held_out)))
                torch.set_rng_state(random_state)

    with tempfile.TemporaryDirectory() as folder:
        args = GOPDConfig(
            folder,
            cross_tokenizer=True,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            max_completion_length=LENGTH,
            learning_rate=1e-4,
            lr_scheduler_type="linear",
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = GOPDTrainer(
            student,
            teacher,
            args,
            train_dataset=data,
            processing_class=tokenizers[0],
            teacher_processing_class=tokenizers[1],
            ref_model=ref if options.get("reward_scale", 1) != 1 else None,
            callbacks=[Watch()],
        )
        if everywhere:  # which the trainer does not do
            cast("Any", trainer)._cross._usable = lambda name, aligned, token_ids: aligned.state_mask
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    kept = ("loss", "gopd/kl_teacher_k3", "gopd/kl_target", "gopd/aligned_tokens", "gopd/aligned_bytes")
    return {
        "held_out": curve,
        "first": {name: logs[0][name] for name in kept if name in logs[0]},
        "last": {name: logs[-1][name] for name in kept if name in logs[-1]},
    }


def measure(seed: int, names: list[str]) -> dict[str, Any]:
    numbers = random.Random(7).sample(range(10, 1000), 900)
    taught, asked = numbers[:450], numbers[450:]
    both = tokenizers_of_both()
    teacher, student = model(both[1], 64, 2, 10 + seed), model(both[0], 64, 2, 20 + seed)
    start = time.perf_counter()
    learn(teacher, both[1], taught, TEACHER_STEPS, seed)
    learn(student, both[0], taught[:FEW], STUDENT_STEPS, seed)
    from fused_gopd.integrations.tokenizers import TokenizerPair

    found: dict[str, Any] = {
        "seed": seed,
        "common": TokenizerPair(*both).common([words(n) for n in asked[:HELD_OUT]]),
        "teacher": reward(teacher, both[1], asked[:HELD_OUT]),
        "student": reward(student, both[0], asked[:HELD_OUT]),
        "learning_seconds": round(time.perf_counter() - start, 1),
        "runs": {},
    }
    for name in names:
        start = time.perf_counter()
        ran = distil(copy.deepcopy(student), teacher, copy.deepcopy(student), both, asked, seed, **RUNS[name])
        found["runs"][name] = {**ran, "seconds": round(time.perf_counter() - start, 1)}
        print(seed, name, found["student"], ran["held_out"], found["teacher"], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| estimator | held-out reward after 0, 25, 50, 75, 100 steps | tokens used | seconds |",
        "|---|---|---:|---:|",
    ]
    for found in result["seeds"]:
        for name, ran in found["runs"].items():
            curve = ", ".join(f"{x:.2f}" for x in (found["student"], *(value for _, value in ran["held_out"])))
            lines.append(
                f"| {name} | {curve} | {100 * ran['last']['gopd/aligned_tokens']:.0f} % | {ran['seconds']:.0f} |"
            )
    first = result["seeds"][0]
    common, versions = first["common"], result["versions"]
    lines += [
        "",
        f"Numbers in words, {HELD_OUT} held out; two Llamas of two layers, 64 wide. The teacher's reward is "
        f"{first['teacher']:.2f}. Its tokenizer has {100 * common['vocabulary']:.0f} % of the student's tokens; of "
        f"those in the held-out answers {100 * common['single']:.0f} % are a span alone, and before "
        f"{100 * common['states']:.0f} % both have a boundary. {STEPS} steps of {BATCH} answers; {result['device']}; "
        f"TRL {versions['trl']}, transformers {versions['transformers']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="pages whose table to fill in")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parse(parser, "json")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    import transformers
    import trl

    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    result = {**origin("cpu"), "versions": versions, "seeds": [measure(seed, list(RUNS)) for seed in SEEDS]}
    if args.json:
        write(result, args.json)
    publish("cross-tokenizer", table(result), args.pages)


if __name__ == "__main__":
    main()
