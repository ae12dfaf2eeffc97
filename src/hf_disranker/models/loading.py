"""Loading of rankers: choose the class, refuse checkpoints without a ranking head, fit the tokenizer."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from hf_disranker.data.templates import Templates
from hf_disranker.models.checkpoint import (
    RankerConfigMixin,
    hub_options,
    load_config,
    load_tokenizer,
    load_weights,
)
from hf_disranker.models.checks import check_vocabulary, check_weights
from hf_disranker.models.families import is_decoder, is_encoder
from hf_disranker.models.packing import parameters
from hf_disranker.models.student import DistilledRanker
from hf_disranker.models.teacher import LLMForLastTokenRanking, fit_embeddings, prepare_tokenizer

RankerModel = DistilledRanker | LLMForLastTokenRanking
# Found in chat templates that render a pair: sentence-transformers' role for the document.
_PAIR_ROLE = re.compile(r"""["']document["']""")


def ranker_class(model_type: str) -> Any:
    """Return the ranker class of a family: a student of encoders, a teacher of decoders.

    Raises:
        ValueError: If the family is not supported.
    """
    for role in (DistilledRanker, LLMForLastTokenRanking):
        if role.supports(model_type):
            return role.family_class(model_type)
    raise ValueError(
        f"A {model_type} model cannot be a ranker: transformers has no encoder and no decoder of this type "
        "with a sequence-classification head."
    )


def is_ranker(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint loads as a ranker: marked, or a stock sequence classifier of a supported family."""
    supported = is_encoder(config.model_type) or is_decoder(config.model_type)
    return isinstance(config, RankerConfigMixin) or (supported and is_classifier(config))


def is_classifier(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint names a stock sequence classifier as its architecture."""
    return _architecture(config).endswith("ForSequenceClassification")


def load_ranker_model(
    name: str | os.PathLike,
    *,
    config: PreTrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_head: bool = False,
    **options: Any,
) -> tuple[RankerModel, PreTrainedTokenizerBase]:
    """Load a student or a teacher with its tokenizer, fitted to each other.

    Args:
        name: Folder or Hub id.
        config: Config to use in place of the checkpoint's.
        tokenizer: Tokenizer to copy in place of the checkpoint's.
        new_head: If True, a missing ranking head is initialised, for training.
        options: Keywords of `from_pretrained`, such as `dtype`, `attn_implementation` and those of `hub_options`.

    Raises:
        OSError: If there is no such folder or Hub repository, or the weights are pickles or damaged.
        ValueError: If the family is not supported, weights or the head are missing, or the tokenizer does not fit.
    """
    hub = hub_options(options)
    kind = ranker_class((config or load_config(name, **hub)).model_type)
    model, info = kind.from_pretrained(name, config=config, output_loading_info=True, **options)
    if info["missing_keys"] and not new_head:
        stage, hint = "distill", ""
        if model.role == "teacher":
            stage, hint = "fit_teacher", ", or load it with likelihood=True to score without one"
        raise ValueError(
            f"{name} is not a trained ranker: it lacks {sorted(info['missing_keys'])[:4]}, the ranking head; "
            f"`disranker {stage}` trains one{hint}."
        )
    tokenizer = load_tokenizer(name, **hub) if tokenizer is None else copy.deepcopy(tokenizer)
    return model, fit_tokenizer(model, tokenizer)


def with_text_template(config: PreTrainedConfig, text: str) -> PreTrainedConfig:
    """Return the config of a teacher that reads another text; pass it to `load_ranker_model`.

    Args:
        config: Config of a decoder.
        text: Template with the fields `query` and `document`, in any order (`Templates.text`).

    Raises:
        ValueError: If the template is invalid, or the family consists of encoders, which read pairs.
    """
    if not is_decoder(config.model_type):
        raise ValueError(f"A text template is for a decoder; a {config.model_type} reads a query and a document.")
    config = copy.deepcopy(config)
    if isinstance(config, RankerConfigMixin):
        config.update_marker(templates=replace(config.marker.templates, text=text))
    else:  # as a language model after continued pre-training says it
        config.click_templates = Templates(text=text).to_dict()
    return config


def load_language_model(name: str | os.PathLike, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with its tokenizer; arguments and errors as in `load_ranker_model`."""
    model, info = load_weights(AutoModelForCausalLM.from_pretrained, name, **options)
    check_weights(name, info)
    return model, load_tokenizer(name, **hub_options(options))


def fit_tokenizer(model: RankerModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Prepare a tokenizer for a ranker and add the embeddings that it needs; both in place, repeatable.

    Raises:
        ValueError: If the tokenizer belongs to another model, or cannot end texts or join pairs.
    """
    marker = model.config.marker
    if marker.role == "teacher":
        fit_embeddings(model, prepare_tokenizer(tokenizer, marker.ending))
    else:
        check_vocabulary(model, tokenizer)
        _prepare_pairs(model, tokenizer)
    return tokenizer


def _prepare_pairs(model: DistilledRanker, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a student's tokenizer pad on the right and return token types only to a model that reads them."""
    if not tokenizer.is_fast or tokenizer.num_special_tokens_to_add(pair=True) == 0:
        raise ValueError(f"{type(tokenizer).__name__}: a student needs a fast tokenizer that joins pairs of texts.")
    tokenizer.padding_side = "right"  # absolute positions are counted from the left
    reads_types = "token_type_ids" in parameters(type(model).forward)
    if not reads_types or getattr(model.config, "type_vocab_size", 2) < 2:
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]


def has_own_input(model: str, config: PreTrainedConfig) -> bool:
    """Return whether sentence-transformers formats a stock classifier's input differently from a default `Ranker`.

    It does with a prompt that was saved with the model, and where a decoder has a chat template for pairs or was saved
    by sentence-transformers.
    """
    if isinstance(config, RankerConfigMixin):
        return False
    saved = _saved_by_sentence_transformers(model)
    if saved.get("default_prompt_name") or (saved and is_decoder(config.model_type)):
        return True
    return is_decoder(config.model_type) and bool(_PAIR_ROLE.search(str(load_tokenizer(model).chat_template)))


def check_head(model: str, config: PreTrainedConfig, generative: bool, label_index: int | None = None) -> None:
    """Refuse, before weights are read, a checkpoint without a ranking head.

    Args:
        model: Folder or Hub id.
        config: Its config.
        generative: If True, a causal language model is read as a reranker that answers yes or no.
        label_index: Label to rank by, of a classifier with several.

    Raises:
        ValueError: If it has no ranking head, one with several labels of which none is chosen, or cannot answer yes
            or no.
    """
    if is_classifier(config):
        check_labels(model, config.num_labels, label_index)
    architecture, marked = _architecture(config), isinstance(config, RankerConfigMixin)
    causal = architecture.endswith("ForCausalLM")
    if generative and (marked or not causal):
        kind = "marked ranker" if marked else architecture
        raise ValueError(f"--generative is for a causal language model; {model} is a {kind}: leave it out.")
    if marked or (saved := _saved_by_sentence_transformers(model).get("model_type")) == "CrossEncoder":
        return
    if generative:
        _check_answers(model)
    elif causal:
        raise ValueError(
            f"{model} is a language model without a ranking head ({architecture}). {_stage(config)} "
            "If it was trained to answer yes or no to a query and a document, pass --generative."
        )
    elif saved:
        raise ValueError(f"{model} is an embedding model ({saved}), without a ranking head. {_stage(config)}")
    elif architecture and not is_classifier(config):
        raise ValueError(f"{model} has no ranking head ({architecture}). {_stage(config)}")


def check_labels(model: str, labels: int, label_index: int | None = None) -> None:
    """Check the number of a model's scores per pair.

    Raises:
        ValueError: If there are several and none is chosen, or the chosen one is not among them.
    """
    if labels != 1 and label_index is None:
        raise ValueError(
            f"{model} returns {labels} scores for a pair; a ranker returns one. Choose the label that means relevant "
            "with --label_index 1 (from 0): its log-odds are the score, for two labels the difference of two logits. "
            "Or load it with num_labels=1 and ignore_mismatched_sizes=True, save it, and train the new head with "
            "disranker fit_teacher."
        )
    if labels == 1 and label_index is not None:
        raise ValueError(f"{model} returns one score for a pair: leave out --label_index.")
    if label_index is not None and not 0 <= label_index < labels:
        raise ValueError(f"--label_index {label_index}: {model} has the labels 0 to {labels - 1}.")


def check_loaded_head(model: str, loaded: PreTrainedModel | None) -> None:
    """Refuse a sequence classifier whose head was not in the checkpoint and therefore is random.

    Raises:
        ValueError: If weights of the head are missing; they are named.
    """
    if not type(loaded).__name__.endswith("ForSequenceClassification") or (stored := _stored_names(model)) is None:
        return
    assert loaded is not None
    encoder = f"{loaded.base_model_prefix}."
    missing = sorted(name for name in loaded.state_dict() if not name.startswith(encoder) and name not in stored)
    if missing:
        raise ValueError(f"{model} has no weights of a ranking head ({', '.join(missing)}). {_stage(loaded.config)}")


def _check_answers(model: str) -> None:
    tokenizer = load_tokenizer(model)
    answers = {tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")}
    if len(answers - {None, tokenizer.unk_token_id}) < 2:
        raise ValueError(f"{model} cannot answer yes or no: its tokenizer has no tokens for these words.")


def _stage(config: PreTrainedConfig) -> str:
    """Name the stage that trains a ranker from a checkpoint of this family."""
    if is_decoder(config.model_type):
        return "disranker fit_teacher trains one."
    if is_encoder(config.model_type):
        return "disranker distill trains one on a teacher's scores, disranker fit_teacher on labels."
    return "Train one first, with sentence-transformers for instance."


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _saved_by_sentence_transformers(model: str) -> dict[str, Any]:
    """Return what sentence-transformers saved about a model, with its `model_type`; empty for other checkpoints."""
    if _file(model, "modules.json") is None:
        return {}
    saved = {"model_type": "SentenceTransformer"}
    if path := _file(model, "config_sentence_transformers.json"):
        with open(path, encoding="utf-8") as file:
            saved |= json.load(file)
    return saved


def _stored_names(model: str) -> set[str] | None:
    """Return the names of a checkpoint's weights; None for pickles, which would have to be loaded."""
    if path := _file(model, "model.safetensors.index.json"):
        with open(path, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    if path := _file(model, "model.safetensors"):
        with safe_open(path, "pt") as weights:
            return set(weights.keys())
    return None


def _file(model: str, name: str) -> str | None:
    """Return a file of a folder or Hub repository; None if it has no such file."""
    # Offline, a file that is not in the cache counts as missing.
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model, name, **quiet)
