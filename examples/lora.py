"""Train a LoRA adapter with TRL. The reference is the student without its adapter: no third model in memory.

python examples/lora.py                                       # tiny random models, seconds on a CPU
python examples/lora.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
"""

import argparse

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--teacher", help="one with the same tokenizer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/lora", help="where the adapter goes")
    args = parser.parse_args()
    questions = [f"What is {a} times {b}?" for a in range(2, 10) for b in range(2, 10)]  # yours here
    gpu = torch.cuda.is_available()

    trainer = GOPDTrainer(
        model=args.student or tiny.checkpoint("student"),
        teacher=args.teacher or tiny.checkpoint("teacher"),
        ref_model="base",
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
        args=GOPDConfig(
            args.output,
            reward_scale=1.25,  # lambda; above 1 goes beyond the teacher
            max_completion_length=512 if args.student else 16,
            learning_rate=1e-4 if args.student else 1e-2,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not gpu,
            bf16=gpu,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": question}] for question in questions]}
        ),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(args.output)
    logs = [log["gopd/kl_target"] for log in trainer.state.log_history if "gopd/kl_target" in log]
    print(f"KL to the target: {logs[0]:.3f} at first, {logs[-1]:.3f} at the end. The adapter is in {args.output}")


if __name__ == "__main__":
    main()
