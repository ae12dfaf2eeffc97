"""Ranker classes of a model family, made from the stock classes of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


def decoder_types() -> list[str]:
    """Return the model types of decoders with a sequence-classification head."""
    causal, masked = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return [kind for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if kind in causal and kind not in masked]


def encoder_types() -> list[str]:
    """Return the model types of encoders with a sequence-classification head."""
    masked, generating = MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return [kind for kind in found if kind in masked and kind not in generating]


def make_family(base: Any, mixin: Any, model_type: str, suffix: str) -> Any:
    """Make the ranker class of a family, with its config class as `config_class`.

    Args:
        base: Ranker class to mix in before the stock class.
        mixin: Config class to mix in before the stock config class.
        model_type: Type of a family with a sequence-classification head.
        suffix: End of the class name, in place of "ForSequenceClassification".

    Raises:
        ValueError: If the stock class is an encoder-decoder, or reads more than text.
    """
    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type]
    stock: Any = getattr(transformers, architecture)
    plain = stock.config_class.model_type == model_type and not stock.config_class.sub_configs
    if getattr(stock.config_class, "is_encoder_decoder", False) or not plain:
        raise ValueError(
            f"A {model_type} model cannot be a {mixin.role}: {architecture} has more than one plain stack of layers."
        )
    module = {"__module__": base.__module__}
    names = {"model_type": model_type, "stock": stock.config_class, "architecture": architecture}
    config = type(
        f"DisRanker{stock.config_class.__name__}",
        (mixin, stock.config_class),
        module | names | {"__doc__": stock.config_class.__doc__},
    )
    members = module | {"__doc__": f"{mixin.role.title()} stored as {architecture}.", "config_class": config}
    return type(_class_name(architecture, suffix), (base, stock), members)


def find_family(name: str, model_types: Iterable[str], suffix: str) -> tuple[str, bool] | None:
    """Return the model type of a generated class and whether it is the config class; None for any other name."""
    for model_type in model_types:
        if name == _class_name(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type], suffix):
            return model_type, False
        if name == f"DisRanker{CONFIG_MAPPING_NAMES[model_type]}":
            return model_type, True
    return None


def _class_name(architecture: str, suffix: str) -> str:
    return architecture.replace("ForSequenceClassification", suffix)
