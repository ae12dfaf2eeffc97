"""Distil a large language model's ranking skill into a BERT that any search stack can serve.

Importing this package lets `transformers.AutoModel` return rankers for checkpoints that carry our marker. Public names
load on first use, so the import itself takes neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_disranker import auto as _auto
from hf_disranker.version import __version__

if TYPE_CHECKING:
    from hf_disranker.cpt import ClickTrainer, CptConfig, click_dataset
    from hf_disranker.data import load_groups, read_table
    from hf_disranker.distillation import (
        DistillationConfig,
        DistillationTrainer,
        RankDistillationConfig,
        RankDistillationTrainer,
    )
    from hf_disranker.hub_data import push_table
    from hf_disranker.mining import mine_candidates
    from hf_disranker.ranker import Ranker
    from hf_disranker.ranking_trainer import RankingConfig, RankingTrainer
    from hf_disranker.store import ScoreStore
    from hf_disranker.student import BertDistilledRanker
    from hf_disranker.teacher import LLMForLastTokenRanking

_MODULES = {
    "cpt": ("ClickTrainer", "CptConfig", "click_dataset"),
    "data": ("load_groups", "read_table"),
    "distillation": (
        "DistillationConfig",
        "DistillationTrainer",
        "RankDistillationConfig",
        "RankDistillationTrainer",
    ),
    "hub_data": ("push_table",),
    "mining": ("mine_candidates",),
    "ranker": ("Ranker",),
    "ranking_trainer": ("RankingConfig", "RankingTrainer"),
    "store": ("ScoreStore",),
    "student": ("BertDistilledRanker",),
    "teacher": ("LLMForLastTokenRanking",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BertDistilledRanker",
    "ClickTrainer",
    "CptConfig",
    "DistillationConfig",
    "DistillationTrainer",
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
    "push_table",
    "read_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


_auto.install()
