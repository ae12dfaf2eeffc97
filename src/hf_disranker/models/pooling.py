"""Which hidden state stands for a text."""

from __future__ import annotations

import torch
from torch import Tensor


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The hidden state of each row's last real token.

    It goes by the attention mask, not by the padding id: left padding, right padding and a padding id that is also
    the end-of-sequence id all give the same state.

    Args:
        hidden: shape (rows, tokens, size).
        attention_mask: 1 for real tokens, shape (rows, tokens); None when there is no padding.

    Returns:
        Shape (rows, size).

    Examples:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        >>> last_token(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]]))  # padded on the right, padded on the left
        tensor([[2.],
                [6.]])
    """
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(attention_mask.shape[1], device=hidden.device)
    last = (attention_mask.to(torch.bool) * (places + 1)).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
