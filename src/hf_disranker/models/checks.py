"""Checks of loaded models: weights, vocabulary and positions."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_disranker.models.families import classifiers, is_decoder, is_encoder

# Least share of the embedding rows that a tokenizer must cover: rows are padded up by a few percent at most.
_KNOWN_ROWS = 0.75


def check_weights(name: str | os.PathLike, info: dict[str, Any], base: str | None = None) -> None:
    """Check that nothing but a new head, its pooler included, starts from random weights.

    Args:
        name: Checkpoint, for the message.
        info: Loading info of `from_pretrained(..., output_loading_info=True)`.
        base: Name of the base model, outside of which weights may be new; None if none may.

    Raises:
        ValueError: If other weights are missing.
    """
    # Many encoders are pre-trained without a pooler, which the stock classes have in the base model.
    new = re.compile(rf"(?!{base}\.)|{base}\.pooler\.") if base else None
    missing = sorted(key for key in info["missing_keys"] if new is None or not new.match(key))
    if missing:
        unexpected = sorted(info["unexpected_keys"])
        hint = f" It has others, such as {unexpected[0]}: rename its keys if they have a prefix." if unexpected else ""
        raise ValueError(
            f"{name} lacks {len(missing)} weights of the model, such as {missing[0]}, which would start at random."
            f"{hint}"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer fits a model's embeddings.

    A decoder may lack embeddings for tokens that were added to its vocabulary later.

    Raises:
        ValueError: If token ids exceed the embeddings, or most embeddings have no token.
    """
    rows = model.get_input_embeddings().num_embeddings
    added = not is_decoder(model.config.model_type)
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=added).values()
    name = f"{tokenizer.name_or_path or model.config.name_or_path}: the tokenizer"
    if max(ids, default=-1) >= rows:
        raise ValueError(
            f"{name} produces token ids up to {max(ids)}, the model has embeddings for {rows} tokens: it belongs to "
            "another model, or the embeddings were not resized."
        )
    if len(tokenizer) < _KNOWN_ROWS * rows:
        raise ValueError(
            f"{name} has {len(tokenizer)} tokens, the model has embeddings for {rows}: the tokenizer's files are "
            "missing or those of another model. Copy them from the model that this one was made from."
        )


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raise ValueError if a limit on the input exceeds the model's positions."""
    positions = position_limit(config)
    if positions is not None and max_length > positions:
        name = config.name_or_path or f"the {config.model_type} model"
        raise ValueError(f"max_length {max_length} is beyond the {positions} positions of {name}: choose {positions}.")


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the model's positions; None if its rotary positions are scaled or its config names no limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    scaled = any(kind.get("rope_type", "default") != "default" for kind in kinds)
    positions = getattr(config, "max_position_embeddings", None)
    return None if scaled or positions is None else positions - _reserved_positions(config)


def _reserved_positions(config: PreTrainedConfig) -> int:
    """Return the positions up to the padding id, which no token has in RoBERTa and its relatives."""
    if not is_encoder(config.model_type):
        return 0
    stock: Any = getattr(transformers, classifiers()[config.model_type])
    with torch.device("meta"):
        model = stock(copy.deepcopy(config))
    layers = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    return max([layer.padding_idx + 1 for layer in layers if getattr(layer, "padding_idx", None) is not None] or [0])
