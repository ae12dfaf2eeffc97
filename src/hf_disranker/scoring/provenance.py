"""Provenance of scores: digests of weights and tokenizer, and the config fields that affect a score."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_disranker.models.families import MARKER

# Paths, versions and names, fields with a key of their own (dtype), and switches that affect only memory or outputs.
# The attention implementation, which `to_dict` omits, changes a score by rounding at most, as versions do.
_IRRELEVANT = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_IRRELEVANT |= {"id2label", "label2id", "problem_type", "sentence_transformers"}
_IRRELEVANT |= {"initializer_range", "output_attentions", "output_hidden_states", "return_dict"}
# Marker fields with a key of their own (templates, limits), or about training.
_MARKER_IRRELEVANT = {"format", "templates", "max_length", "max_query_length", "score_transform", "teacher"}


def describe_model(model: torch.nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Describe a model for a manifest: SHA-256 of the weights, config, dtype, and the revision as a hint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "revision": getattr(config, "_commit_hash", None),
        "weights": digest.hexdigest(),
        "config": _relevant_config(config),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _relevant_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config fields that can change a score and differ from their defaults.

    Defaults are left out, so that a field added by a later version of transformers is not a difference.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in _IRRELEVANT and key[0] != "_"}
    if MARKER in fields:
        fields[MARKER] = {key: value for key, value in fields[MARKER].items() if key not in _MARKER_IRRELEVANT}
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()
    defaults.pop("model_type", None)  # Llama and Mistral give their weights the same names
    return _plain({key: value for key, value in fields.items() if key not in defaults or value != defaults[key]})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, *more: Any) -> str:
    """Return the SHA-256 of everything that maps text to ids, and of further data such as a chat template.

    Truncation and padding of a fast tokenizer, which calls set, are left out.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        backend = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    names = ("padding_side", "truncation_side", "model_input_names")
    whole = [backend, _plain(tokenizer.special_tokens_map), [getattr(tokenizer, name) for name in names], *more]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def describe_module(module: Any) -> list[Any]:
    """Describe a module of sentence-transformers; config and tokenizer of its model are described separately."""
    from sentence_transformers.base.modules import Transformer

    if isinstance(module, Transformer):
        return [type(module).__name__, _plain(module.processing_kwargs)]
    return [type(module).__name__, _plain(getattr(module, "get_config_dict", dict)())]


def _plain(content: Any) -> Any:
    """Convert to what json reads back, so that stored and current values compare."""
    return json.loads(json.dumps(content, default=str))


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: version(package) for package in packages}
