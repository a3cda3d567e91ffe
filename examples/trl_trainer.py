"""Distil with TRL: GOPDTrainer in the place of TRL's DistillationTrainer.

python examples/trl_trainer.py                                       # tiny random models, seconds on a CPU
python examples/trl_trainer.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --dataset trl-lib/tldr
"""

import argparse

import tiny
import torch
from datasets import Dataset, load_dataset

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--teacher", help="one with the same tokenizer")
    parser.add_argument("--dataset", help='one with a column "prompt"')
    parser.add_argument("--reward-scale", type=float, default=1.25, help="lambda; above 1 goes beyond the teacher")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/trl", help="where the student goes")
    args = parser.parse_args()
    student = args.student or tiny.checkpoint("student")
    if args.dataset:
        dataset = load_dataset(args.dataset, split="train")
    else:
        questions = [f"What is {a} times {b}?" for a in range(2, 10) for b in range(2, 10)]
        dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})
    gpu = torch.cuda.is_available()

    trainer = GOPDTrainer(
        model=student,
        teacher=args.teacher or tiny.checkpoint("teacher"),
        ref_model=student,  # the student before training
        args=GOPDConfig(
            args.output,
            reward_scale=args.reward_scale,
            max_completion_length=512 if args.student else 16,
            learning_rate=1e-6 if args.student else 3e-3,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not gpu,  # on a CPU say so,
            bf16=gpu,  # and turn TRL's default of bfloat16 off
        ),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model(args.output)
    logs = [log["gopd/kl_target"] for log in trainer.state.log_history if "gopd/kl_target" in log]
    print(f"KL to the target: {logs[0]:.3f} at first, {logs[-1]:.3f} at the end. The student is in {args.output}")


if __name__ == "__main__":
    main()
