"""Row operations of the native backend on buffers of every wrong and every odd shape, under the sanitizers.

    LD_PRELOAD=libasan.so python fuzz.py LIBRARY CALLS ISA ...

LIBRARY is shim.cpp and the kernels, compiled with -fsanitize=address,undefined, in the place of the extension. Every
buffer has an allocation of its own and of its exact size. A call with a wrong buffer has to raise and name it; one with
odd ones (strided, unaligned, wider) has to give the bits of the same call on plain ones. test_native.py runs this.
"""

from __future__ import annotations

import ctypes
import importlib
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_gopd.objective.divergences import Mixed
from fused_gopd.objective.divergences import make as make_divergence
from fused_gopd.rowops import (
    GradientWeights,
    LogitTransform,
    ModelRows,
    Policy,
    PolicyRule,
    RowProblem,
    Stat,
    native,
)

# ------------------------------------------------------------------------------------- the extension's place, by ctypes

P, INT64, INT, F, BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_bool
D, NUMBERS = ctypes.c_double, ctypes.POINTER(ctypes.c_double)
RUN = {
    "steps": INT, "rows": INT64, "vocab": INT64, "student": P, "teacher": P, "ref": P, "reward_scale": D,
    "reward_scales": P, "token_ids": P, "divergence": INT, "constants": NUMBERS, "constant_count": ctypes.c_size_t,
    "forward_weight": F, "forward_weights": P, "statistics": P, "statistics_stride": INT64,
    "divergence_weights": P, "divergence_weight_stride": INT64, "token_weights": P, "token_weight_stride": INT64,
    "out": P, "out_stride": INT64, "out_dtype": INT, "stream_out": BOOL,
    "policy": P,
}  # fmt: skip


class Shim:
    """What the extension has, as far as native.py uses it."""

    STATISTICS, SECOND_ROUND, GRADIENT = 1, 2, 4

    def __init__(self, library: str, isa: str) -> None:
        self.c, self.isa = ctypes.CDLL(library), isa.encode()
        extension = importlib.import_module("fused_gopd._native")
        self.KINDS = extension.KINDS
        self.vector_address, self.matrix_address = extension.vector_address, extension.matrix_address
        self.c.new_model.restype, self.c.new_model.argtypes = P, [P, INT64, INT, P, F, F, BOOL]
        self.c.new_rule.restype, self.c.new_rule.argtypes = P, [F] * 7
        self.c.new_policy.restype, self.c.new_policy.argtypes = P, [P, D, P, P, INT64, P, INT64, P, P]
        self.c.policy.restype, self.c.policy.argtypes = None, [ctypes.c_char_p, P, INT64, P, INT64, P, INT64]
        self.c.losses.restype = None
        self.c.losses.argtypes = [ctypes.c_char_p, INT, D, P, BOOL, BOOL, F, P, INT64, P, INT64, P]
        self.c.run.restype, self.c.run.argtypes = None, [ctypes.c_char_p, *RUN.values()]

    def Model(self, *, raw, row_stride, dtype, bias, input_scale, output_scale, softcap):
        return self.c.new_model(raw, row_stride, dtype, bias, input_scale, output_scale, softcap)

    def PolicyRule(self, **numbers):  # in the order of the C++ one, as native.py has them
        return self.c.new_rule(*numbers.values())

    def Policy(self, **arguments):
        return self.c.new_policy(*arguments.values())

    def policy(self, **arguments):
        self.c.policy(self.isa, *arguments.values())

    def losses(self, **arguments):  # in the order of the C++ ones, as native.py has them
        self.c.losses(self.isa, *arguments.values())

    def Job(self, *, constants, **arguments):
        numbers = (ctypes.c_double * len(constants))(*constants)
        return {**arguments, "constants": numbers, "constant_count": len(constants)}

    def run_plain(self, job, steps, scales, forward_weights, ids, statistics, w_d, w_y, out, dtype, policy):
        rows, arguments = job["rows"], {"out_dtype": dtype, "policy": policy}
        tensors = {
            "reward_scales": (scales, lambda x: self.vector_address(x, 0, rows), None),
            "forward_weights": (forward_weights, lambda x: self.vector_address(x, 0, rows), None),
            "token_ids": (ids, lambda x: self.vector_address(x, 3, rows), None),
            "statistics": (
                statistics,
                lambda x: self.matrix_address(x, 0, len(Stat), rows, False),
                "statistics_stride",
            ),
            "divergence_weights": (w_d, lambda x: self.vector_address(x, 0, rows, True), "divergence_weight_stride"),
            "token_weights": (w_y, lambda x: self.vector_address(x, 0, rows, True), "token_weight_stride"),
            "out": (out, lambda x: self.matrix_address(x, dtype, rows, job["vocab"], True), "out_stride"),
        }
        for name, (x, address, stride) in tensors.items():
            arguments[name] = 0 if x is None else address(x)
            if x is not None and not arguments[name]:
                return False
            if stride is not None:
                arguments[stride] = 0 if x is None else x.stride(0)
        self.run(job=job, steps=steps, **arguments)
        return True

    def run(self, *, job, **arguments):
        assert set(arguments) <= set(RUN)
        given = {**job, **arguments}
        self.c.run(self.isa, *(given.get(name) or (None if kind in (P, NUMBERS) else 0) for name, kind in RUN.items()))


