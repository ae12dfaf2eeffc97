"""BertDistilledRanker: BERT cross-encoder with one raw score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hf_disranker.models.checkpoint import RankerConfigMixin, RankerOutput
from hf_disranker.models.hub import RankerHubMixin
from hf_disranker.models.packing import Unpadded


class DisRankerBertConfig(RankerConfigMixin, BertConfig):
    """Config of a marked BERT checkpoint.

    Stock counterpart: [google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased).
    """

    model_type = "bert"
    stock = BertConfig
    architecture = "BertForSequenceClassification"
    role = "student"
    head = "cls"


class BertDistilledRanker(RankerHubMixin, BertForSequenceClassification):
    """BERT that reads a (query, document) pair and computes one raw score from the [CLS] token.

    A `BertForSequenceClassification` with one label: same weights, same logits, same class on disk. `from_pretrained`
    accepts a ranker, a CrossEncoder with one label or a plain BERT, whose new head is random.

    Args:
        config: A `BertConfig`, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    config_class = DisRankerBertConfig
    _keys_to_ignore_on_load_unexpected = [r"^cls\."]

    def __init__(self, config: BertConfig) -> None:
        super().__init__(DisRankerBertConfig.mark(config))
        self.was_marked = isinstance(config, DisRankerBertConfig)

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

    def start_at(self, score: float) -> None:
        """Set the bias of a new head: learning a teacher's mean score by gradient steps takes long.

        Args:
            score: Offset of all scores.
        """
        nn.init.constant_(self.classifier.bias, score)

    def keep_layers(self, layers: Sequence[int]) -> BertDistilledRanker:
        """Keep only the given encoder layers, in the order given: a smaller student from a larger BERT.

        Args:
            layers: Layer numbers from 0, for example (0, 3, 6, 9).

        Raises:
            ValueError: If a number is out of range or repeated, or there is none.
        """
        count = self.config.num_hidden_layers
        if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(count)):
            raise ValueError(f"Cannot keep layers {list(layers)} of a BERT with layers 0 to {count - 1}.")
        self.bert.encoder.layer = nn.ModuleList(self.bert.encoder.layer[layer] for layer in layers)
        self.config.num_hidden_layers = len(layers)
        return self


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
