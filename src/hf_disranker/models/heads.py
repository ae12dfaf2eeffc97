"""Ranking heads of checkpoints: refuse what would be scored at random, and say which stage makes a ranker of it."""

from __future__ import annotations

import json
import os

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_disranker.models.checkpoint import MARKER
from hf_disranker.models.teacher import FAMILIES


def check_head(model: str, config: PreTrainedConfig, generative: bool) -> None:
    """Refuse, before any weight is read, a checkpoint whose scores would mean nothing.

    Raises:
        ValueError: it has no ranking head, one with several labels, or cannot answer yes or no.
    """
    if is_classifier(config):
        check_labels(model, config.num_labels)
    architecture, marked = _architecture(config), hasattr(config, MARKER)
    causal = architecture.endswith("ForCausalLM")
    if generative and (marked or not causal):
        kind = "marked ranker" if marked else architecture
        raise ValueError(f"--generative is for a causal language model; {model} is a {kind}: leave it out.")
    if marked or (modules := _modules_of(model)) == "CrossEncoder":
        return
    if generative:
        _check_answers(model)
    elif causal:
        raise ValueError(
            f"{model} is a language model without a ranking head ({architecture}). {_stage(config)} "
            "If it was made to answer yes or no to a query and a document, say --generative."
        )
    elif modules:
        raise ValueError(f"{model} is an embedding model ({modules}), without a ranking head. {_stage(config)}")
    elif architecture and not is_classifier(config):
        raise ValueError(f"{model} has no ranking head ({architecture}). {_stage(config)}")


def _check_answers(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = {tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")}
    if len(answers - {None, tokenizer.unk_token_id}) < 2:
        raise ValueError(f"{model} cannot answer yes or no: its tokenizer has no tokens for these words.")


def check_labels(model: str, labels: int) -> None:
    """Refuse, with a ValueError, a model that gives several scores for a pair."""
    if labels != 1:
        raise ValueError(
            f"{model} gives {labels} scores for a pair; a ranker gives one. Score with it elsewhere and go on with a "
            "table of scores, such as the difference of two logits; or load it with num_labels=1 and "
            "ignore_mismatched_sizes=True, save it, and train the new head with disranker fit_teacher."
        )


def _stage(config: PreTrainedConfig) -> str:
    """What makes a ranker of a checkpoint of this family."""
    if config.model_type in FAMILIES:
        return "disranker fit_teacher trains one."
    if config.model_type == "bert":
        return "disranker distill trains one on a teacher's scores, disranker fit_teacher on labels."
    return "Train one first, with sentence-transformers for instance."


def read_config(model: str) -> PreTrainedConfig:
    """The config of a folder or Hub id; an error names what is wrong with it."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if adapter := _adapter(model):
            with open(adapter, encoding="utf-8") as file:
                base = json.load(file).get("base_model_name_or_path")
            raise ValueError(
                f"{model} holds an adapter (LoRA) of {base} without the model itself: load both with peft, "
                "save the result of merge_and_unload() with its tokenizer, and name that folder."
            ) from error
        if isinstance(error, ValueError) or os.path.isdir(model):
            raise
        raise OSError(f"{model}: no such folder, and as a Hub id: {str(error).splitlines()[0]}") from error


def _adapter(model: str) -> str | None:
    try:
        return find_adapter_config_file(model)
    except OSError:  # no folder, and no id of the Hub either
        return None


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint says that it is a stock sequence classifier."""
    return _architecture(config).endswith("ForSequenceClassification")


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _modules_of(model: str) -> str | None:
    """The kind of model that sentence-transformers saved, such as CrossEncoder; None where it did not."""
    if _file(model, "modules.json") is None:
        return None
    if (path := _file(model, "config_sentence_transformers.json")) is None:
        return "SentenceTransformer"
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("model_type", "SentenceTransformer")


def check_weights(model: str, loaded: PreTrainedModel | None) -> None:
    """Refuse a sequence classifier that did not find its head in the checkpoint and so drew it at random.

    Raises:
        ValueError: the checkpoint lacks weights of the head; they are named.
    """
    if not type(loaded).__name__.endswith("ForSequenceClassification") or (there := _stored_names(model)) is None:
        return
    assert loaded is not None
    encoder = f"{loaded.base_model_prefix}."
    if lacking := sorted(name for name in loaded.state_dict() if not name.startswith(encoder) and name not in there):
        stage = _stage(loaded.config)
        raise ValueError(f"{model} holds no weights of a ranking head ({', '.join(lacking)}). {stage}")


def _stored_names(model: str) -> set[str] | None:
    """The names of the weights of a checkpoint; None for an old pickle, which only reading it would tell."""
    if path := _file(model, "model.safetensors.index.json"):
        with open(path, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    if path := _file(model, "model.safetensors"):
        with safe_open(path, "pt") as weights:
            return set(weights.keys())
    return None


def _file(model: str, name: str) -> str | None:
    """A file of a folder or Hub repository; None where it has none of that name."""
    # Offline, a file that is not in the cache counts as missing.
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model, name, **quiet)
