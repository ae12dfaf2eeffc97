"""What makes a stock checkpoint a ranker: the marker in its config, and the configs and outputs that know it.

On disk a ranker is a stock `<Family>ForSequenceClassification` with one label, so every loader and server reads it
without this package. The key `disranker` of config.json says how it was trained to be fed:
`{"format", "role", "head", "templates", "max_length", "max_query_length", "score_transform", "teacher"}`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_disranker.data.templates import Templates

MARKER = "disranker"
FORMAT = 1
# CrossEncoder and vLLM would put a sigmoid on one label unless the config names this.
RAW_LOGITS = {"activation_fn": "torch.nn.modules.linear.Identity"}
# What says where on the Hub a checkpoint is.
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder")

# Weights that a stage may train from nothing; a BERT that was pre-trained without a pooler has none of that either.
_HEAD = re.compile(r"(classifier|score|bert\.pooler)\.")
# Of the embeddings' rows, the share that a tokenizer knows at least: rows are padded up, by a few percent at most.
_KNOWN_ROWS = 0.75


@dataclass
class RankerOutput(SequenceClassifierOutput):
    """A sequence classifier's output with one label, and its `scores`."""

    @property
    def scores(self) -> Tensor:
        """Raw logits, shape (rows,), fp32."""
        return self.logits.squeeze(-1).float()


class RankerConfigMixin:
    """Turns a stock config class into that of a marked checkpoint; put it before the stock class.

    `from_dict` gives the stock config where there is no marker, so that it may stand in for the stock class in
    `AutoConfig`; `to_dict` writes the stock architecture.
    """

    stock: type[PreTrainedConfig]
    architecture: str
    role: str
    head: str
    default_templates: Templates
    disranker: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; raises ValueError for a config that is not, or cannot be, that of such a ranker."""
        found = config_dict.get("model_type", cls.stock.model_type)
        if found != cls.stock.model_type:
            raise ValueError(
                f"This checkpoint holds a {found} model; {cls.architecture} reads {cls.stock.model_type}."
            )
        if MARKER not in config_dict:
            return cls.stock.from_dict(config_dict, **kwargs)
        check_marker(config_dict[MARKER], cls.role)
        cls._check_claims(config_dict)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def _check_claims(cls, config_dict: dict[str, Any]) -> None:
        """Raise ValueError where a marked config contradicts itself, or names code of another repository."""
        head = config_dict[MARKER].get("head", cls.head)
        architecture = cls.architecture_of(head)
        for name in config_dict.get("architectures") or []:
            if name != (architecture or cls.architecture):
                raise ValueError(f"A marked checkpoint of a {name}; a {cls.role} is a {cls.architecture}.")
        labels = len(config_dict.get("id2label") or ())
        if labels != 1 or architecture is None:
            raise ValueError(
                f"The config claims a ranker, which has one label and the head {cls.head}, and says {labels or 2} "
                f"labels and the head {head}: it was changed by hand or belongs to other weights."
            )
        for reference in (config_dict.get("auto_map") or {}).values():
            if "--" in str(reference):
                raise ValueError(
                    f"The checkpoint's auto_map names code of another repository ({reference}). Refused: a ranker "
                    "needs no such code. Remove auto_map from its config.json if you trust the weights."
                )

    @classmethod
    def architecture_of(cls, head: str) -> str | None:
        """The stock class that a checkpoint with this head is on disk; None for a head that is not known."""
        return cls.architecture if head == cls.head else None

    @classmethod
    def mark(cls, config: PreTrainedConfig) -> Any:
        """The ranker config of a stock one, with a fresh marker and one label; a ranker config is given back as is."""
        if isinstance(config, cls):
            return config
        if config.model_type != cls.stock.model_type:
            raise ValueError(f"A {config.model_type} config; {cls.architecture} needs {cls.stock.model_type}.")
        config = copy.deepcopy(config)
        # Only the class changes: what transformers keeps on the object (dtype, attention kind) stays.
        config.__class__ = cls
        config.num_labels = 1
        config.sentence_transformers = dict(RAW_LOGITS)
        config.disranker = {
            "format": FORMAT,
            "role": cls.role,
            "head": cls.head,
            # A language model that has read clicks keeps the template of its pre-training.
            "templates": getattr(config, "click_templates", None) or cls.default_templates.to_dict(),
            "score_transform": None,
        }
        return config

    @property
    def templates(self) -> Templates:
        """How a query and a document become this model's input."""
        return Templates(**self.disranker["templates"])

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data: it names the stock architecture, and no code, which lies in no folder of ours."""
        marker = getattr(self, MARKER, {})  # transformers makes configs of the bare class, to compare with
        architecture = self.architecture_of(marker.get("head", self.head))
        content = super().to_dict() | {"architectures": [architecture]}  # type: ignore[misc]
        content.pop("auto_map", None)
        return content


def check_marker(marker: dict[str, Any], role: str) -> None:
    """Raise ValueError when a marker is none, newer than this package, or of another role."""
    if not isinstance(marker, dict):
        raise ValueError(f"The key {MARKER} of config.json holds {marker!r}, not a ranker's description.")
    if marker.get("format", 0) > FORMAT:
        raise ValueError(
            f"The checkpoint's marker has format {marker['format']}, this package knows up to {FORMAT}: "
            "pip install --upgrade hf-disranker"
        )
    if marker.get("role", role) != role:
        raise ValueError(f"This checkpoint is a {marker['role']}, not a {role}.")


def load_config(name: str | os.PathLike, **hub: Any) -> Any:
    """Load a checkpoint's config by `AutoConfig`.

    Args:
        name: folder or Hub id.
        hub: `revision`, `token`, `cache_dir` or `subfolder`.

    Raises:
        OSError: neither a folder nor on the Hub.
        ValueError: a folder of LoRA weights, or a config that contradicts itself.
    """
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        explain_absence(name, error)
        raise


def load_tokenizer(name: str | os.PathLike, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer by `AutoTokenizer`; arguments and errors as in `load_config`."""
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        explain_absence(name, error)
        raise