# --------------------------------------------------------------------------------------------------------- odd buffers


def unaligned(x: Tensor) -> Tensor:
    """The same numbers one byte past the beginning of an allocation."""
    kind = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.int64}[x.element_size()]
    memory = np.frombuffer(bytearray(1 + x.numel() * x.element_size()), dtype=kind, count=x.numel(), offset=1)
    y = torch.from_numpy(memory)
    y = (y.view(x.dtype) if x.element_size() == 2 else y).view(x.shape)
    return y.copy_(x)


def wider(x: Tensor) -> Tensor:
    """The last dimension in the middle of longer rows."""
    out = x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)[..., 2:-3]
    return out.copy_(x)


def every_second(x: Tensor) -> Tensor:
    """Strided along dim 0, where a row operation allows any stride."""
    out = x.new_zeros(2 * x.shape[0], *x.shape[1:])[::2]
    return out.copy_(x)


def freed(x: Tensor) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(max(0, y.untyped_storage().nbytes() - 1))
    return y


RIGHT = (lambda x: x, unaligned, wider, every_second)
WRONG = (
    lambda x: x[: x.shape[0] - 1].clone(),  # fewer rows, or a vector that is too short
    lambda x: x[..., : x.shape[-1] - 1].clone(),
    lambda x: x[None].clone(),
    lambda x: x.reshape(-1)[:1].reshape(()).clone(),
    lambda x: x.to(torch.uint8),
    lambda x: x.to(torch.complex64),
    lambda x: x.to("meta"),
    freed,
    lambda x: x.double() if x.is_floating_point() else x.to(torch.int32),  # last: a bias is converted
)


@dataclass
class Call:
    """The buffers of a call by name; what is None is not there."""

    buffers: dict[str, Tensor | None]
    vocab: int
    options: dict[str, Any]
    transforms: dict[str, LogitTransform]

    def run(self, op: str) -> list[Tensor]:
        b = self.buffers
        models = {}
        for name in ("student", "teacher", "ref"):
            bias = b[f"the bias of {name}"]
            models[name] = None if b[name] is None else ModelRows(b[name], replace(self.transforms[name], bias=bias))
        options = dict(self.options)
        if b["forward_weight"] is not None:
            options["divergence"] = Mixed(b["forward_weight"])
        if b["reward_scale"] is not None:
            options["reward_scale"] = b["reward_scale"]
        problem = RowProblem(self.vocab, **models, token_ids=b["token_ids"], **options)
        weights, ops, out = (
            GradientWeights(b["weights.divergence"], b["weights.token"], self.policy()),
            native.NativeRowOps(),
            b["out"],
        )
        if op == "statistics":
            return [ops.statistics(problem)]
        if op == "policy":
            policy = self.policy()
            assert policy is not None
            return [ops.policy(policy, b["statistics"])]
        if op == "losses":
            has = b["teacher"] is not None, b["ref"] is not None
            return [ops.losses(options["divergence"], options["reward_scale"], has, b["statistics"])]
        if op == "second_round":
            return [ops.second_round(problem, b["statistics"])]
        results = [ops.statistics_and_gradient(problem, weights, out)] if op == "statistics_and_gradient" else []
        if op == "gradient":
            ops.gradient(problem, b["statistics"], weights, out)
        return [*results, out[:, : self.vocab].clone()]

    def policy(self) -> Policy | None:
        b = self.buffers
        if b["the policy's teacher"] is None:
            return None
        scale = b["the policy's reward_scale"]
        return Policy(
            RULES[0] if b["old_logprobs"] is None else RULES[1],
            1.25 if scale is None else scale,
            b["the policy's teacher"],
            b["the policy's ref"],
            b["old_logprobs"],
            b["rollout_logprobs"],
        )


RULES = (PolicyRule(), PolicyRule(-20.0, (-2.0, 2.0), (0.2, 0.2), 3.0, 5.0))
DIVERGENCES = (
    None,
    *(make_divergence(name) for name in ("reverse_kl", "forward_kl", "mixed")),
    *(make_divergence("jsd", beta=beta) for beta in (0.5, 0.1, 1e-4)),
    *(make_divergence(name, skew=skew) for name in ("skew_kl", "skew_reverse_kl") for skew in (0.1, 0.9999)),
    *(make_divergence("alpha", alpha=alpha) for alpha in (-0.5, 1e-6, 0.3, 2.0)),
)
POLICY = {
    "the policy's teacher", "the policy's ref", "the policy's reward_scale", "old_logprobs", "rollout_logprobs"
}  # fmt: skip
DIVERGENCE = {"reward_scale", "forward_weight"}
READ = {
    "statistics": DIVERGENCE,
    "second_round": {"statistics", *DIVERGENCE},
    "policy": {"statistics", *POLICY},
    "losses": {"statistics", *DIVERGENCE},
    "gradient": {"statistics", "weights.divergence", "weights.token", "out", *DIVERGENCE, *POLICY},
    "statistics_and_gradient": {"weights.divergence", "weights.token", "out", *DIVERGENCE, *POLICY},
}
PER_TOKEN = ("policy", "losses")  # what no operation names, models and token ids, is read by all but by these


