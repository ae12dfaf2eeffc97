"""Turn what a user passes to a trainer into what it trains: model, adapter, weights and tokenizer."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_disranker.models.checkpoint import RankerConfigMixin, load_config, load_tokenizer
from hf_disranker.models.loading import ranker_class

logger = logging.getLogger(__name__)


def as_ranker(model: Any, frozen: bool = False) -> Any:
    """The ranker to train, with a config of its own: constructors write limits into it.

    Args:
        model: a ranker, also inside a peft model; a stock sequence classifier with one label, whose weights the ranker
            then shares; or a folder or Hub id.
        frozen: load a folder's weights as stored, since an adapter is trained and not they.

    Raises:
        TypeError: a model of another kind.
        ValueError: a stock classifier with several labels, or of a family that is not known.
    """
    if isinstance(model, str | os.PathLike):
        model = ranker_class(load_config(model)).from_pretrained(model, dtype="auto" if frozen else torch.float32)
    elif not isinstance(getattr(model, "config", None), RankerConfigMixin):
        model = _shared(model)
    return with_own_config(model)


def with_own_config(model: Any) -> Any:
    """The same model with a copy of its config, so that training does not change a config that others share."""
    old = model.config
    config = copy.deepcopy(old)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = config
    return model


def _shared(model: Any) -> Any:
    """A ranker on the weights of a stock sequence classifier."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not name.endswith("ForSequenceClassification"):
        raise TypeError(
            f"A {name} is no ranker: pass a BertDistilledRanker, an LLMForLastTokenRanking, a stock "
            "...ForSequenceClassification with num_labels=1, or the folder or Hub id of a checkpoint."
        )
    kind = ranker_class(model.config)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"The {name} is quantised: load it with {kind.__name__}.")
    if model.config.num_labels != 1:
        raise ValueError(
            f"The {name} has {model.config.num_labels} labels; a ranker has one: load it with num_labels=1."
        )
    config = kind.config_class.from_dict(model.config.to_dict())
    config._name_or_path = model.config._name_or_path
    with torch.device("meta"):
        ranker = kind(config)
    for part, module in model.named_children():
        setattr(ranker, part, module)
    return ranker.train(model.training)


def own_tokenizer(tokenizer: PreTrainedTokenizerBase | None, source: str | None) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that the user passed, or the one of the model's checkpoint.

    Raises:
        ValueError: there is neither.
    """
    if tokenizer is not None:
        return copy.deepcopy(tokenizer)
    if not source:
        raise ValueError("The model was not loaded from a checkpoint: pass processing_class, its tokenizer.")
    return load_tokenizer(source)


def add_adapter(model: Any, peft_config: PeftConfig) -> Any:
    """Put an adapter on a ranker; the head is trained with it.

    Raises:
        TypeError: no config of peft.
        ValueError: the model has an adapter, or the config is for another task, which would freeze a new head.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a config of peft, such as LoraConfig; got {type(peft_config).__name__}.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has an adapter already: leave peft_config out.")
    if peft_config.task_type not in (None, "SEQ_CLS"):
        raise ValueError(f"The task_type of peft_config is {peft_config.task_type}; a ranker's is SEQ_CLS.")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    return get_peft_model(model, peft_config)


def cast_weights(model: nn.Module, dtype: str) -> None:
    """Turn the weights that are trained into the type that was asked for.

    Only trainable weights of a model with an adapter or quantised weights are cast, else all: frozen layers must fit
    the others.
    """
    partly = hasattr(model, "peft_config") or getattr(model, "is_quantized", False)
    wanted, found, count = getattr(torch, dtype), set(), 0
    for module in model.modules():
        cast = False
        for weight in module.parameters(recurse=False):
            # DeepSpeed's ZeRO-3 holds its weights elsewhere, with fp32 copies of them.
            if not weight.is_floating_point() or (partly and not weight.requires_grad) or hasattr(weight, "ds_id"):
                continue
            count += weight.numel()
            if weight.dtype != wanted:
                found.add(str(weight.dtype).removeprefix("torch."))
                weight.data = weight.data.to(wanted)
                cast = True
        if partly and cast and isinstance(module, nn.Linear):
            # A trained head gets the hidden states of frozen layers in their type.
            module.register_forward_pre_hook(_cast_input)
    if found:
        logger.warning(
            "The weights are %s and are trained in %s; choose by weights_dtype.", " and ".join(sorted(found)), dtype
        )
    else:
        logger.info("%d weights are trained in %s.", count, dtype)


def _cast_input(layer: nn.Linear, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].to(layer.weight.dtype), *inputs[1:]
