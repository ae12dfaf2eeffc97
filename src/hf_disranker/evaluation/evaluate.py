"""Stage 4: how good a ranking is, with intervals by query.

Two situations, two words. A model *re-ranks* judged documents: all of them are there, equal scores share their gain,
and a query without a relevant document is left out. A *run* is what was retrieved, here or elsewhere, and is judged as
trec_eval judges it: what it lacks earns nothing, a query without an answer or without a relevant document counts 0,
and equal scores (in float32) rank by doc_id, the last one first. Rows of a run have the column `missing`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm.auto import tqdm

from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.data.templates import STUDENT_TEMPLATES
from hf_disranker.data.trec import KEY
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.significance import bootstrap

logger = logging.getLogger(__name__)

# The label of a document that a run holds and nobody judged.
UNJUDGED = -1
# Slices with fewer queries say little.
FEW_QUERIES = 50
_CHUNK = 16_384
_COUNTS = ("concordant", "discordant", "tied")


class Predictor(Protocol):
    """What scores (query, {"title", "summary"}) pairs: a `Ranker`, an engine of `disranker score`."""

    def predict(self, pairs: Sequence[tuple[str, Any]]) -> np.ndarray:
        """Raw scores in the order of the pairs, shape (len(pairs),)."""


class Scored(NamedTuple):
    """Scores of rows, shape (rows,), and how fast they came (None if they were read from a file)."""

    scores: np.ndarray
    pairs_per_s: float | None = None


def score_with(ranker: Predictor, judgments: pd.DataFrame, progress: bool = True) -> Scored:
    """Score judged pairs with a ranker; the time includes tokenisation, and the machine is warm.

    Args:
        ranker: the ranker.
        judgments: columns query, title, summary.
        progress: show a progress bar.
    """
    pairs = pair_texts(judgments)
    cut = {name: getattr(ranker, name) for name in ("queries_cut", "documents_cut") if hasattr(ranker, name)}
    ranker.predict(pairs[:256])
    for name, count in cut.items():  # what warms the machine up is not counted
        setattr(ranker, name, count)
    start = time.perf_counter()
    starts = tqdm(range(0, len(pairs), _CHUNK), desc="scoring", disable=not progress, leave=False)
    scores = [ranker.predict(pairs[at : at + _CHUNK]) for at in starts]
    return Scored(np.concatenate(scores), len(pairs) / (time.perf_counter() - start))


def describe(ranker: Any) -> dict[str, Any]:
    """What a report says of a `Ranker` or of an engine of `disranker score`."""
    model = ranker.model
    marker = getattr(model.config, "marker", None)
    about = {"role": marker.role if marker else "model", "teacher": ((marker and marker.teacher) or {}).get("id")}
    about["score_transform"] = marker and marker.score_transform
    about["parameters"] = sum(weight.numel() for weight in model.parameters())
    return about | {name: getattr(ranker, name) for name in ("queries_cut", "documents_cut") if hasattr(ranker, name)}


def join_run(judgments: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """Judged documents with a run's scores, and what else the run holds of the judged queries.

    Args:
        judgments: a judgments table; texts are not needed.
        run: a scores table; texts are not needed.

    Returns:
        The rows of `judgments`, then the unjudged ones with label -1, with the columns `score` (float64) and
        `missing`: True for a judged document that the run lacks, whose score is below all that the run holds. Both
        kinds are counted in a warning, and so are queries of which the run holds nothing.

    Raises:
        TableError: no judged pair is in the run.
    """
    run = run[run["query_id"].isin(judgments["query_id"])]
    rows = judgments.merge(run[[*KEY, "teacher_score"]], on=KEY, how="outer", indicator="found", sort=False)
    rows = pd.concat([rows[rows["found"] != "right_only"], rows[rows["found"] == "right_only"]], ignore_index=True)
    missing, unjudged = rows["found"] == "left_only", rows["found"] == "right_only"
    if not (rows["found"] == "both").any():
        raise TableError("No judged (query_id, doc_id) is in the run: do the ids come from the same source?")
    if missing.any():
        logger.warning(
            "%d of %d judged documents are not in the run: they earn nothing, and rank last in PNR.",
            *(missing.sum(), len(judgments)),
        )
    if unanswered := judgments["query_id"].nunique() - run["query_id"].nunique():
        logger.warning("%d judged queries are not in the run: they count 0.", unanswered)
    if unjudged.any():
        logger.warning(
            "%d documents of the run are not judged: grade 0 in NDCG, MRR, MAP, not in PNR.", unjudged.sum()
        )
    # float64: in float32 a large score less 1 is the score itself.
    scores = rows["teacher_score"].to_numpy(np.float64)
    labels = rows["label"].where(~unjudged, UNJUDGED).astype(np.int64)
    score = np.where(missing, np.nanmin(scores) - 1.0, scores)
    return rows.drop(columns=["teacher_score", "found"]).assign(label=labels, score=score, missing=missing)


def best_passages(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row for each document of a query, from a row for each of its passages: the highest score, the highest label.

    Args:
        rows: columns query_id, doc_id, label, score and `column`.
        column: says which document a passage is of; where it is missing, a passage is a document of its own.
    """
    if column not in rows.columns:
        raise TableError(f"There is no column '{column}' to say which document a passage is of.")
    owner = rows[column].where(rows[column].notna(), rows["doc_id"]).astype(str)
    rows = rows.assign(doc_id=owner).sort_values("score", ascending=False, kind="stable")
    label = rows.groupby(KEY)["label"].transform("max")
    return rows.assign(label=label).drop_duplicates(KEY).sort_index()


