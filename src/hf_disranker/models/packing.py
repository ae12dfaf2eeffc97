"""Batches without padding: concatenated rows, and attention within each row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass
class Unpadded:
    """Rows of a padded batch, concatenated without padding, longest first.

    Attributes:
        tokens: Index of each token in the flattened batch of shape (rows, longest), shape (tokens,).
        positions: Position of each token in its row, shape (tokens,).
        runs: (rows, length) of consecutive rows of equal length, which attend as one tensor without a mask.
        first: Index of each row's first token in `tokens`, shape (rows,).
        order: Row number in the batch, shape (rows,).
    """

    tokens: Tensor
    positions: Tensor
    runs: list[tuple[int, int]]
    first: Tensor
    order: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> Unpadded:
        """Read the rows of a padded batch.

        Args:
            attention_mask: 1 for tokens, 0 for padding on the right, shape (rows, longest); no row is empty.
        """
        lengths = attention_mask.bool().sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        row, position = attention_mask[order].nonzero(as_tuple=True)
        length, count = torch.unique_consecutive(lengths[order], return_counts=True)
        return cls(
            tokens=order[row] * attention_mask.shape[1] + position,
            positions=position,
            runs=list(zip(count.tolist(), length.tolist(), strict=True)),
            first=lengths[order].cumsum(dim=0) - lengths[order],
            order=order,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int, drop: float = 0.0) -> Tensor:
        """Compute the attention of each token to all tokens of its row.

        By matrix products: on CPU they are faster than the fused kernel for texts of some 100 tokens, above all in the
        backward pass.

        Args:
            query: Shape (tokens, size), or (rows, size) for one token of each row.
            key: Shape (tokens, size).
            value: Shape (tokens, size).
            heads: Number of attention heads.
            drop: Dropout probability of the attention weights.

        Returns:
            Shape of `query`.
        """
        tokens = [rows * length for rows, length in self.runs]
        asking = tokens if len(query) == len(key) else [rows for rows, _ in self.runs]
        output = []
        parts = zip(self.runs, query.split(asking), key.split(tokens), value.split(tokens), strict=True)
        for (rows, _), *part in parts:
            asks, keys, values = (x.view(rows, -1, heads, x.shape[1] // heads).transpose(1, 2) for x in part)
            weights = (asks @ keys.transpose(2, 3) * asks.shape[3] ** -0.5).softmax(dim=3)
            mixed = dropout(weights, drop, training=drop > 0) @ values
            output.append(mixed.transpose(1, 2).reshape(-1, query.shape[1]))
        return torch.cat(output)


@dataclass
class Packed:
    """Concatenated rows without padding; the rows of a group share the tokens of their common prefix.

    Args:
        input_ids: Shape (1, tokens).
        position_ids: Position of each token in its row, shape (1, tokens).
        groups: For each group its prefix and its rows' remainders, as slices of the tokens.
        last: Index of each row's last token, shape (rows,).
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: list[tuple[slice, list[slice]]]
    last: Tensor


def pack(rows: list[list[int]], keys: list[Any]) -> Packed:
    """Pack rows of token ids; consecutive rows with equal keys are a group."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[tuple[slice, list[slice]]] = []

    def put(part: list[int], position: int) -> slice:
        tokens.extend(part)
        positions.extend(range(position, position + len(part)))
        return slice(len(tokens) - len(part), len(tokens))

    for _, places in groupby(range(len(rows)), key=lambda place: keys[place]):
        group = [rows[place] for place in places]
        # commonprefix accepts any sequences, not only paths.
        shared = min(len(commonprefix(group)), min(map(len, group)) - 1)  # each row keeps its last token
        prefix = put(group[0][:shared], 0)
        groups.append((prefix, [put(row[shared:], shared) for row in group]))
    last = torch.tensor([row.stop - 1 for _, remainders in groups for row in remainders])
    return Packed(torch.tensor([tokens]), torch.tensor([positions]), groups, last)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Apply sdpa; with the keyword `packed`, let each row attend to its group's prefix and itself."""
    if kwargs.get("packed") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _packed_attention(query, key, value, kwargs["packed"], kwargs["scaling"]), None


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float) -> Tensor:
    """Compute the causal attention of packed rows.

    Query has shape (1, heads, tokens, size); key and value may have fewer heads. Returns (1, tokens, heads, size).
    """
    output = torch.empty_like(query)
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for start, remainders in packed.groups:
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
    return output.transpose(1, 2)


# Equal to sdpa for ordinary batches; packed rows are passed by the keyword `packed`, so that no call changes the model
# and threads can share it.
PACKED = "disranker_packed"
# Decoders whose layers pass unknown keywords to plain causal attention.
PACKABLE = ("llama", "mistral", "qwen2", "qwen3")
AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
