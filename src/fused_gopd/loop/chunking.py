"""How many tokens a chunk has: a memory budget for its logits buffers.

Sizes depend on shapes, dtypes and the kind of device only, never on free memory or a timing: two runs give the same
bits.
"""

from __future__ import annotations

# Bytes for all the logits buffers of a chunk together.
# CPU: at V = 151936 256 MiB give chunks of 432 tokens with one buffer and of 144 with three.
# GPU: 1.75 GiB give 2048 tokens at V = 151936 and three models, where adding to the weight's gradient takes no longer
# than its product (C / 4 FLOP per byte).
CHUNK_BUDGET_BYTES = {"cpu": 256 << 20, "gpu": 1792 << 20}
# Tokens per chunk for which a budget is exceeded, up to twice of it. On a CPU every chunk reads all weights, and reads
# and writes the weight's gradient: on a Zen 4 core `full` takes 1.06 to 1.11 times the bare products with chunks of 128
# tokens, 1.00 to 1.02 times with 256 or 512, and more cores share the same memory. At V = 151936 and three models that
# is 256 tokens and 445 MiB.
ENOUGH_TOKENS = {"cpu": 256, "gpu": 0}
# The budget of a GPU for logits in 16 bits, which need less for chunks of more tokens.
LOW_PRECISION_BUDGET_BYTES = 1440 << 20
# Never fewer tokens than this by default, whatever the budget.
CHUNK_FLOOR = {"cpu": 32, "gpu": 1024}
# More tokens than this make no GEMM faster.
CHUNK_CEILING = 8192
# If the row operation needs all models together, teacher and reference have this many times fewer tokens in their
# buffers than the student's chunk has. The memory goes to the chunk, whose length decides how often the weight's
# gradient is read and written; where the weight has none, all chunks are alike. On an H200 that is 2 % faster at
# H = 2048 and 4096, on two AVX-512 cores 6 to 12 % slower.
FROZEN_CHUNK_DIVISOR = {"cpu": 1, "gpu": 4}
# Elements of a block of the weight, and of the buffer that a low-precision one is widened into. 2^20 float32 are 4 MiB.
# On two AVX-512 cores with MKL blocks of 2^18 to 2^23 elements differed by less than 10 %, at 1.13 to 1.19 times the
# time of a float32 weight; with oneDNN on two Zen 5 cores 2^20 and 2^21 were the best, 2^24 two thirds as fast.
BLOCK_ELEMENTS = 1 << 20
# Chunks are whole tiles of the products where they can be.
_CHUNK_MULTIPLE = {"cpu": 16, "gpu": 256}
# Elements that the row stride of a logits buffer is a multiple of: 64 bytes of float32, or 32 of bfloat16 in its place.
_STRIDE_MULTIPLE = 16


def _kind(device_type: str) -> str:
    return "cpu" if device_type == "cpu" else "gpu"


def _rounded_up(tokens: int, parts: int, device_type: str) -> int:
    """A share of the tokens, in whole tiles."""
    multiple = _CHUNK_MULTIPLE[_kind(device_type)]
    return -(-tokens // (parts * multiple)) * multiple


def chunk_size_for(vocab_size: int, buffers: float, device_type: str, element_bytes: int = 4) -> int:
    """Tokens per chunk for a number of [C, V] logits buffers."""
    kind = _kind(device_type)
    budget = LOW_PRECISION_BUDGET_BYTES if element_bytes < 4 else CHUNK_BUDGET_BYTES[kind]
    per_token = max(1.0, buffers * vocab_size * element_bytes)
    fitting = int(budget / per_token)
    fitting = max(fitting, min(ENOUGH_TOKENS[kind], int(2 * budget / per_token)))
    fitting -= fitting % _CHUNK_MULTIPLE[kind]
    return min(CHUNK_CEILING, max(CHUNK_FLOOR[kind], fitting))


def frozen_chunk_size(chunk_size: int, device_type: str) -> int:
    """Tokens per sub-chunk: the size of the frozen models' buffers while the student's whole chunk is in memory."""
    return min(chunk_size, _rounded_up(chunk_size, FROZEN_CHUNK_DIVISOR[_kind(device_type)], device_type))


def logits_buffers(
    joint: bool,
    linear_models: int,
    keeps_student_logits: bool = False,
    weight_gradient: bool = True,
    device_type: str = "cpu",
) -> float:
    """Number of [C, V] logits buffers alive at once.

    One per model if the row operation needs all models together (``joint``), of which those of the frozen models are
    smaller by ``FROZEN_CHUNK_DIVISOR`` where the student's weight has a gradient. Otherwise one, reused by every model,
    or two where the student's logits are kept while a frozen model is scored.
    """
    if not joint:
        return min(2 if keeps_student_logits else 1, linear_models)
    if not weight_gradient:
        return linear_models
    return 1 + (linear_models - 1) / FROZEN_CHUNK_DIVISOR[_kind(device_type)]


def balanced(tokens: int, chunk_size: int, device_type: str) -> int:
    """The chunk size that gives as many chunks of nearly equal length: 1040 tokens are not split into 1024 and 16."""
    if tokens <= chunk_size:
        return max(1, tokens)
    chunks = -(-tokens // chunk_size)
    return min(chunk_size, _rounded_up(tokens, chunks, device_type))


def row_stride(vocab_size: int) -> int:
    """Elements between two rows of a logits buffer: rows start on aligned addresses, for loads of whole vectors."""
    return -(-vocab_size // _STRIDE_MULTIPLE) * _STRIDE_MULTIPLE