def explain_absence(name: str | os.PathLike, error: Exception) -> None:
    """Raise in plain words where a name is no folder, or a folder of LoRA weights; return where it is something else.

    Args:
        name: folder or Hub id that could not be loaded.
        error: what was raised then.
    """
    if not os.path.isdir(name):
        if isinstance(error, OSError) and "no such folder" not in str(error):
            raise OSError(f"{name}: no such folder, and as a Hub id: {error}") from error
    elif (base := adapter_base(name)) is not None:
        raise ValueError(
            f"{name} holds the LoRA weights of an adapter on {base}, not a whole model. Merge them first: "
            f"PeftModel.from_pretrained(LLMForLastTokenRanking.from_pretrained({base!r}), {str(name)!r})"
            ".merge_and_unload().save_pretrained(FOLDER), and save the tokenizer there."
        ) from error


def adapter_base(name: str | os.PathLike) -> str | None:
    """The model under the LoRA weights that a local folder holds in place of a model; None for any other name."""
    files = [Path(name, file) for file in ("config.json", "adapter_config.json")]
    if files[0].exists() or not files[1].exists():
        return None
    return json.loads(files[1].read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE_MODEL"


def check_weights(name: str | os.PathLike, info: dict[str, Any]) -> None:
    """Raise ValueError where anything but the head of a model would start from random weights.

    Args:
        name: of the checkpoint.
        info: what `from_pretrained(..., output_loading_info=True)` gives.
    """
    lacking = sorted(key for key in info["missing_keys"] if not _HEAD.match(key))
    if lacking:
        strange = sorted(info["unexpected_keys"])
        instead = f" It holds others, such as {strange[0]}: rename its keys if they have a prefix." if strange else ""
        raise ValueError(
            f"{name} lacks {len(lacking)} weights of the model, such as {lacking[0]}, which would start at random."
            f"{instead}"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where a tokenizer cannot be the one that a model was trained with.

    A decoder may lack embeddings for tokens that were added to its vocabulary later.
    """
    rows = model.get_input_embeddings().num_embeddings
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=model.config.model_type == "bert").values()
    found = f"{tokenizer.name_or_path or model.config.name_or_path}: the tokenizer"
    if max(ids, default=-1) >= rows:
        raise ValueError(
            f"{found} gives token ids up to {max(ids)}, the model has embeddings for {rows} tokens: it belongs to "
            "another model, or the embeddings were not resized."
        )
    if len(tokenizer) < _KNOWN_ROWS * rows:
        raise ValueError(
            f"{found} knows {len(tokenizer)} tokens, the model has embeddings for {rows}: the tokenizer's files are "
            "missing or those of another model. Copy them from the model that this one was made from."
        )


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raise ValueError where a limit on the tokens of a text is beyond the positions that a model has learned."""
    positions = position_limit(config)
    if positions is not None and max_length > positions:
        name = config.name_or_path or f"the {config.model_type} model"
        raise ValueError(f"max_length {max_length} is beyond the {positions} positions of {name}: choose {positions}.")


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens that a model can read; None where its rotary positions are scaled, or its config does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    scaled = any(kind.get("rope_type", "default") != "default" for kind in kinds)
    return None if scaled else getattr(config, "max_position_embeddings", None)
