"""Several GPUs with FSDP2: parameters are sharded, each rank has its own prompts, the loss is the mean over all tokens.

torchrun --nproc-per-node 2 examples/fsdp2.py                         # tiny random models, two processes on a CPU
torchrun --nproc-per-node 8 examples/fsdp2.py --student Qwen/Qwen3-4B --teacher Qwen/Qwen3-32B
"""

import argparse
import os

import tiny
import torch
from plain_loop import DEVICE, PROMPTS, load, sample
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoTokenizer

import fused_gopd as fg
from fused_gopd.distributed import gathered, in_forward, through_head
from fused_gopd.integrations.transformers import head_of, last_hidden_state


def shard(model):
    """One unit a layer, gathered while it runs; the root holds the rest, embeddings and head."""
    policy = MixedPrecisionPolicy(param_dtype=None if DEVICE == "cpu" else torch.bfloat16)
    for module in (*model.model.layers, model):
        fully_shard(module, mp_policy=policy)
    return model


def forward_backward(student, teacher, ref, ids, attention_mask, mask):
    """The loss, made inside the student's forward, where FSDP2 has its parameters gathered."""
    (options,) = fg.distributed.normalization("token-mean", [mask])  # the mean over the tokens of all ranks
    options |= {"token_ids": ids[:, -mask.shape[1] :], "mask": mask, "reward_scale": 1.25, "estimator": "full"}

    def hidden(model):
        return last_hidden_state(model, ids, attention_mask, keep=mask.shape[1])

    def frozen(model, weight):
        with torch.no_grad():
            return fg.LinearHead(in_forward(model, lambda: hidden(model)), weight)

    with gathered(teacher.lm_head.weight) as teacher_weight, gathered(ref.lm_head.weight) as ref_weight:
        others = frozen(teacher, teacher_weight), frozen(ref, ref_weight)

        def of_head(head):
            return fg.gopd_loss(head_of(student, head.hidden), *others, **options)

        out = in_forward(student, lambda: through_head(student.lm_head, hidden(student), of_head))
        out.loss.backward()
    return out.metrics().all_reduce().to_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a model's name or folder; default: a tiny one")
    parser.add_argument("--teacher", help="one with the same tokenizer")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    max_new_tokens, lr = (128, 1e-6) if args.student else (16, 3e-3)
    name, teacher_name = args.student or tiny.checkpoint("student"), args.teacher or tiny.checkpoint("teacher")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer, student = AutoTokenizer.from_pretrained(name), shard(load(name, trained=True))
    teacher, ref = (shard(load(frozen).requires_grad_(False)) for frozen in (teacher_name, name))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    torch.manual_seed(rank)  # each rank samples its own answers
    for step in range(args.steps):
        batch = sample(student, tokenizer, (PROMPTS * ranks)[rank::ranks], max_new_tokens, synced_gpus=True)
        metrics = forward_backward(student, teacher, ref, *batch)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step:3}  KL to the target {metrics['kl_target']:.3f}  reward {metrics['reward']:+.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
