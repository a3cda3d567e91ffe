"""Distil a teacher into a student on the student's own answers, in a plain PyTorch loop.

python examples/plain_loop.py                                       # tiny random models, seconds on a CPU
python examples/plain_loop.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
"""

import argparse

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_gopd as fg
from fused_gopd.integrations.transformers import head_of, last_hidden_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["Why is the sky blue?", "What is 12 times 12?", "Name a river.", "Write a haiku about snow."]  # yours here


def load(name, trained=False):
    """A model: in float32 where it is trained, otherwise in bfloat16 on a GPU."""
    dtype = torch.float32 if trained or DEVICE == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(DEVICE)


def sample(student, tokenizer, prompts, max_new_tokens, **options):
    """The student's answers: ids and attention mask (B, P + K), and which of the last K tokens are an answer's."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(DEVICE)
    # from the student itself: top_k, top_p or a temperature of its generation config would be another distribution
    options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    with torch.no_grad():
        ids = student.generate(**inputs, **options)
    prompt_mask = inputs["attention_mask"]
    ends = torch.isin(ids[:, prompt_mask.shape[1] :], torch.tensor(student.generation_config.eos_token_id).to(DEVICE))
    mask = ends.cumsum(1) - ends.long() == 0  # up to the first end of text, which is learnt too; then padding
    return ids, torch.cat([prompt_mask, mask.long()], 1), mask


def head(model, ids, attention_mask, keep):
    """The hidden states that predict the last ``keep`` tokens, (B, keep, H), with the head's weight: no logits yet."""
    return head_of(model, last_hidden_state(model, ids, attention_mask, keep=keep))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--teacher", help="one with the same tokenizer")
    parser.add_argument("--reward-scale", type=float, default=1.25, help="lambda; above 1 goes beyond the teacher")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    max_new_tokens, lr = (128, 1e-6) if args.student else (16, 3e-3)
    student_name = args.student or tiny.checkpoint("student")
    tokenizer = AutoTokenizer.from_pretrained(student_name)
    student, ref = load(student_name, trained=True), load(student_name)  # the reference: the student before training
    teacher = load(args.teacher or tiny.checkpoint("teacher"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)

    for step in range(args.steps):
        ids, attention_mask, mask = sample(student, tokenizer, PROMPTS, max_new_tokens)
        keep = mask.shape[1]
        with torch.no_grad():
            frozen = head(teacher, ids, attention_mask, keep), head(ref, ids, attention_mask, keep)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            trained = head(student, ids, attention_mask, keep)
        options = {"mask": mask, "reward_scale": args.reward_scale, "estimator": "full"}
        out = fg.gopd_loss(trained, *frozen, ids[:, -keep:], **options)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = out.metrics().to_dict()
        print(f"step {step:3}  KL to the target {metrics['kl_target']:.3f}  reward {metrics['reward']:+.3f}")


if __name__ == "__main__":
    main()
