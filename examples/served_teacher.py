"""A teacher on another machine: an inference server sends its log-probs of the student's answers, a number a token.

python examples/served_teacher.py                                      # a tiny local server, seconds on a CPU
vllm serve Qwen/Qwen3-32B                                              # on the teacher's machine, and then here:
python examples/served_teacher.py --url http://10.0.0.7:8000 --teacher Qwen/Qwen3-32B --student Qwen/Qwen3-0.6B
"""

import argparse

import tiny
import torch
from plain_loop import DEVICE, PROMPTS, head, load, sample
from transformers import AutoTokenizer

import fused_gopd as fg
from fused_gopd.integrations.server import ServerTeacher


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--url", help="the server; default: a tiny one is started")
    parser.add_argument("--teacher", help="the name under which the server has the teacher")
    parser.add_argument("--reward-scale", type=float, default=1.25, help="lambda; above 1 goes beyond the teacher")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    max_new_tokens, lr = (128, 1e-6) if args.student else (16, 3e-3)
    name = args.student or tiny.checkpoint("student")
    teacher_name = args.teacher or tiny.checkpoint("teacher")
    url = args.url or tiny.serve(teacher_name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    student, ref = load(name, trained=True), load(name)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)

    # asks the server at once whether it has that model and returns log-probs; tokenizer: that both have the same one
    with ServerTeacher(url, teacher_name, tokenizer=tokenizer) as teacher:
        for step in range(args.steps):
            ids, attention_mask, mask = sample(student, tokenizer, PROMPTS * 4, max_new_tokens)
            keep = mask.shape[1]
            teacher_logprobs = teacher(ids, attention_mask, mask)  # fg.TokenLogProbs (B, K), at temperature 1
            with torch.no_grad():
                reference = head(ref, ids, attention_mask, keep)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                trained = head(student, ids, attention_mask, keep)
            # "sampled" looks at the sampled tokens alone: the one number a token that a server sends is enough
            options = {"mask": mask, "reward_scale": args.reward_scale, "estimator": "sampled"}
            out = fg.gopd_loss(trained, teacher_logprobs, reference, ids[:, -keep:], **options)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = out.metrics().to_dict()
            print(f"step {step:3}  KL to the teacher {metrics['kl_teacher_k3']:.3f}  reward {metrics['reward']:+.3f}")


if __name__ == "__main__":
    main()
