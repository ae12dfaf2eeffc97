"""Recovery from out-of-memory errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size

Row = TypeVar("Row")


def score_in_halves(
    score: Callable[[Sequence[Row]], np.ndarray], rows: Sequence[Row], reduce: Callable[[Sequence[Row]], None]
) -> np.ndarray:
    """Score rows together, or in halves if they do not fit into memory.

    Args:
        score: Scores a batch, shape (rows,).
        rows: Rows of the batch.
        reduce: Called with the rows that did not fit, to make later batches smaller.

    Returns:
        Scores of shape (len(rows),).

    Raises:
        RuntimeError: If a single row does not fit, or for any other error of the forward pass.
    """
    try:
        return score(rows)
    except RuntimeError as error:
        if len(rows) == 1 or not should_reduce_batch_size(error):
            raise
    # Outside the handler, whose traceback keeps the tensors of the failed pass alive.
    torch.cuda.empty_cache()
    reduce(rows)
    half = len(rows) // 2
    return np.concatenate([score_in_halves(score, part, reduce) for part in (rows[:half], rows[half:])])
