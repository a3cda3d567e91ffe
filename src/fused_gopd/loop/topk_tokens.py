"""The most likely tokens of a model, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..rowops import sparse
from . import gemm
from .buffers import Buffers, with_gemm_dtype_weights
from .estimators.base import LogProbs
from .run import chunks, no_statistics
from .vocab_parallel import local_ids, require_agreement, statistics_of, topk_ids


@gemm.in_own_precision
def topk_tokens(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs, token shape + (k,), of the student's k most likely tokens; -1 and 0 where masked."""
    require_agreement(problem, k=k)
    problem = with_gemm_dtype_weights(problem)
    rows, student = problem.rows, problem.student
    shape = (rows.shape.numel(), k)
    ids = torch.full(shape, -1, dtype=torch.int64, device=problem.device)
    logprobs = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
    estimator = LogProbs(problem)
    for chunk in chunks(Buffers(problem), no_statistics(estimator)):
        row_problem = estimator.load(chunk).row_problem
        largest = topk_ids(student, row_problem.student, row_problem.vocab_size, k)
        logits = sparse.logits_at(row_problem.student, local_ids(student.shard, largest))
        statistics, (merged,) = statistics_of(problem.ops, student.shard, row_problem, logits.T)
        rows.put(ids, largest, chunk.start, chunk.stop)
        rows.put(logprobs, sparse.logprobs(statistics, merged.T), chunk.start, chunk.stop)
    return ids.reshape(*rows.shape, k), logprobs.reshape(*rows.shape, k)
