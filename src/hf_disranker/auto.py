"""Teaches transformers' Auto classes to return our rankers for marked checkpoints, and only for them.

`AutoConfig` gets a subclass of each family's config that turns back into the stock config where there is no marker;
`AutoModel` and the others then choose by the config's type. Everything goes by their public `register`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELS = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register now if transformers' Auto models are loaded, else when they are; off with HF_DISRANKER_NO_AUTO=1."""
    if os.environ.get("HF_DISRANKER_NO_AUTO") == "1":
        return
    if _MODELS in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Register every family of ranker.

    Raises:
        RuntimeError: transformers took the registration but does not act on it.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from hf_disranker.student import BertDistilledRanker
    from hf_disranker.teacher import FAMILIES

    for model in (BertDistilledRanker, *FAMILIES.values()):
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForSequenceClassification.register(config, model, exist_ok=True)
        if config.stock in TOKENIZER_MAPPING:  # others are found by the class that the tokenizer's own files name
            AutoTokenizer.register(config, tokenizer_class=TOKENIZER_MAPPING[config.stock], exist_ok=True)
        if CONFIG_MAPPING[config.model_type] is not config or AutoModel._model_mapping[config] is not model:
            raise RuntimeError(
                f"This transformers ignores the registration of {model.__name__}; set HF_DISRANKER_NO_AUTO=1 to go on "
                "without, and load rankers with their own from_pretrained."
            )


class _AfterImport(MetaPathFinder, Loader):
    """Runs `register` right after transformers' Auto models were imported, then leaves.

    Importing them ourselves would make `import hf_disranker` take seconds.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        register()
