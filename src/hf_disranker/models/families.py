"""Model families that can rank, by transformers' own tables.

The tables are imported lazily, since their import installs the gates of `auto`, which need this module.
"""

from __future__ import annotations

MARKER = "disranker"  # key of a ranker's config.json


def classifiers() -> dict[str, str]:
    """Return the name of the stock sequence classifier of each model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def is_encoder(model_type: str) -> bool:
    """Return whether a family consists of encoders with a sequence-classification head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as GENERATING

    return model_type in classifiers() and model_type in MASKED and model_type not in GENERATING


def is_decoder(model_type: str) -> bool:
    """Return whether a family consists of decoders with a sequence-classification head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return model_type in classifiers() and model_type in CAUSAL and model_type not in MASKED
