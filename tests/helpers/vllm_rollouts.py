"""GOPDTrainer with vLLM in the same process (TRL's ``vllm_mode="colocate"``): prints its logs as JSON lines.

    python vllm_rollouts.py FOLDER SITE_PACKAGES

for vLLM's own Python. FOLDER has a model ``student`` and one ``teacher``; SITE_PACKAGES has TRL and what it needs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

folder = Path(sys.argv[1])
sys.path.append(sys.argv[2])
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
import vllm.model_executor.layers.utils as layers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer  # noqa: E402


def keep_weight(layer: Any, remove_weight: bool) -> None:
    """vLLM's kernels for CPUs repack weights, which cannot be loaded again: TRL syncs them by loading."""
    layer.cpu_linear = torch.nn.functional.linear


class Prompts(torch.utils.data.Dataset):
    """Rows of texts; ``datasets`` is of another environment than the packages that it pickles with."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"prompt": self.texts[i]}


layers.dispatch_cpu_unquantized_gemm = keep_weight
args = GOPDConfig(
    str(folder / "out"),
    estimator="sampled",
    num_iterations=2,
    clip=[0.2, 0.2],
    temperature=0.7,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=6,
    max_completion_length=24,
    learning_rate=1e-2,
    logging_steps=1,
    use_vllm=True,
    vllm_mode="colocate",
    vllm_gpu_memory_utilization=0.1,
    vllm_max_model_length=128,
    model_init_kwargs={"dtype": "float32"},
    teacher_model_init_kwargs={"dtype": "float32"},
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = GOPDTrainer(
    str(folder / "student"),
    str(folder / "teacher"),
    args,
    train_dataset=Prompts(["why is the sky blue", "tell me a story", "who are you", "count to ten"] * 10),
    processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
)
trainer.train()
for log in trainer.state.log_history:
    print(json.dumps(log))
