"""DistilledRanker: encoder cross-encoder with one raw score; `BertDistilledRanker` is its BERT."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hf_disranker.models.checkpoint import HUB_OPTIONS, RankerConfigMixin, RankerOutput, load_config
from hf_disranker.models.families import encoder_types, find_family, make_family
from hf_disranker.models.hub import RankerHubMixin
from hf_disranker.models.packing import Unpadded

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


class DisRankerBertConfig(StudentConfigMixin, BertConfig):
    """Config of a marked BERT checkpoint.

    Stock counterpart: [google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased).
    """

    model_type = "bert"
    stock = BertConfig
    architecture = "BertForSequenceClassification"


class BertDistilledRanker(DistilledRanker, BertForSequenceClassification):
    """BERT that reads a (query, document) pair and computes one raw score from the [CLS] token.

    The member of `DistilledRanker` that skips padding on a CPU; see there.

    Args:
        config: A `BertConfig`, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    config_class = DisRankerBertConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> RankerOutput | tuple[Tensor, ...]:
        """Compute logits as `BertForSequenceClassification` does; the output also has `scores`, shape (rows,), fp32.

        On CPU, skip padding and compute only [CLS] in the last layer; logits are equal to 1e-6 in fp32. The stock
        forward runs where padding is not on the right, for labels, hidden states or attentions, and in a traced graph.
        """
        plain = labels is None and inputs_embeds is None and position_ids is None and not _asks_more(kwargs)
        if plain and input_ids is not None and self._can_unpad() and _is_padded_right(attention_mask):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            return RankerOutput(logits=self._unpadded_logits(input_ids, mask, types))
        output = super().forward(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels, **kwargs
        )
        return output if isinstance(output, tuple) else RankerOutput(**output)

    def _can_unpad(self) -> bool:
        """Return whether the model runs eagerly on a CPU, where short texts need no fused kernel."""
        config = self.config
        asked = config.output_attentions or config.output_hidden_states or not config.return_dict or config.is_decoder
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        return self.device.type == "cpu" and not (asked or traced or self.bert.encoder.layer[0].gradient_checkpointing)

    def _unpadded_logits(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Compute the logits of a padded batch, shape (rows, 1), through the modules of the stock BERT."""
        flat = Unpadded.of(attention_mask)
        ids, types = (x.flatten()[flat.tokens].unsqueeze(0) for x in (input_ids, token_type_ids))
        hidden = self.bert.embeddings(ids, types, flat.positions.unsqueeze(0)).squeeze(0)
        heads = self.config.num_attention_heads
        for layer in self.bert.encoder.layer:
            attention = layer.attention.self
            key, value = attention.key(hidden), attention.value(hidden)
            if layer is self.bert.encoder.layer[-1]:
                hidden = hidden[flat.first]
            drop = attention.dropout.p if self.training else 0.0
            mixed = flat.attend(attention.query(hidden), key, value, heads, drop)
            hidden = layer.feed_forward_chunk(layer.attention.output(mixed, hidden))
        logits = self.classifier(self.dropout(self.bert.pooler(hidden.unsqueeze(1))))
        return logits[flat.order.argsort()]


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


def _with_scores(stock_forward: Any) -> Any:
    """Wrap a stock forward, so that its output has `scores`; the signature, which loaders read, stays."""

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> RankerOutput | tuple[Tensor, ...]:
        output = stock_forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return output
        return RankerOutput(output.loss, output.logits, output.hidden_states, output.attentions)

    return forward


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


def _asks_more(kwargs: dict[str, Any]) -> bool:
    """Return whether keywords ask for more than logits; unknown ones do not, such as CrossEncoder's `scores`."""
    return bool(
        kwargs.get("output_attentions")
        or kwargs.get("output_hidden_states")
        or kwargs.get("return_dict", True) is False
        or "encoder_hidden_states" in kwargs
    )


def _is_padded_right(attention_mask: Tensor | None) -> bool:
    """Return whether every row starts with a token and has padding, if any, only at its end."""
    if attention_mask is None:
        return True
    if attention_mask.dim() != 2:
        return False
    mask = attention_mask.bool()
    return bool(mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all())
