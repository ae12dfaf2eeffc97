"""Distil a large language model's ranking skill into a BERT that any search stack can serve.

Importing this package registers rankers with `transformers.AutoModel` for checkpoints with our config marker. Public
names are imported on first use, so the package itself imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_disranker.models import auto as _auto
from hf_disranker.version import __version__

if TYPE_CHECKING:
    from hf_disranker.data.bm25 import mine_candidates
    from hf_disranker.data.groups import load_groups
    from hf_disranker.data.tables import read_table
    from hf_disranker.models.ranker import Ranker
    from hf_disranker.models.student import BertDistilledRanker, DistilledRanker
    from hf_disranker.models.teacher import LLMForLastTokenRanking
    from hf_disranker.scoring.store import ScoreStore
    from hf_disranker.training.cpt import ClickTrainer, CptConfig, click_dataset
    from hf_disranker.training.distillation import (
        DistillationConfig,
        DistillationTrainer,
        RankDistillationConfig,
        RankDistillationTrainer,
    )
    from hf_disranker.training.ranking_trainer import RankingTrainer
    from hf_disranker.training.setup import RankingConfig

_MODULES = {
    "training.cpt": ("ClickTrainer", "CptConfig", "click_dataset"),
    "data.groups": ("load_groups",),
    "data.tables": ("read_table",),
    "training.distillation": (
        "DistillationConfig",
        "DistillationTrainer",
        "RankDistillationConfig",
        "RankDistillationTrainer",
    ),
    "data.bm25": ("mine_candidates",),
    "models.ranker": ("Ranker",),
    "training.ranking_trainer": ("RankingTrainer",),
    "training.setup": ("RankingConfig",),
    "scoring.store": ("ScoreStore",),
    "models.student": ("BertDistilledRanker", "DistilledRanker"),
    "models.teacher": ("LLMForLastTokenRanking",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BertDistilledRanker",
    "ClickTrainer",
    "CptConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "DistilledRanker",
    "LLMForLastTokenRanking",
    "RankDistillationConfig",
    "RankDistillationTrainer",
    "Ranker",
    "RankingConfig",
    "RankingTrainer",
    "ScoreStore",
    "__version__",
    "click_dataset",
    "load_groups",
    "mine_candidates",
    "read_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


_auto.install()
