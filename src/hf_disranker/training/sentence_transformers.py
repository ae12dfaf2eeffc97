"""Loss and rows for sentence-transformers' `CrossEncoderTrainer`."""

from __future__ import annotations

import logging
import math

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from hf_disranker.data.templates import STUDENT_TEMPLATES, Templates
from hf_disranker.training.losses import margin_mse, point_mse

logger = logging.getLogger(__name__)


class PointMarginMSELoss(nn.Module):
    """Point-MSE and Margin-MSE over all pairs, as `loss=` of sentence-transformers' `CrossEncoderTrainer`.

    Rows are n-tuples with a score for each document, see `to_n_tuples`; all documents of a batch share one forward
    pass. The mean is taken over the batch of one call, as in every loss of that trainer. The model has one label.
    """

    def __init__(self, model: CrossEncoder, point_weight: float = 0.05, margin_weight: float = 0.5) -> None:
        super().__init__()
        dtype = next(model.parameters()).dtype
        if dtype != torch.float32:
            logger.warning(
                "The CrossEncoder is trained in %s, in which most small updates are lost: load it with "
                "model_kwargs={'dtype': 'float32'}.",
                str(dtype).removeprefix("torch."),
            )
        self.model = model
        self.point_weight, self.margin_weight = point_weight, margin_weight

    def forward(
        self,
        inputs: list[list[str]],
        labels: Tensor | list[Tensor],
        prompt: str | None = None,
        task: str | None = None,
    ) -> dict[str, Tensor]:
        """Compute both weighted terms, which the trainer sums and logs; ValueError without a score per document.

        Args:
            inputs: Columns query, document, document, ..., each of shape (rows,).
            labels: Score of each document, shape (rows, documents).
            prompt: Passed to the model's `preprocess`.
            task: Passed to the model's `preprocess`.
        """
        queries, *columns = inputs
        teacher = torch.stack(labels) if isinstance(labels, list) else labels
        if teacher.shape != (len(queries), len(columns)):
            raise ValueError(f"{len(columns)} documents a row need as many scores; they are {tuple(teacher.shape)}.")
        pairs = [(row[0], document) for row in zip(*inputs, strict=True) for document in row[1:]]
        features = batch_to_device(self.model.preprocess(pairs, prompt=prompt, task=task), self.model.device)
        scores = self.model(features)["scores"].view(teacher.shape)
        mask = torch.ones_like(teacher, dtype=torch.bool)
        return {
            "point_mse": self.point_weight * point_mse(scores, teacher, mask).mean,
            "margin_mse": self.margin_weight * margin_mse(scores, teacher, mask).mean,
        }

    def get_config_dict(self) -> dict[str, float]:
        """Return the parameters of the loss for the model card."""
        return {"point_weight": self.point_weight, "margin_weight": self.margin_weight}


def to_n_tuples(groups: Dataset, documents: int, templates: Templates = STUDENT_TEMPLATES) -> Dataset:
    """Convert rows of `load_groups` to n-tuples with scores: query, positive, negative_1, ..., scores.

    The positive is the best-scored document of the query. Queries with more documents yield several rows with the same
    positive; the last row is filled with negatives of the previous one, so that every scored document is used.

    The scores are `teacher_scores`, or `labels` without them; queries with fewer documents are dropped and counted.

    Raises:
        ValueError: If `documents` is below 2, or no query has that many.
    """
    if documents < 2:
        raise ValueError(f"An n-tuple has at least 2 documents, got {documents}.")
    target = "teacher_scores" if "teacher_scores" in groups.column_names else "labels"
    names = ["positive", *(f"negative_{number}" for number in range(1, documents))]
    rows, short, width = [], 0, documents - 1
    for group in groups:
        texts = [templates.render_document(*pair) for pair in zip(group["titles"], group["summaries"], strict=True)]
        scores = group[target] or [None] * len(texts)
        known = [pair for pair in zip(scores, texts, strict=True) if pair[0] is not None and not math.isnan(pair[0])]
        if len(known) < documents:
            short += 1
            continue
        best, *others = sorted(known, key=lambda pair: -pair[0])
        for start in range(0, len(others), width):
            end = min(start + width, len(others))
            chosen = [best, *others[end - width : end]]
            row = dict(zip(names, (text for _, text in chosen), strict=True))
            scores = [float(score) for score, _ in chosen]
            rows.append({"query": templates.render_query(group["query"]), **row, "scores": scores})
    if not rows:
        raise ValueError(f"No query has {documents} documents with a score.")
    if short:
        logger.warning(
            "%d of %d queries have fewer than %d documents with a score: dropped.", short, len(groups), documents
        )
    return Dataset.from_list(rows)
