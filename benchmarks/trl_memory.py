"""Peak memory of a step of TRL's distillation trainer, with and without this package, in separate processes.

``python -m benchmarks.trl_memory [--json FILE] [PAGE.md ...]`` prints the table and fills it in between
``<!-- trl-memory -->`` and ``<!-- /trl-memory -->`` of a page. Needs TRL, datasets and tokenizers, and a Linux.

A step is the trainer's ``training_step``: forwards of all models, loss, backward, with given completions. Measured as
in :mod:`benchmarks.memory` on a CPU: the peak resident set during the step, minus that before it, minus the gradients.
It includes the activations of the models' bodies, which are the same in all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .arguments import parse, publish
from .memory import process_status, release_free_memory
from .run import device_name, origin, write

_ROOT = Path(__file__).resolve().parents[1]

VOCAB, HIDDEN, LAYERS = 49152, 128, 2
SEQUENCES, PROMPT, COMPLETION = 4, 16, 256
SCALE = 1.25

NAMES = {
    "dense": "dense logits, two models",
    "trl": "TRL's own loss, two models",
    "patched": "**this package** in TRL's trainer (`patch_distillation_loss`), two models",
    "gopd": "**this package**, `GOPDTrainer`, λ = 1, two models",
    "dense-three": f"dense logits, λ = {SCALE}, three models",
    "gopd-three": f"**this package**, `GOPDTrainer`, λ = {SCALE}, three models",
}


def model(seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, eos_token_id=0, pad_token_id=1))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "a": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tiny, eos_token="<eos>", pad_token="<pad>")


def batch(completion: int) -> dict[str, torch.Tensor]:
    """A generation batch as TRL prepares it."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(2, VOCAB, (SEQUENCES, length), generator=generator)

    prompt, answer = tokens(PROMPT), tokens(completion)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": torch.ones_like(answer),
        "num_items_in_batch": torch.tensor(answer.numel()),
        "num_sequences": torch.tensor(SEQUENCES),
    }


def _make_dense(made: Any) -> None:
    """Replace the trainer's loss by the dense reference on logits from the models' own forward."""
    import fused_gopd as fg
    from fused_gopd.integrations.trl import models

    def hidden(of: Any, given: Any) -> torch.Tensor:
        logits: torch.Tensor = of(given.input_ids, given.attention_mask, use_cache=False).logits
        return logits[:, -given.token_ids.shape[1] - 1 : -1]

    made._hidden = hidden
    made._head = lambda of, logits: fg.Logits(logits)
    made._at_head = lambda of, logits, function: function(fg.Logits(logits))
    models.gopd_loss = fg.reference.gopd_loss


def trainer(name: str, folder: str) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer, patch_distillation_loss

    plain: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    plain |= {"per_device_train_batch_size": SEQUENCES, "gradient_accumulation_steps": 1, "report_to": "none"}
    data: dict[str, Any] = {"train_dataset": Dataset.from_dict({"prompt": ["a"]}), "processing_class": tokenizer()}
    if name in ("trl", "patched"):
        made = DistillationTrainer(model(0), model(1), DistillationConfig(**plain), **data)
        if name == "patched":
            patch_distillation_loss(made)
        return made
    three = name.endswith("three")
    config = GOPDConfig(**plain, reward_scale=SCALE if three else 1.0)
    made = GOPDTrainer(model(0), model(1), config, **data, ref_model=model(2) if three else None)
    if name.startswith("dense"):
        _make_dense(made)
    return made


def measure(name: str) -> dict[str, Any]:
    """In this process, which has not run a step at full size before."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(name, folder)
        made._prepare_inputs = lambda given: given  # the completions are given
        made.current_gradient_accumulation_steps = 1  # what the loop over batches sets
        step: Callable[[int], torch.Tensor] = lambda n: made.training_step(made.model, batch(n), None)  # noqa: E731
        step(4)  # what loads and starts on first use
        made.model.zero_grad()
        release_free_memory()
        before = process_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        loss = step(COMPLETION).item()
        peak = process_status("VmHWM") - before
        gradients = sum(p.grad.nbytes for p in made.model.parameters() if p.grad is not None)
        return {"row": name, "peak_bytes": peak - gradients, "gradient_bytes": gradients, "loss": loss}


def measure_in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.trl_memory", "--only", name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, check=False, cwd=_ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the memory run of {name} failed:\n{done.stderr[-4000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| a step of | peak beyond gradients | loss |", "|---|---:|---:|"]
    lines += [f"| {NAMES[row['row']]} | {row['peak_bytes'] / 2**20:.0f} MiB | {row['loss']:.6f} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=NAMES, help="one row, in this process, as a line of JSON")
    args = parse(parser, "json")
    if args.only:
        print(json.dumps(measure(args.only)))
        return
    rows = [measure_in_process(name) for name in NAMES]
    import transformers
    import trl

    tokens = SEQUENCES * COMPLETION
    one = tokens * VOCAB * 4 / 2**20
    where = f"{tokens} completion tokens, V={VOCAB} ({one:.0f} MiB a [tokens, vocabulary] tensor), H={HIDDEN}, "
    where += f"{LAYERS} layers, float32, no gradient checkpointing; {device_name('cpu')}; TRL {trl.__version__}, "
    where += f"transformers {transformers.__version__}, torch {torch.__version__}"
    if args.json:
        versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        write({**origin("cpu"), "versions": versions, "tokens": tokens, "vocab": VOCAB, "rows": rows}, args.json)
    publish("trl-memory", f"{table(rows)}\n{where}.\n", args.pages)


if __name__ == "__main__":
    main()
