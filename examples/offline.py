"""Distil on fixed texts whose scores are made once: the teacher is not there while the student is trained.

python examples/offline.py                                                     # both halves with tiny models, seconds
python examples/offline.py --score --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --cache scores  # with both models
python examples/offline.py --train --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --cache scores  # heads alone
"""

import argparse
import tempfile

import tiny
import torch
from plain_loop import DEVICE, head, load
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

import fused_gopd as fg
from fused_gopd.integrations.cache import TeacherCache
from fused_gopd.integrations.checkpoint import load_head

TEXTS = [("Why is the sky blue?", "Short waves scatter more."), ("Name a river.", "The Rhine.")]  # yours here
TEXTS += [("What is 12 times 12?", "144."), ("Write a haiku about snow.", "Snow falls on the pond / and is the pond.")]


def batches(tokenizer, size=2):
    """Ids and attention mask (B, T), and which of the tokens after the first belong to an answer, (B, T - 1)."""
    for i in range(0, len(TEXTS), size):
        ids, masks = [], []
        for question, answer in TEXTS[i : i + size]:
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            parts = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, answer)]
            ids.append(torch.tensor(parts[0] + parts[1] + [tokenizer.eos_token_id]))
            masks.append(torch.arange(1, len(ids[-1])) >= len(parts[0]))
        mask = pad_sequence(masks, batch_first=True)
        attention = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        yield pad_sequence(ids, batch_first=True).to(DEVICE), attention.to(DEVICE), mask.to(DEVICE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--teacher", help="one with the same tokenizer")
    parser.add_argument("--cache", help="the folder of the scores; default: a temporary one")
    parser.add_argument("--score", action="store_true", help="only score, with teacher and reference in memory")
    parser.add_argument("--train", action="store_true", help="only train, with what was scored")
    parser.add_argument("--reward-scale", type=float, default=1.25, help="lambda; above 1 goes beyond the teacher")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    names = {"teacher": args.teacher or tiny.checkpoint("teacher"), "ref": args.student or tiny.checkpoint("student")}
    tokenizer = AutoTokenizer.from_pretrained(names["ref"])
    cache = TeacherCache(args.cache or tempfile.mkdtemp())
    texts = list(batches(tokenizer))

    if not args.train:
        for role, name in names.items():
            scorer = cache.scorer(load(name), name=role)
            for batch in texts:
                scorer(*batch)
        print(f"{cache.path}: {len(cache)} sequences, {cache.nbytes / 2**20:.1f} MiB")
    if args.score:
        return

    teacher, ref = (cache.scorer(name=role, head=load_head(names[role], device=DEVICE)) for role in names)
    student = load(names["ref"], trained=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6 if args.student else 3e-3)
    for step in range(args.steps):
        ids, attention_mask, mask = texts[step % len(texts)]
        frozen = teacher(ids, attention_mask, mask), ref(ids, attention_mask, mask)
        trained = head(student, ids, attention_mask, mask.shape[1])
        out = fg.gopd_loss(trained, *frozen, ids[:, 1:], mask=mask, reward_scale=args.reward_scale, estimator="full")
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3}  KL to the target {out.metrics()['kl_target']:.3f}")


if __name__ == "__main__":
    main()