def make(draw: random.Random) -> tuple[str, Call]:
    op = draw.choice(list(READ))
    rows, vocab = draw.choice((1, 2, 5)), draw.choice((1, 2, 7, 16, 33, 200, 1030, 2144))
    fitting = [x for x in DIVERGENCES if op != "second_round" or (x is not None and x.second_round)]
    divergence = draw.choice([x for x in fitting if op != "losses" or x is not None])
    joint = divergence is not None
    there = {"student": True, "teacher": joint, "ref": joint}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    options: dict[str, Any] = {"divergence": divergence}
    buffers: dict[str, Tensor | None] = {}
    transforms = {}
    for name, is_there in there.items():
        buffers[name] = torch.randn(rows, vocab).mul_(3).to(draw.choice(dtypes)) if is_there else None
        has_bias = is_there and draw.random() < 0.3
        buffers[f"the bias of {name}"] = torch.randn(vocab) if has_bias else None
        transforms[name] = LogitTransform(softcap=draw.choice((None, 8.0)), temperature=draw.choice((1.0, 0.7)))
    per_token = isinstance(divergence, Mixed) and draw.random() < 0.5
    buffers["forward_weight"] = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75])[:rows].clone() if per_token else None
    scales = joint and (op == "losses" or draw.random() < 0.4)  # which also says how many tokens there are
    buffers["reward_scale"] = torch.tensor([0.0, 1.0, 1.25, 0.5, 2.0])[:rows].clone() if scales else None
    options["reward_scale"] = draw.choice((1.25, 0.5))
    buffers["token_ids"] = torch.tensor([0, -1, vocab - 1, vocab, 2**62])[:rows].clone()
    buffers["weights.divergence"] = torch.randn(rows) if draw.random() < 0.8 else None
    buffers["weights.token"] = torch.randn(rows) if draw.random() < 0.8 else None
    buffers["out"] = torch.zeros(rows, vocab, dtype=draw.choice(dtypes))
    buffers |= dict.fromkeys(POLICY)
    if op == "policy" or ("weights.token" in READ[op] and draw.random() < 0.5):
        both = draw.random() < 0.5
        buffers["the policy's teacher"] = -torch.rand(len(Stat), rows)
        buffers["the policy's ref"] = -torch.rand(len(Stat), rows) if both else None
        buffers["the policy's reward_scale"] = torch.rand(rows) if both and draw.random() < 0.5 else None
        for name in ("old_logprobs", "rollout_logprobs"):
            buffers[name] = -torch.rand(rows) if draw.random() < 0.5 else None
    plain = Call(buffers, vocab, options, transforms)
    buffers["statistics"] = plain.run("statistics")[0] if "statistics" in READ[op] else None
    return op, plain


def main(library: str, calls: int, isa: str) -> None:
    shim = Shim(library, isa)
    native._load = lambda: shim
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(calls):
        op, plain = make(draw)
        want = plain.run(op)
        odd = {name: None if x is None else draw.choice(RIGHT)(x.clone()) for name, x in plain.buffers.items()}
        native._STREAM_BYTES = draw.choice((1, 1 << 24))
        got = replace(plain, buffers=dict(odd)).run(op)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{op} gives other bits for odd buffers: {plain}"
        given = [name for name, x in plain.buffers.items() if x is not None]
        of_all = op not in PER_TOKEN
        unnamed = {name for name in given if of_all and not any(name in x for x in READ.values())}
        name = draw.choice([name for name in given if name in READ[op] or name in unnamed])
        change = draw.choice(WRONG[:-1] if name.startswith("the bias") else WRONG)
        x = change(plain.buffers[name])
        try:
            replace(plain, buffers=odd | {name: x}).run(op)
        except (TypeError, ValueError) as error:
            # a student of other rows makes all others wrong, and so do statistics where there is none
            first = "student" if of_all else "statistics"
            assert name in str(error) or name == first, f"the error does not name {name}: {error}"  # noqa: PT017
        else:
            right = plain.buffers[name]
            raise AssertionError(f"{op} took {name} {x.dtype} {tuple(x.shape)} for {right.dtype} {tuple(right.shape)}")
    print(f"{isa}: {calls} calls")


if __name__ == "__main__":
    for each in sys.argv[3:]:
        main(sys.argv[1], int(sys.argv[2]), each)
