"""What a scorer is given: ids, attention mask and completion mask of a batch."""

from __future__ import annotations

from torch import Tensor

from ..checks import require_integer, require_mask


def sequences_to_score(
    input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """What a scorer sends of a batch: sequences without padding, and which of their tokens it wants scored.

    Tokens after the last one to score are left out, because they do not affect its log-prob, and so are sequences
    without one to score.

    Returns:
        completion_mask as bool (B, K) on the CPU; for each sequence with a token to score, in their order, its ids, and
        the positions of these tokens in it. These positions one after another are the mask's ones in row-major order.
    """
    _require_masks(input_ids, attention_mask, completion_mask)
    mask, attended = completion_mask.bool().cpu(), attention_mask.bool().cpu()
    ids = input_ids.cpu()
    # (B, K) position of each of the last K tokens in its sequence without padding
    place = (attended.cumsum(1) - 1)[:, ids.shape[1] - mask.shape[1] :]
    rows = mask.any(1).nonzero().flatten().tolist()
    wanted = [place[row][mask[row]].tolist() for row in rows]
    for row, positions in zip(rows, wanted, strict=True):
        if positions[0] == 0:
            raise ValueError(
                f"completion_mask wants the first token of sequence {row}, which nothing predicts: "
                "begin the sequence with a prompt, or a beginning-of-sequence token"
            )
    sequences = [ids[row][attended[row]][: w[-1] + 1].tolist() for row, w in zip(rows, wanted, strict=True)]
    return mask, sequences, wanted


def _require_masks(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> None:
    """Raise unless ids and mask are (B, T), and the completion mask (B, K) wants no padding."""
    require_integer("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
    rows, length = input_ids.shape
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{tuple(attention_mask.shape)}"
        )
    if completion_mask.ndim != 2 or completion_mask.shape[0] != rows or completion_mask.shape[1] > length:
        raise ValueError(
            f"completion_mask must have shape ({rows}, K) with K of at most {length}, for the last K tokens of "
            f"input_ids, got {tuple(completion_mask.shape)}"
        )
    attended, wanted = require_mask("attention_mask", attention_mask), require_mask("completion_mask", completion_mask)
    if bool((wanted & ~attended[:, length - completion_mask.shape[1] :]).any()):
        raise ValueError("completion_mask must be 0 where attention_mask is 0: a token is wanted that is padding")
