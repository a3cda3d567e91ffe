"""Two teachers into one student with TRL: each prompt names its teacher, and each teacher runs on its prompts alone.

python examples/two_teachers.py                                        # tiny random models, seconds on a CPU
python examples/two_teachers.py --student org/base --math org/base-rl-math --code org/base-rl-code
"""

import argparse

import tiny
import torch
from datasets import Dataset

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--math", help="the teacher of the prompts whose domain is math; the same tokenizer")
    parser.add_argument("--code", help="the teacher of those whose domain is code")
    parser.add_argument("--reward-scale", type=float, default=1.25, help="lambda; above 1 goes beyond the teachers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/two-teachers", help="where the student goes")
    args = parser.parse_args()
    student = args.student or tiny.checkpoint("student")
    pairs = [(a, b) for a in range(2, 8) for b in range(2, 8)]
    questions = [("math", f"What is {a} times {b}?") for a, b in pairs]
    questions += [("code", f"Write a Python function that adds {a} and {b} times its argument.") for a, b in pairs]
    gpu = torch.cuda.is_available()

    trainer = GOPDTrainer(
        model=student,
        teacher={"math": args.math or tiny.checkpoint("math"), "code": args.code or tiny.checkpoint("code")},
        ref_model=student,  # what both teachers were before their own training, and the student too
        args=GOPDConfig(
            args.output,
            route_column="domain",  # the column that names the teacher of a prompt
            reward_scale=args.reward_scale,
            max_completion_length=512 if args.student else 16,
            learning_rate=1e-6 if args.student else 3e-3,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not gpu,
            bf16=gpu,
        ),
        train_dataset=Dataset.from_list(
            [{"domain": domain, "prompt": [{"role": "user", "content": text}]} for domain, text in questions]
        ),
    )
    trainer.train()
    trainer.save_model(args.output)
    logs = [log["gopd/kl_target"] for log in trainer.state.log_history if "gopd/kl_target" in log]
    print(f"KL to the prompts' own targets: {logs[0]:.3f} at first, {logs[-1]:.3f} at the end")


if __name__ == "__main__":
    main()
