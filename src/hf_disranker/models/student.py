"""DistilledRanker: encoder cross-encoder with one raw score; `BertDistilledRanker` is its BERT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hf_disranker.models.checkpoint import RankerOutput
from hf_disranker.models.families import is_encoder
from hf_disranker.models.modeling import PreTrainedRanker, score_in_fp32
from hf_disranker.models.packing import install, plan


class DistilledRanker(PreTrainedRanker):
    """Encoder cross-encoder with one raw score per (query, document) pair.

    A stock `<Family>ForSequenceClassification` with one label: same weights, same logits, same class on disk.
    `from_pretrained` and `from_config` return the class of the checkpoint's family, `RobertaDistilledRanker` for
    instance; they accept a ranker, a CrossEncoder with one label or a plain encoder, whose new head is random.

    Args:
        config: Config of a supported family, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    role = "student"
    supports = staticmethod(is_encoder)
    kind = "encoder"
    suffix = "DistilledRanker"
    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^lm_head\."]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        output_layer(self).register_forward_hook(score_in_fp32)
        install(self)

    def forward(self, **inputs: Any) -> RankerOutput | tuple[Tensor, ...]:
        """Score pairs; arguments as in the stock class."""
        first = getattr(self.config, "classifier_pooling", "cls") in ("cls", "bos")
        if (packed := plan(self, inputs, "first" if first else None)) is not None:
            inputs["packed"] = packed
        output = super().forward(**inputs)
        if isinstance(output, tuple):
            return output
        return RankerOutput(output.loss, output.logits, output.hidden_states, output.attentions)

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
        changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
        if kinds := getattr(config, "layer_types", None):
            changes["layer_types"] = [kinds[layer] for layer in layers]
        smaller = copy.deepcopy(config)
        smaller.update(changes)
        kept = nn.ModuleList(self.get_submodule(stacks[0])[layer] for layer in layers)
        with torch.device("meta"):
            expected = type(self)(smaller).get_submodule(stacks[0])
        if expected.state_dict().keys() != kept.state_dict().keys():
            raise ValueError(f"Cannot keep layers {list(layers)} of a {kind} model: keep its first layer in place.")
        self.set_submodule(stacks[0], kept)
        config.update(changes)
        return self


class BertDistilledRanker(DistilledRanker, BertForSequenceClassification):
    """BERT that reads a (query, document) pair and computes one raw score from the [CLS] token.

    The BERT of `DistilledRanker`; see there.

    Args:
        config: A `BertConfig`, plain or of a marked checkpoint. A plain one is copied and marked.
    """


def __getattr__(name: str) -> Any:
    return DistilledRanker.generated(name)


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