def per_query(rows: pd.DataFrame, scores: np.ndarray, measures: Sequence[str] = ()) -> pd.DataFrame:
    """A row of measures for each query, by sorted query_id.

    Args:
        rows: columns query_id, doc_id, label (-1 for a document that is not judged) and, of a run, `missing`.
        scores: shape (len(rows),).
        measures: further ones by their ir_measures names, whose values are that package's in both situations.

    Returns:
        query_id, documents (judged ones), what `metrics.by_query` gives, and a column for each further measure. NaN
        where a query does not define one.
    """
    labels, ids = rows["label"].to_numpy(), rows["query_id"].to_numpy()
    judged, is_run = labels != UNJUDGED, "missing" in rows.columns
    names, documents = np.unique(ids[judged].astype(str), return_counts=True)
    retrieved = ~rows["missing"].to_numpy(bool) if is_run else None
    values = metrics.by_query(
        np.maximum(labels, 0), _run_order(rows, scores) if is_run else scores, ids, retrieved=retrieved
    )
    if is_run or not judged.all():
        among_judged = metrics.by_query(labels[judged], scores[judged], ids[judged], ks=())
        values |= {name: among_judged[name] for name in (*_COUNTS, "pair_accuracy")}
    table = pd.DataFrame({"query_id": names, "documents": documents, **values})
    return table.join(_ir_measures(rows, scores, measures), on="query_id") if measures else table


