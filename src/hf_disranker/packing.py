"""Which rows share a forward pass and what they share in it, and what is made ready while another pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

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


def runs_within(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut rows, in their order, into batches of at most `token_budget` tokens and the rest of one row.

    Args:
        lengths: tokens of each row, shape (rows,).
        token_budget: of a batch, before what its rows share is counted once.

    Returns:
        Row numbers, an array per batch; every row once.
    """
    number = (np.cumsum(lengths) - lengths) // token_budget
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(number)) + 1) if len(lengths) else []


@dataclass
class Packed:
    """Rows end to end, without padding, where the rows of a group store their common beginning once.

    Args:
        input_ids: shape (1, tokens).
        position_ids: of each token in its row, shape (1, tokens).
        groups: for each group its beginning and its rows' remainders, as slices of the tokens.
        last: place of each row's last token, shape (rows,).
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: list[tuple[slice, list[slice]]]
    last: Tensor


def pack(rows: list[list[int]], keys: list[Any]) -> Packed:
    """Pack rows of token ids; neighbours with equal keys are a group."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[tuple[slice, list[slice]]] = []

    def put(part: list[int], position: int) -> slice:
        tokens.extend(part)
        positions.extend(range(position, position + len(part)))
        return slice(len(tokens) - len(part), len(tokens))

    for _, places in groupby(range(len(rows)), key=lambda place: keys[place]):
        group = [rows[place] for place in places]
        # commonprefix compares sequences of anything, not only paths.
        shared = min(len(commonprefix(group)), min(map(len, group)) - 1)  # each row keeps its last token
        beginning = put(group[0][:shared], 0)
        groups.append((beginning, [put(row[shared:], shared) for row in group]))
    last = torch.tensor([row.stop - 1 for _, remainders in groups for row in remainders])
    return Packed(torch.tensor([tokens]), torch.tensor([positions]), groups, last)


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention over `kwargs["packed"]`: each row sees its group's beginning and itself.

    Query of shape (1, heads, tokens, size); key and value may have fewer heads. Gives (1, tokens, heads, size).
    """
    output = torch.empty_like(query)
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for start, remainders in kwargs["packed"].groups:
        first_keys, first_values = key[:, :, start], value[:, :, start]
        if start.stop > start.start:
            output[:, :, start] = scaled_dot_product_attention(
                query[:, :, start], first_keys, first_values, is_causal=True, **options
            )
        for row in remainders:
            keys = torch.cat([first_keys, key[:, :, row]], dim=2)
            values = torch.cat([first_values, value[:, :, row]], dim=2)
            length, seen = row.stop - row.start, keys.shape[2]
            mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
            output[:, :, row] = scaled_dot_product_attention(query[:, :, row], keys, values, mask, **options)
    return output.transpose(1, 2), None


PACKED = "disranker_packed"
AttentionInterface.register(PACKED, _packed_attention)
