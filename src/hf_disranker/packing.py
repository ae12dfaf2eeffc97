"""Which rows share a forward pass, and what is made ready while another pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`map`, with the next result made in a thread while the caller works with the one before."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            coming = thread.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def budget_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut rows, longest first, into batches that hold at most `token_budget` tokens with their padding.

    Sorting by length leaves almost no padding; the longest first shows at once whether the memory suffices.

    Args:
        lengths: tokens of each row, shape (rows,).
        token_budget: rows times longest row of a batch; a longer row gets a batch of its own.

    Returns:
        Row numbers, an array per batch; every row once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
