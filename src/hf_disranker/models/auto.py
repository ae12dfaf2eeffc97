"""Registration with transformers' Auto classes: rankers for marked checkpoints, stock classes for all others.

`AutoConfig` gets a subclass of each family's config that returns the stock config for unmarked checkpoints; the other
Auto classes then choose by the config's type. Only the public `register` methods are used.

Registration has two steps, since our models can be imported only after transformers: when `AutoConfig` is imported, a
gate replaces each family's config class; the first config that is read through a gate registers the rankers.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# With a checkpoint of each: transformers takes the examples in its docstrings from the link in a config's docstring,
# and logs an error if there is none.
MODEL_TYPES = {
    "bert": "google-bert/bert-base-uncased",
    "gemma2": "google/gemma-2-9b",
    "gemma3_text": "google/gemma-3-1b-pt",
    "llama": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2": "Qwen/Qwen2-7B",
    "qwen3": "Qwen/Qwen3-8B",
}

_CONFIGS = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Install the gates now or when transformers is imported; HF_DISRANKER_NO_AUTO=1 turns it off."""
    if os.environ.get("HF_DISRANKER_NO_AUTO") == "1":
        return
    if _CONFIGS in sys.modules:
        _install_gates(sys.modules[_CONFIGS])
    else:
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Register every family of rankers.

    Raises:
        RuntimeError: If this transformers accepts the registration without effect.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from hf_disranker.models.student import BertDistilledRanker
    from hf_disranker.models.teacher import FAMILIES, family_class

    for model in (BertDistilledRanker, *map(family_class, FAMILIES)):
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForSequenceClassification.register(config, model, exist_ok=True)
        if config.stock in TOKENIZER_MAPPING:  # others are found by the class named in the tokenizer's files
            AutoTokenizer.register(config, tokenizer_class=TOKENIZER_MAPPING[config.stock], exist_ok=True)
        if CONFIG_MAPPING[config.model_type] is not config or config not in MODEL_MAPPING:
            raise RuntimeError(
                f"This transformers ignores the registration of {model.__name__}; set HF_DISRANKER_NO_AUTO=1 to "
                "continue without it, and load rankers with their own from_pretrained."
            )


class _Gate:
    """Placeholder of a family's config class until its first use."""

    model_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._config_class()(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return cls._config_class().from_dict(config_dict, **kwargs)

    @classmethod
    def _config_class(cls) -> Any:
        register()
        return sys.modules[_CONFIGS].CONFIG_MAPPING[cls.model_type]


def _install_gates(configs: ModuleType) -> None:
    for model_type, checkpoint in MODEL_TYPES.items():
        members = {"model_type": model_type, "__doc__": f"[{checkpoint}](https://huggingface.co/{checkpoint})"}
        # transformers finds the model type of a config class by its stock name.
        gate = type(configs.CONFIG_MAPPING_NAMES[model_type], (_Gate,), members)
        configs.AutoConfig.register(model_type, gate, exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Import hook that installs the gates after `AutoConfig` is imported; importing it here would take seconds."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _CONFIGS else None
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        _install_gates(module)
