"""Loss, evaluator and data conversion for sentence-transformers' `CrossEncoderTrainer`."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from hf_disranker.data.groups import group_rows
from hf_disranker.data.schema import validate
from hf_disranker.data.tables import pair_texts
from hf_disranker.data.templates import STUDENT_TEMPLATES, Templates
from hf_disranker.evaluation import metrics
from hf_disranker.training.losses import margin_mse, point_mse

logger = logging.getLogger(__name__)

_SCORES = ("scores", "score", "labels", "label")


class PointMarginMSELoss(nn.Module):
    """Point-MSE and Margin-MSE over all pairs, as `loss=` of sentence-transformers' `CrossEncoderTrainer`.

    Rows are n-tuples with a score for each document, see `to_n_tuples`; all documents of a batch share one forward
    pass. The mean is taken over the batch of one call, as in every loss of that trainer.

    Args:
        model: CrossEncoder to train, with one label.
        point_weight: Weight of Point-MSE.
        margin_weight: Weight of Margin-MSE.
    """

    def __init__(self, model: CrossEncoder, point_weight: float = 0.5, margin_weight: float = 0.5) -> None:
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
        """Compute both weighted terms, which the trainer sums and logs.

        Args:
            inputs: Columns query, document, document, ..., each of shape (rows,).
            labels: Score of each document, shape (rows, documents).
            prompt: Passed to the model's `preprocess`.
            task: Passed to the model's `preprocess`.

        Raises:
            ValueError: If there is not one score per document.
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

    Args:
        groups: Rows with `teacher_scores`, or else with `labels`, which are then the scores.
        documents: Number of documents per row, at least 2; queries with fewer are dropped and counted.
        templates: Templates of query and document.

    Raises:
        ValueError: If `documents` is below 2, or no query has that many.
    """
    if documents < 2:
        raise ValueError(f"An n-tuple has at least 2 documents, got {documents}.")
    target = "teacher_scores" if "teacher_scores" in groups.column_names else "labels"
    names = ["positive", *(f"negative_{number}" for number in range(1, documents))]
    rows, short = [], 0
    for group in groups:
        texts = [templates.render_document(*pair) for pair in zip(group["titles"], group["summaries"], strict=True)]
        scores = [math.nan if score is None else score for score in group[target] or ()]
        known = [place for place, score in enumerate(scores) if not math.isnan(score)]
        if len(known) < documents:
            short += 1
            continue
        best, *others = sorted(known, key=lambda place: -scores[place])
        width = documents - 1
        for start in range(0, len(others), width):
            end = min(start + width, len(others))
            places = [best, *others[end - width : end]]
            found = zip(names, places, strict=True)
            row = {"query": templates.render_query(group["query"])} | {name: texts[place] for name, place in found}
            rows.append(row | {"scores": [float(scores[place]) for place in places]})
    if not rows:
        raise ValueError(f"No query has {documents} documents with a score.")
    if short:
        logger.warning(
            "%d of %d queries have fewer than %d documents with a score: dropped.", short, len(groups), documents
        )
    return Dataset.from_list(rows)


def from_n_tuples(rows: Dataset) -> Dataset:
    """Convert n-tuples with scores to rows of `load_groups` with `teacher_scores`, one row per query.

    The first text column is the query, the others are its documents (empty title, text as summary). Rows of the same
    query are joined; ids are digests of the texts.

    Raises:
        ValueError: If there is not one score per document; scores cannot be recovered from margins.
        TableError: If a document has two different scores for one query.
    """
    scores = next((name for name in _SCORES if name in rows.column_names), None)
    texts = [name for name in rows.column_names if name not in _SCORES]
    if scores is None or len(texts) < 2 or len(rows[0][scores]) != len(texts) - 1:
        raise ValueError(f"Not n-tuples with a score for each document: {rows.column_names}.")
    query, *documents = texts
    records = [
        (row[query], row[name], score) for row in rows for name, score in zip(documents, row[scores], strict=True)
    ]
    frame = pd.DataFrame(records, columns=["query", "summary", "teacher_score"]).drop_duplicates()
    frame = frame.assign(query_id=frame["query"].map(_digest), doc_id=frame["summary"].map(_digest), title="")
    return group_rows(validate(frame.reset_index(drop=True), "scores", "n-tuples"))


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:16]


class RankingEvaluator(BaseEvaluator):
    """Evaluate a model during training, as `evaluator=` of sentence-transformers or by a call.

    The results equal those of `RankingTrainer` and `DistillationTrainer` for their eval_dataset.

    Args:
        judgments: A judgments table with texts.
        name: Prefix of the measures, as in `name_ndcg@10`.
    """

    primary_metric = "ndcg@10"

    def __init__(self, judgments: pd.DataFrame, name: str = "") -> None:
        super().__init__()
        self.judgments, self.name = judgments, name
        self.primary_metric = f"{name}_ndcg@10" if name else "ndcg@10"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a `Ranker` or `CrossEncoder`; the other arguments are ignored."""
        pairs: list[Any] = pair_texts(self.judgments)
        options: dict[str, Any] = {}
        if isinstance(model, CrossEncoder):
            pairs = [(query, STUDENT_TEMPLATES.render_document(**document)) for query, document in pairs]
            options = {"activation_fn": nn.Identity(), "show_progress_bar": False}
        labels, queries = self.judgments["label"].to_numpy(), self.judgments["query_id"].to_numpy()
        found = metrics.evaluate(labels, model.predict(pairs, **options), queries)
        return {f"{self.name}_{name}" if self.name else name: value for name, value in found.items()}
