"""Provenance of a score: digests of a teacher's weights and tokenizer, and the config fields that decide a score."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_disranker.models.checkpoint import MARKER

# Paths, versions and names, what is recorded by itself (dtype), and switches that change memory or outputs alone.
# The attention implementation changes a score by rounding at most, as versions do, and `to_dict` leaves it out.
_NO_MATTER = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_NO_MATTER |= {"id2label", "label2id", "problem_type", "sentence_transformers"}
_NO_MATTER |= {"initializer_range", "output_attentions", "output_hidden_states", "return_dict"}
# Of the marker: recorded by itself (templates, limits), or about the training.
_MARKER_NO_MATTER = {"format", "templates", "max_length", "max_query_length", "score_transform", "teacher"}


def of_model(model: torch.nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """What of a model decides its scores, for a manifest: weights, config and dtype, and the revision as a hint."""
    return {
        "revision": getattr(config, "_commit_hash", None),
        "weights": weights_digest(model),
        "config": deciding_config(config),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def of_module(module: Any) -> list[Any]:
    """What a module of sentence-transformers does; of the model's own, what its config and tokenizer do not say."""
    if isinstance(module, Transformer):
        return [type(module).__name__, _plain(module.processing_kwargs)]
    return [type(module).__name__, _plain(getattr(module, "get_config_dict", dict)())]


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, *more: Any) -> str:
    """SHA-256 over all that turns a text into ids: vocabulary, normalizer, post-processor, special tokens, sides.

    Args:
        tokenizer: fast or slow; limits and padding, which calls set, do not count.
        more: further json-friendly data that decides the ids, such as a chat template.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend |= {"truncation": None, "padding": None}
    else:
        backend = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    names = ("padding_side", "truncation_side", "model_input_names")
    whole = [backend, _plain(tokenizer.special_tokens_map), [getattr(tokenizer, name) for name in names], *more]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def deciding_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that can change a score and are not at their defaults, as json-friendly data.

    Without defaults, a field that a later transformers adds is no difference.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in _NO_MATTER and key[0] != "_"}
    if MARKER in fields:
        marker = fields[MARKER]
        fields[MARKER] = {key: marker[key] for key in marker if key not in _MARKER_NO_MATTER}
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()
    defaults.pop("model_type", None)  # Llama and Mistral give their weights the same names
    return _plain({key: value for key, value in fields.items() if key not in defaults or value != defaults[key]})


def _plain(content: Any) -> Any:
    """As json gives it back, so that what was read compares with what is in memory."""
    return json.loads(json.dumps(content, default=str))
