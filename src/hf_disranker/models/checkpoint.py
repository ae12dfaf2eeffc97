"""What makes a stock checkpoint a ranker: the marker in its config, and the configs and outputs that know it.

On disk a ranker is a stock `<Family>ForSequenceClassification` with one label, so every loader and server reads it
without this package. The key `disranker` of config.json says how it was trained to be fed:
`{"format", "role", "head", "templates", "max_length", "max_query_length", "score_transform", "teacher"}`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_disranker.data.templates import Templates

MARKER = "disranker"
FORMAT = 1
# CrossEncoder and vLLM would put a sigmoid on one label unless the config names this.
RAW_LOGITS = {"activation_fn": "torch.nn.modules.linear.Identity"}


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
