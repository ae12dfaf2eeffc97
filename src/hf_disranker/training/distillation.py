"""Stage 3b: trainer that distils teacher scores into a ranker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from hf_disranker.models.student import DistilledRanker, output_layer
from hf_disranker.training.losses import LossTerm, kl, margin_mse, point_mse
from hf_disranker.training.monitor import known_values, warn_squashed
from hf_disranker.training.ranking_trainer import RankingTrainer
from hf_disranker.training.setup import RankingConfig

LABEL_LOSSES = ("hinge", "ranknet", "softmax")


@dataclass
class DistillationConfig(RankingConfig):
    """Options of the distillation.

    Losses on labels are optional here. The loss weights are our defaults: the paper's are unknown.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    point_weight: float = field(default=0.05, metadata={"help": "Weight of Point-MSE, on absolute scores."})
    margin_weight: float = field(default=0.5, metadata={"help": "Weight of Margin-MSE, on the order."})
    kl_weight: float = field(default=0.0, metadata={"help": "Weight of the listwise Kullback-Leibler divergence."})
    kl_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of the divergence."})
    hinge_weight: float = field(default=0.0, metadata={"help": "Weight of the pairwise hinge loss on labels."})
    score_transform: str = field(
        default="none",
        metadata={
            "help": "affine: learn (teacher - mean) / std over all training scores; none: keep the scale of the "
            "teacher. The transform is stored in the student's config.",
            "choices": ["none", "affine"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_transform not in ("none", "affine"):
            raise ValueError(f"score_transform must be none or affine, got {self.score_transform!r}.")


class DistillationTrainer(RankingTrainer):
    """Distil teacher scores into a ranker, query by query, by a mix of Point-MSE and Margin-MSE.

    Not the language-model distillation of the same name in trl and setfit; `RankDistillationTrainer` and
    `RankDistillationConfig` are aliases. Arguments as in `RankingTrainer`; the training rows need `teacher_scores`,
    and `labels` if a loss on labels has a weight. A loss ignores documents without a score or label.
    """

    target = "teacher_scores"
    config_class = DistillationConfig
    args: DistillationConfig
    _mean, _shift, _scale = 0.0, 0.0, 1.0

    def check_groups(self, groups: Dataset) -> float:
        """Check the rows and fit the score transform, for a stream on its first 1,000 queries."""
        spread = super().check_groups(groups)
        weights = self.args.loss_weights()
        if any(weights[name] for name in LABEL_LOSSES) and not any(known_values(groups, "labels")):
            raise ValueError(f"A loss on labels has a weight, but the rows have no labels: {groups.column_names}.")
        scores = np.concatenate(known_values(groups, "teacher_scores"))
        warn_squashed(scores)
        self._mean = float(scores.mean())
        if self.args.score_transform == "affine":
            self._shift, self._scale = self._mean, float(scores.std())
        return spread / self._scale

    def start_head(self, ranker: Any) -> None:
        """Start a new head, which has a bias of 0, at the mean of the targets."""
        bias = output_layer(ranker).bias if isinstance(ranker, DistilledRanker) else None
        if bias is not None and not bias.any():
            ranker.start_at(self._mean - self._shift)

    def marker(self) -> dict[str, Any]:
        """Return the marker entries, including the transform score = (teacher - shift) / scale."""
        affine = {"kind": "affine", "shift": self._shift, "scale": self._scale}
        return super().marker() | {"score_transform": affine if self.args.score_transform == "affine" else None}

    def loss_terms(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, tuple[float, LossTerm]]:
        """Compute the losses on teacher scores and on labels; see `RankingTrainer.loss_terms`."""
        teacher, args = (batch["teacher_scores"] - self._shift) / self._scale, self.args
        mask = batch["mask"] & ~teacher.isnan()
        terms = {}
        if args.point_weight:
            terms["point_mse"] = (args.point_weight, point_mse(scores, teacher, mask))
        if args.margin_weight:
            terms["margin_mse"] = (args.margin_weight, margin_mse(scores, teacher, mask))
        if args.kl_weight:
            terms["kl"] = (args.kl_weight, kl(scores, teacher, mask, args.kl_temperature))
        return terms | super().loss_terms(scores, batch)


RankDistillationConfig = DistillationConfig
RankDistillationTrainer = DistillationTrainer