def _run_order(rows: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """Distinct scores in the order of trec_eval: falling float32, among equal ones falling doc_id."""
    order = np.lexsort((pd.factorize(rows["doc_id"], sort=True)[0], np.asarray(scores, np.float32)))
    places = np.empty(len(rows))
    places[order] = np.arange(len(rows))
    return places


def _ir_measures(rows: pd.DataFrame, scores: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Columns by measure, index query_id."""
    try:
        import ir_measures
    except ImportError as error:
        raise ValueError("Further measures need ir_measures: pip install hf-disranker[eval]") from error
    try:
        wanted = [ir_measures.parse_measure(name) for name in dict.fromkeys(names)]
    except (NameError, ValueError, SyntaxError, AssertionError) as error:
        raise ValueError(f"ir_measures knows no such measure as {', '.join(names)}: {error}") from error
    # Numbers for ids: some of the programs behind ir_measures take no others. Equal scores are in the order of doc_id.
    codes, ids = pd.factorize(rows["query_id"])
    documents, known = pd.factorize(rows["doc_id"].astype(str), sort=True)
    padded = pd.Series(documents.astype(str)).str.zfill(len(str(len(known))))
    keys = pd.DataFrame({"query_id": codes.astype(str), "doc_id": padded})
    judged = rows["label"].to_numpy() != UNJUDGED
    retrieved = ~rows["missing"].to_numpy(bool) if "missing" in rows.columns else np.ones(len(rows), bool)
    qrels = keys[judged].assign(relevance=rows["label"].to_numpy()[judged])
    run = keys.assign(score=np.asarray(scores, np.float64))[retrieved]
    try:
        found = pd.DataFrame(ir_measures.iter_calc(wanted, qrels, run))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"ir_measures cannot compute {', '.join(names)} here: {reason}") from error
    found = found.assign(query_id=ids[found["query_id"].astype(int).to_numpy()], measure=found["measure"].map(str))
    return found.pivot(index="query_id", columns="measure", values="value")


def evaluate(
    rows: pd.DataFrame, scores: np.ndarray, measures: Sequence[str] = (), by: str | None = None
) -> dict[str, Any]:
    """Measure a ranking.

    Args:
        rows: a judgments table, with label -1 for documents that are not judged; texts are not needed.
        scores: shape (len(rows),); higher is better.
        measures: as in `per_query`.
        by: a column of `rows` to measure by: each of its values apart, over the rows that hold it.

    Returns:
        Json-friendly: every measure of `metrics.evaluate`, of the judged documents alone where they are measures of
        pairs; "intervals" with the 95% bootstrap intervals by query; "slices" with the same for each value of `by`,
        and "few" where a slice has under 50 queries.
    """
    return summarise(rows, scores, per_query(rows, scores, measures)) | (
        {"slices": measure_slices(rows, scores, measures, by)} if by else {}
    )


def summarise(rows: pd.DataFrame, scores: np.ndarray, queries: pd.DataFrame) -> dict[str, Any]:
    """What `evaluate` gives, of values by query that are there already."""
    judged = rows["label"].to_numpy() != UNJUDGED
    columns = rows["label"].to_numpy()[judged], np.asarray(scores)[judged], rows["query_id"].to_numpy()[judged]
    found: dict[str, float | int] = metrics.evaluate(*columns, ks=())
    means = [name for name in queries.columns if name not in ("query_id", "documents", "pair_accuracy", *_COUNTS)]
    found |= {name: metrics.query_mean(queries[name].to_numpy(np.float64)) for name in means}
    found["unjudged"] = int((~judged).sum())
    ratios = {"pnr": ("concordant", "discordant")}
    intervals = {name: bootstrap(queries[top], queries[bottom]) for name, (top, bottom) in ratios.items()}
    intervals["pair_accuracy"] = bootstrap(queries["concordant"], queries["concordant"] + queries["discordant"])
    intervals |= {name: bootstrap(queries[name]) for name in means}
    return jsonable(found) | {"intervals": {name: [*jsonable(ends).values()] for name, ends in intervals.items()}}


def measure_slices(rows: pd.DataFrame, scores: np.ndarray, measures: Sequence[str], by: str) -> dict[str, Any]:
    """What `evaluate` gives for each value of a column; `query_words` needs none."""
    if by == "query_words" and by not in rows.columns:
        rows = rows.assign(query_words=[min(len(query.split()), 10) for query in rows["query"]])
    if by not in rows.columns:
        raise TableError(f"There is no column '{by}' to measure by; there are: {', '.join(rows.columns)}.")
    # Documents that are not judged have no values of their own; they go where their query is.
    values = rows[by].where(rows[by].notna(), rows.groupby("query_id")[by].transform("first"))
    slices = {}
    for value, part in rows.groupby(values, sort=True):
        taken = scores[rows.index.get_indexer(part.index)]
        found = evaluate(part, taken, measures)
        slices[str(value)] = found | {"few": found["queries"] < FEW_QUERIES}
    return slices


def jsonable(values: Mapping[str, Any] | Iterable[float]) -> dict[Any, Any]:
    """The numbers with None for inf and nan, which JSON lacks; those of a sequence by their place."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {name: value if math.isfinite(value) else None for name, value in pairs}


class RankingEvaluator(BaseEvaluator):
    """Measures judgments while a model trains, as `evaluator=` of sentence-transformers or by a call.

    `RankingTrainer` and `DistillationTrainer` give the same numbers for their eval_dataset.

    Args:
        judgments: a judgments table with texts.
        name: goes before the names of the measures, as `name_ndcg@10`.
    """

    primary_metric = "ndcg@10"

    def __init__(self, judgments: pd.DataFrame, name: str = "") -> None:
        super().__init__()
        self.judgments, self.name = judgments, name
        self.primary_metric = f"{name}_ndcg@10" if name else "ndcg@10"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The measures of a `Ranker` or a `CrossEncoder` as it stands; the last three arguments are not used."""
        from sentence_transformers import CrossEncoder
        from torch.nn import Identity

        pairs: list[Any] = pair_texts(self.judgments)
        options: dict[str, Any] = {}
        if isinstance(model, CrossEncoder):
            pairs = [(query, STUDENT_TEMPLATES.render_document(**document)) for query, document in pairs]
            options = {"activation_fn": Identity(), "show_progress_bar": False}
        labels, queries = self.judgments["label"].to_numpy(), self.judgments["query_id"].to_numpy()
        found = metrics.evaluate(labels, model.predict(pairs, **options), queries)
        return {f"{self.name}_{name}" if self.name else name: value for name, value in found.items()}
