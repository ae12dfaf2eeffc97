"""DistilledRanker: encoder cross-encoder with one raw score; `BertDistilledRanker` is its BERT."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hf_disranker.models.checkpoint import HUB_OPTIONS, RankerConfigMixin, RankerOutput, load_config
from hf_disranker.models.families import encoder_types, find_family, make_family
from hf_disranker.models.hub import RankerHubMixin
from hf_disranker.models.packing import install, plan

_SUFFIX = "DistilledRanker"


class StudentConfigMixin(RankerConfigMixin):
    """Config of a marked encoder checkpoint; mix it in before the stock config class."""

    role = "student"
    head = "cls"


class DistilledRanker(RankerHubMixin, PreTrainedModel):
    """Encoder cross-encoder with one raw score per (query, document) pair.

    A stock `<Family>ForSequenceClassification` with one label: same weights, same logits, same class on disk.
    `from_pretrained` and `from_config` return the class of the checkpoint's family, `RobertaDistilledRanker` for
    instance; they accept a ranker, a CrossEncoder with one label or a plain encoder, whose new head is random.

    Args:
        config: Config of a supported family, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^lm_head\."]

    def __init__(self, config: PreTrainedConfig) -> None:
        marked: Any = self.config_class.mark(config)  # type: ignore[union-attr]
        super().__init__(marked)
        self.was_marked = isinstance(config, self.config_class)  # type: ignore[arg-type]
        output_layer(self)
        install(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does.

        Raises:
            OSError: If there is no such folder or Hub repository, or the weights are pickles or damaged.
            ValueError: If the family is not supported, or weights other than the head are missing.
        """
        name = pretrained_model_name_or_path
        if cls is not DistilledRanker:
            return super().from_pretrained(name, *args, **kwargs)
        config = kwargs.get("config") or load_config(
            name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        )
        return family_class(config.model_type).from_pretrained(name, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> DistilledRanker:
        """Return a student with random weights; raises ValueError for a family that is not supported."""
        return family_class(config.model_type)(config)

    def start_at(self, score: float) -> None:
        """Set the bias of a new head: learning a teacher's mean score by gradient steps takes long.

        Args:
            score: Offset of all scores.
        """
        nn.init.constant_(output_layer(self).bias, score)

    def keep_layers(self, layers: Sequence[int]) -> Self:
        """Keep only the given encoder layers, in the order given: a smaller student from a larger one.

        Args:
            layers: Layer numbers from 0, for example (0, 3, 6, 9).

        Raises:
            ValueError: If a number is out of range or repeated, or there is none; or if the layers of the family are
                shared, in several lists, or of different kinds so that these cannot follow each other.
        """
        config, kind = self.config, self.config.model_type
        count = config.num_hidden_layers
        if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(count)):
            raise ValueError(f"Cannot keep layers {list(layers)} of a {kind} model with layers 0 to {count - 1}.")
        stacks = [
            name for name, part in self.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
        ]
        if len(stacks) != 1:
            raise ValueError(f"Cannot keep layers of a {kind} model: its layers are shared or in several lists.")
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers = len(layers)
        changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
        if kinds := getattr(config, "layer_types", None):
            changes["layer_types"] = smaller.layer_types = [kinds[layer] for layer in layers]
        kept = nn.ModuleList(self.get_submodule(stacks[0])[layer] for layer in layers)
        with torch.device("meta"):
            expected = type(self)(smaller).get_submodule(stacks[0])
        if expected.state_dict().keys() != kept.state_dict().keys():
            raise ValueError(f"Cannot keep layers {list(layers)} of a {kind} model: keep its first layer in place.")
        self.set_submodule(stacks[0], kept)
        for name, value in changes.items():
            setattr(config, name, value)
        return self


def _with_scores(stock_forward: Any) -> Any:
    """Wrap a stock forward: no padding, and an output with `scores`; the signature, which loaders read, stays."""
    names = list(inspect.signature(stock_forward).parameters)[1:]

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> RankerOutput | tuple[Tensor, ...]:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        first = getattr(self.config, "classifier_pooling", "cls") in ("cls", "bos")
        if (packed := plan(self, inputs, "first" if first else None)) is not None:
            inputs["packed"] = packed
        output = stock_forward(self, **inputs)
        if isinstance(output, tuple):
            return output
        return RankerOutput(output.loss, output.logits, output.hidden_states, output.attentions)

    return forward


class DisRankerBertConfig(StudentConfigMixin, BertConfig):
    """Config of a marked BERT checkpoint.

    Stock counterpart: [google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased).
    """

    model_type = "bert"
    stock = BertConfig
    architecture = "BertForSequenceClassification"


class BertDistilledRanker(DistilledRanker, BertForSequenceClassification):
    """BERT that reads a (query, document) pair and computes one raw score from the [CLS] token.

    The BERT of `DistilledRanker`; see there.

    Args:
        config: A `BertConfig`, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    config_class = DisRankerBertConfig
    forward = _with_scores(BertForSequenceClassification.forward)


def is_encoder(model_type: str) -> bool:
    """Return whether transformers has a sequence-classification head for this encoder family."""
    return model_type in encoder_types()


@functools.cache
def family_class(model_type: str) -> Any:
    """Return the student class of a family, made from its stock classes; BERT has its own.

    Raises:
        ValueError: If transformers has no encoder of this type with a sequence-classification head.
    """
    if model_type == "bert":
        return BertDistilledRanker
    if not is_encoder(model_type):
        raise ValueError(
            f"A {model_type} model cannot be a student: transformers has no encoder of this type with a "
            "sequence-classification head."
        )
    kind = make_family(DistilledRanker, StudentConfigMixin, model_type, _SUFFIX)
    kind.forward = _with_scores(super(DistilledRanker, kind).forward)
    return kind


def __getattr__(name: str) -> Any:
    """Find the generated classes by name, as pickle does."""
    if (found := find_family(name, encoder_types(), _SUFFIX)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = family_class(found[0])
    return kind.config_class if found[1] else kind


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the last linear layer of a student's head, which computes the score.

    Raises:
        ValueError: If the head has no linear layer with one output and a bias.
    """
    base = f"{model.base_model_prefix}."
    outside = [
        part for name, part in model.named_modules() if isinstance(part, nn.Linear) and not name.startswith(base)
    ]
    if not outside or outside[-1].out_features != 1 or outside[-1].bias is None:
        raise ValueError(
            f"A {model.config.model_type} model cannot be a student: its head does not end in one row of weights."
        )
    return outside[-1]
