"""Stage 4: evaluation of rankings, with intervals by query.

There are two settings. A model *re-ranks* judged documents: all of them are ranked, equal scores share their gain, and
queries without a relevant document are left out. A *run* is a list of retrieved documents and is evaluated as in
trec_eval: documents that it lacks earn nothing, queries without results or without a relevant document count 0, and
equal scores (in float32) rank by falling doc_id. Rows of a run have the column `missing`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hf_disranker.data.schema import TableError
from hf_disranker.data.trec import KEY
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.significance import bootstrap

logger = logging.getLogger(__name__)

# Label of an unjudged document of a run.
UNJUDGED = -1
# Slices with fewer queries are flagged as small.
FEW_QUERIES = 50


def join_run(judgments: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """Join judgments with a run's scores, appending unjudged run documents with label -1.

    Both tables need no texts. Warnings count documents that are missing or unjudged, and queries missing from the run.

    Returns:
        The rows of `judgments`, then the unjudged ones, with the columns `score` (float64) and `missing`: True for a
        judged document that the run lacks, whose score is below all scores of the run.

    Raises:
        TableError: If no judged pair is in the run.
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
    # float64: in float32, subtracting 1 may not change a large score.
    scores = rows["teacher_score"].to_numpy(np.float64)
    labels = rows["label"].where(~unjudged, UNJUDGED).astype(np.int64)
    score = np.where(missing, np.nanmin(scores) - 1.0, scores)
    return rows.drop(columns=["teacher_score", "found"]).assign(label=labels, score=score, missing=missing)


def best_passages(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Reduce passages to documents, with the highest score and the highest label of each document's passages.

    `column` has the document of a passage; where it is empty, a passage is its own document.
    """
    if column not in rows.columns:
        raise TableError(f"There is no column '{column}' with the document of each passage.")
    owner = rows[column].where(rows[column].notna(), rows["doc_id"]).astype(str)
    rows = rows.assign(doc_id=owner).sort_values("score", ascending=False, kind="stable")
    label = rows.groupby(KEY)["label"].transform("max")
    return rows.assign(label=label).drop_duplicates(KEY).sort_index()


def per_query(rows: pd.DataFrame, scores: np.ndarray, measures: Sequence[str] = ()) -> pd.DataFrame:
    """Compute the measures of each query.

    Args:
        rows: Columns query_id, doc_id, label (-1 for unjudged documents) and, for a run, `missing`.
        scores: Shape (len(rows),); higher is better.
        measures: Names of additional ir_measures measures, computed by that package in both settings.

    Returns:
        A row per query, sorted by query_id, with the columns query_id, documents (number of judged ones), those of
        `metrics.by_query` and the additional measures. NaN where a query does not define a measure.
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
        values |= {name: among_judged[name] for name in (*metrics.PAIRS, "pair_accuracy")}
    table = pd.DataFrame({"query_id": names, "documents": documents, **values})
    return table.join(_ir_measures(rows, scores, measures), on="query_id") if measures else table


def _run_order(rows: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """Replace scores by distinct ones in the order of trec_eval: by float32 score, then by doc_id."""
    order = np.lexsort((pd.factorize(rows["doc_id"], sort=True)[0], np.asarray(scores, np.float32)))
    places = np.empty(len(rows))
    places[order] = np.arange(len(rows))
    return places


def _ir_measures(rows: pd.DataFrame, scores: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Compute ir_measures measures, a column each, indexed by query_id."""
    try:
        import ir_measures
    except ImportError as error:
        raise ValueError("Further measures need ir_measures: pip install hf-disranker[eval]") from error
    try:
        wanted = [ir_measures.parse_measure(name) for name in dict.fromkeys(names)]
    except (NameError, ValueError, SyntaxError, AssertionError) as error:
        raise ValueError(f"ir_measures knows no such measure as {', '.join(names)}: {error}") from error
    # Numeric ids, as some providers of ir_measures require, that keep the order of doc_id for equal scores.
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
    rows: pd.DataFrame,
    scores: np.ndarray,
    measures: Sequence[str] = (),
    by: str | None = None,
    queries: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Evaluate a ranking, and its slices by the values of the column `by`.

    `queries` is the result of `per_query` if it is known already; other arguments as there.

    Returns:
        Values for json: all measures of `metrics.evaluate`, pair measures over judged documents only; "intervals" with
        95% bootstrap intervals by query; "slices" with the same for each value of `by`, and "few" set to True for
        slices of under 50 queries.
    """
    queries = per_query(rows, scores, measures) if queries is None else queries
    judged = rows["label"].to_numpy() != UNJUDGED
    columns = rows["label"].to_numpy()[judged], np.asarray(scores)[judged], rows["query_id"].to_numpy()[judged]
    found: dict[str, float | int] = metrics.evaluate(*columns, ks=())
    means = queries.columns.difference(["query_id", "documents", "pair_accuracy", *metrics.PAIRS], sort=False)
    found |= {name: metrics.query_mean(queries[name].to_numpy(np.float64)) for name in means}
    found["unjudged"] = int((~judged).sum())
    intervals = {"pnr": bootstrap(queries["concordant"], queries["discordant"])}
    intervals["pair_accuracy"] = bootstrap(queries["concordant"], queries["concordant"] + queries["discordant"])
    intervals |= {name: bootstrap(queries[name]) for name in means}
    result: dict[str, Any] = dict(zip(found, _jsonable(found.values()), strict=True))
    result["intervals"] = {name: _jsonable(ends) for name, ends in intervals.items()}
    return result | ({"slices": _slices(rows, scores, measures, by)} if by else {})


def _slices(rows: pd.DataFrame, scores: np.ndarray, measures: Sequence[str], by: str) -> dict[str, Any]:
    """Evaluate each value of a column, or each query length for `query_words`."""
    if by == "query_words" and by not in rows.columns:
        rows = rows.assign(query_words=[min(len(query.split()), 10) for query in rows["query"]])
    if by not in rows.columns:
        raise TableError(f"There is no column '{by}' to measure by; there are: {', '.join(rows.columns)}.")
    # Unjudged documents have no values of their own and join the slice of their query.
    values = rows[by].where(rows[by].notna(), rows.groupby("query_id")[by].transform("first"))
    slices = {}
    for value, part in rows.reset_index(drop=True).groupby(values.to_numpy(), sort=True):
        found = evaluate(part, scores[part.index], measures)
        slices[str(value)] = found | {"few": found["queries"] < FEW_QUERIES}
    return slices


def value_text(measures: Mapping[str, Any], name: str, digits: int = 4) -> str:
    """Format a measure: "inf" for PNR without discordant pairs, "n/a" where it is not defined."""
    if measures[name] is not None:
        return f"{measures[name]:.{digits}f}" if isinstance(measures[name], float) else str(measures[name])
    return "inf" if name == "pnr" and measures["concordant"] else "n/a"


def interval_text(measures: Mapping[str, Any], name: str, digits: int = 4, separator: str = ", ") -> str:
    """Format the ends of a 95% interval, "inf" where PNR has none; empty if there is no interval."""
    low, high = measures["intervals"].get(name) or (None, None)
    if low is None and (name != "pnr" or not measures["concordant"]):
        return ""
    return separator.join("inf" if end is None else f"{end:.{digits}f}" for end in (low, high))


def _jsonable(values: Iterable[float]) -> list[float | None]:
    """Replace inf and nan, which json lacks, by None."""
    return [value if math.isfinite(value) else None for value in values]
