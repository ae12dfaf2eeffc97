"""Registration with transformers' Auto classes: rankers for marked checkpoints, stock classes for all others.

When transformers' Auto classes are imported, a gate replaces the config class of every encoder and every decoder that
has a sequence-classification head, by transformers' own tables. The gate returns the stock config of an unmarked
checkpoint, and our config for a marked one, for which `AutoModel` and `AutoModelForSequenceClassification`
return the ranker of its family. Our config class has the name of the stock one, by which all other Auto classes find
their stock class. Only the public `register` methods are used.
"""

from __future__ import annotations

import copyreg
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from hf_disranker.models.families import MARKER, classifiers, is_decoder, is_encoder

_MODELS = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Install the gates now or when the Auto classes are imported; HF_DISRANKER_NO_AUTO=1 turns it off."""
    if os.environ.get("HF_DISRANKER_NO_AUTO") == "1":
        return
    if _MODELS in sys.modules:
        _install_gates()
    else:
        sys.meta_path.insert(0, _AfterImport())


def register(model_type: str) -> Any:
    """Register the ranker of a family and return its config class.

    Raises:
        RuntimeError: If this transformers accepts the registration without effect.
        ValueError: If the family is not supported.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    from hf_disranker.models.loading import ranker_class

    model = ranker_class(model_type)
    config = model.config_class
    # From a config, `AutoModel` makes the model without a head, as stock classes ask it to.
    members = {"config_class": config, "from_pretrained": model.from_pretrained}
    members["_from_config"] = MODEL_MAPPING[config.stock]._from_config
    headless = type(model.__name__, (), members | {"__module__": model.__module__})
    AutoModel.register(config, headless, exist_ok=True)
    AutoModelForSequenceClassification.register(config, model, exist_ok=True)
    if MODEL_MAPPING[config] is not headless:
        raise RuntimeError(
            f"This transformers ignores the registration of {model.__name__}; set HF_DISRANKER_NO_AUTO=1 to "
            "continue without it, and load rankers with their own from_pretrained."
        )
    return config


def _stock(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


class _GateType(type):
    """Metaclass that reads all attributes from the stock config class, with the docstring and module."""

    model_type: str

    @property
    def stock(cls) -> Any:
        return _stock(cls.__name__)

    @property
    def __doc__(cls) -> str:  # type: ignore[override]
        return cls.stock.__doc__

    @property
    def __module__(cls) -> str:  # type: ignore[override]
        return cls.stock.__module__

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.stock, name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.stock(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.stock)

    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = register(cls.model_type) if MARKER in config_dict else cls.stock
        return kind.from_dict(config_dict, **kwargs)


# As the stock class, which a process that unpickles it may not have gated.
copyreg.pickle(_GateType, lambda gate: (_stock, (gate.__name__,)))  # type: ignore[arg-type]


def _install_gates() -> None:
    configs: Any = sys.modules["transformers.models.auto.configuration_auto"]
    for model_type in (kind for kind in classifiers() if is_encoder(kind) or is_decoder(kind)):
        # Under the stock name, by which transformers finds the model type of a config class.
        gate = _GateType(configs.CONFIG_MAPPING_NAMES[model_type], (), {"model_type": model_type})
        configs.AutoConfig.register(model_type, gate, exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Import hook that installs the gates after the Auto classes, whose import takes seconds."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODELS else None
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
        _install_gates()
