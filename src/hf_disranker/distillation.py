"""Stage 3b: DistillationTrainer, from teacher scores to the student that is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_disranker.losses import LossTerm, margin_mse, point_mse
from hf_disranker.ranking_trainer import RankingConfig, RankingTrainer


@dataclass
class DistillationConfig(RankingConfig):
    """Options of the distillation.

    Defaults that differ from `RankingConfig`: learning_rate 5e-5. The weights of the two losses are ours: the paper
    publishes none.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    point_weight: float = field(default=0.5, metadata={"help": "Weight of Point-MSE, which learns absolute scores."})
    margin_weight: float = field(default=0.5, metadata={"help": "Weight of Margin-MSE, which learns the order."})


class DistillationTrainer(RankingTrainer):
    """Distil teacher scores into a ranker, query by query, with mixed Point-MSE and Margin-MSE.

    Not the language-model distillation of the same name in trl and setfit; `RankDistillationTrainer` is another name
    for this class. Arguments are those of `RankingTrainer`; the training rows need `teacher_scores`.
    """

    target = "teacher_scores"
    args: DistillationConfig

    def loss_terms(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, tuple[float, LossTerm]]:
        """Point-MSE and Margin-MSE with their weights; see `RankingTrainer.loss_terms`."""
        teacher, mask = batch["teacher_scores"], batch["mask"]
        return {
            "point_mse": (self.args.point_weight, point_mse(scores, teacher, mask)),
            "margin_mse": (self.args.margin_weight, margin_mse(scores, teacher, mask)),
        }


RankDistillationTrainer = DistillationTrainer
