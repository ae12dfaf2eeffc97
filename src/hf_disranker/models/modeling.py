"""PreTrainedRanker: base of students and teachers, whose classes are made from the stock ones of transformers."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_disranker.models.card import CardFacts
from hf_disranker.models.checkpoint import (
    LABEL_EXPECTATION,
    RankerConfigMixin,
    adapter_base,
    hub_options,
    load_config,
    load_weights,
)
from hf_disranker.models.checks import check_weights
from hf_disranker.models.families import classifiers
from hf_disranker.models.hub import check_padding, push_folder, write_remote_code
from hf_disranker.models.packing import parameters


class PreTrainedRanker(PreTrainedModel):
    """Ranker around the stock sequence classifier of its family: same weights, same class on disk.

    A direct subclass has a role and sets the attributes. The ranker of a family derives from it and from the stock
    class; it gets its config class, and `forward` with the stock signature, which trainers and loaders read.

    Attributes:
        role: "student" or "teacher".
        supports: Returns whether a model type can have this role.
        kind: Kind of supported models, for messages.
        suffix: End of a family's class name, in place of "ForSequenceClassification".
        stock: Stock class of the family; None for the class of a role.
    """

    role: str
    supports: Callable[[str], bool]
    kind: str
    suffix: str
    stock: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = cls.__bases__[-1]
        if issubclass(stock, PreTrainedRanker) or not issubclass(stock, PreTrainedModel):
            return
        plain = stock.config_class
        members = {"model_type": plain.model_type, "stock": plain, "architecture": stock.__name__, "role": cls.role}
        members |= {"__module__": cls.__module__, "__doc__": f"Config of a ranker, stored as {plain.__name__}."}
        members["__qualname__"] = f"DisRanker{plain.__name__}"  # for pickles; transformers finds classes by __name__
        cls.stock = stock
        cls.config_class = type(plain.__name__, (RankerConfigMixin, plain), members)  # type: ignore[assignment]
        cls.forward = _with_signature(cls.forward, stock)  # type: ignore[method-assign]

    def __init__(self, config: PreTrainedConfig) -> None:
        marked: Any = self.config_class
        super().__init__(marked.mark(config))
        self.was_marked = isinstance(config, marked)

    @classmethod
    def family_class(cls, model_type: str) -> Any:
        """Return the ranker class of a family.

        Raises:
            ValueError: If transformers has no such family with a sequence-classification head, or the stock class is
                an encoder-decoder or reads more than text.
        """
        role = cls.role
        if not cls.supports(model_type):
            raise ValueError(
                f"A {model_type} model cannot be a {role}: transformers has no {cls.kind} of this type with a "
                "sequence-classification head."
            )
        module, name = sys.modules[cls.__module__], cls._class_name(model_type)
        if name not in vars(module):
            stock: Any = getattr(transformers, classifiers()[model_type])
            config = stock.config_class
            plain = config.model_type == model_type and not config.sub_configs
            if getattr(config, "is_encoder_decoder", False) or not plain:
                raise ValueError(
                    f"A {model_type} model cannot be a {role}: {stock.__name__} has more than one plain stack of "
                    "layers."
                )
            members = {"__module__": cls.__module__, "__doc__": f"{role.title()} stored as {stock.__name__}."}
            setattr(module, name, type(name, (cls, stock), members))
        return getattr(module, name)

    @classmethod
    def generated(cls, name: str) -> Any:
        """Return the class or the config class of a family by its name, as pickle asks the module for it."""
        for model_type in filter(cls.supports, classifiers()):
            if name == cls._class_name(model_type):
                return cls.family_class(model_type)
            if name == f"DisRanker{CONFIG_MAPPING_NAMES[model_type]}":
                return cls.family_class(model_type).config_class
        raise AttributeError(f"module {cls.__module__!r} has no attribute {name!r}")

    @classmethod
    def _class_name(cls, model_type: str) -> str:
        return classifiers()[model_type].replace("ForSequenceClassification", cls.suffix)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Any:
        """Return a ranker with random weights; raises ValueError for a family that is not supported."""
        return cls.family_class(config.model_type)(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as transformers does, but from safetensors only; `use_safetensors=False` accepts pickles.

        Raises:
            OSError: If there is no such folder or Hub repository, or the weights are pickles or damaged.
            ValueError: If the family is not supported, or weights other than a new head are missing or do not fit.
        """
        name = pretrained_model_name_or_path
        if cls.stock is None:
            config = kwargs.get("config")
            if config is None:
                base = adapter_base(name) if os.path.isdir(name) else None  # of LoRA weights
                config = load_config(base or name, **hub_options(kwargs))
            family = cls.family_class(config.model_type)
            return family.from_pretrained(name, *args, output_loading_info=output_loading_info, **kwargs)
        model, info = load_weights(super().from_pretrained, name, *args, **kwargs)
        if model.was_marked and any(not key.startswith(f"{model.base_model_prefix}.") for key in info["missing_keys"]):
            raise ValueError(
                f"{name} is not a trained ranker: it lacks {sorted(info['missing_keys'])[:4]}, "
                "which its config claims."
            )
        check_weights(name, info, None if model.config.marker.head == LABEL_EXPECTATION else model.base_model_prefix)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does; `push_to_hub=True` pushes by the method `push_to_hub`."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "private", "revision", "commit_message") if key in kwargs}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = hub.pop("repo_id", os.path.basename(os.fspath(save_directory).rstrip("/")))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    def push_to_hub(  # noqa: PLR0913
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        remote_code: bool = False,
        facts: CardFacts | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> CommitInfo:
        """Push the model, and the tokenizer if given, in one commit; other arguments as in `PreTrainedModel`.

        `remote_code=True` adds a self-contained modelling file, so that `AutoModel` with `trust_remote_code=True`
        returns the ranker without this package. `facts` are for the model card; None keeps an existing card. A new
        repository of a teacher is private unless `private` is False. `revision` is a branch, created if missing.

        Raises:
            PushError: If the push fails.
            ValueError: If a teacher pads with its end-of-sequence token, so that stock loaders would misread it.
        """
        check_padding(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if remote_code:
                write_remote_code(folder, type(self).__name__)
            commit_message = commit_message or f"Upload {self.config.marker.role}"
            target: dict[str, Any] = {"private": private, "revision": revision, "token": token}
            return push_folder(
                folder, repo_id, self.config, facts=facts, commit_message=commit_message, create_pr=create_pr, **target
            )


def _with_signature(forward: Any, stock: Any) -> Any:
    names = parameters(stock.forward)

    @functools.wraps(stock.forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, **dict(zip(names, args, strict=False)) | kwargs)

    return wrapped


def score_in_fp32(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """Forward hook of the layer that computes the score: fp32, also of a model in bf16 or under autocast.

    bf16 has 8 bits of precision: documents of a query would tie, and training would see rounded scores.
    """
    if output.dtype.itemsize >= 4:
        return None
    with torch.autocast(output.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(inputs[0].float(), layer.weight.float(), bias)
