"""Teaches transformers' Auto classes to return our rankers for marked checkpoints, and only for them.

`AutoConfig` gets a subclass of each family's config that turns back into the stock config where there is no marker;
`AutoModel` and the others then choose by the config's type. Everything goes by their public `register`.

It happens in two steps, since transformers must be whole before our models can be imported: as soon as `AutoConfig` is
there, a gate takes each family's place in it; the first checkpoint or config that comes to a gate does the rest.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# With a checkpoint of each: transformers writes its models' examples with the one that a config's docstring links to,
# and complains aloud where there is none.
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
    """Set the gates now if transformers is loaded, else when it is; off with HF_DISRANKER_NO_AUTO=1."""
    if os.environ.get("HF_DISRANKER_NO_AUTO") == "1":
        return
    if _CONFIGS in sys.modules:
        _set_gates(sys.modules[_CONFIGS])
    else:
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Register every family of ranker.

    Raises:
        RuntimeError: transformers took the registration but does not act on it.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from hf_disranker.models.student import BertDistilledRanker
    from hf_disranker.models.teacher import FAMILIES

    for model in (BertDistilledRanker, *FAMILIES.values()):
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForSequenceClassification.register(config, model, exist_ok=True)
        if config.stock in TOKENIZER_MAPPING:  # others are found by the class that the tokenizer's own files name
            AutoTokenizer.register(config, tokenizer_class=TOKENIZER_MAPPING[config.stock], exist_ok=True)
        if CONFIG_MAPPING[config.model_type] is not config or config not in MODEL_MAPPING:
            raise RuntimeError(
                f"This transformers ignores the registration of {model.__name__}; set HF_DISRANKER_NO_AUTO=1 to go on "
                "without, and load rankers with their own from_pretrained."
            )


class _Gate:
    """Stands for a family's config class until it is first asked for."""

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


def _set_gates(configs: ModuleType) -> None:
    for model_type, checkpoint in MODEL_TYPES.items():
        members = {"model_type": model_type, "__doc__": f"[{checkpoint}](https://huggingface.co/{checkpoint})"}
        # Under the stock name, by which transformers finds the model type of a config class.
        gate = type(configs.CONFIG_MAPPING_NAMES[model_type], (_Gate,), members)
        configs.AutoConfig.register(model_type, gate, exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Sets the gates right after transformers' `AutoConfig` was imported.

    Importing it ourselves would make `import hf_disranker` take seconds.
    """

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
        _set_gates(module)
