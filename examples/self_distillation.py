"""The student is its own teacher, with a hint: it learns to answer as if its prompt had the hint.

python examples/self_distillation.py                                # a tiny random model, seconds on a CPU
python examples/self_distillation.py --student Qwen/Qwen3-0.6B --hint "Answer in one sentence." --ema 0.95
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
    parser.add_argument("--hint", default="Write nothing but digits, as many as you can: 0123456789.")
    parser.add_argument("--ema", type=float, help="the teacher follows the student; default: the student as it began")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/self_distillation", help="where the adapter goes")
    args = parser.parse_args()
    questions = [f"What is {a} times {b}?" for a in range(2, 10) for b in range(2, 10)]  # yours here
    gpu = torch.cuda.is_available()

    def hinted(row):  # what the teacher reads in place of the student's prompt
        return [{"role": "system", "content": args.hint}, *row["prompt"]]

    trainer = GOPDTrainer(
        model=args.student or tiny.checkpoint("student"),
        teacher="student",
        teacher_prompt=hinted,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        args=GOPDConfig(
            args.output,
            teacher_ema=args.ema,
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
    trainer.train()
    trainer.save_model(args.output)
    logs = [log["gopd/kl_target"] for log in trainer.state.log_history if "gopd/kl_target" in log]
    print(f"KL to the target: {logs[0]:.3f} at first, {logs[-1]:.3f} at the end. The adapter is in {args.output}")


if __name__ == "__main__":
    main()
