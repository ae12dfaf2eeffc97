"""NDCG as a module of `evaluate`: a wrapper of hf_disranker.evaluation.metrics."""

import datasets
import evaluate
import numpy

from hf_disranker.evaluation import metrics

_DESCRIPTION = """Mean NDCG@k over the queries with a relevant document; ties share their mean gain."""

_INPUTS = """
Args:
    predictions: Scores; higher is better.
    references: Grades, whole numbers >= 0; a fraction is a ValueError.
    query_ids: Query of each row, all strings or all integers.
    ks: Cut-offs, by default 5 and 10; None for the whole ranking.
    gain: "exp2" for 2^label - 1, "linear" for the label.

Returns:
    ndcg@k for each k, and the numbers of queries and of queries without a relevant document.
"""


class NDCG(evaluate.Metric):
    """Normalised discounted cumulative gain."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # Grades as floats, so that a fraction is refused and not truncated to a whole number.
            features=[
                datasets.Features(
                    {
                        "predictions": datasets.Value("float64"),
                        "references": datasets.Value("float64"),
                        "query_ids": datasets.Value(kind),
                    }
                )
                for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions, references, query_ids, ks=(5, 10), gain="exp2"):
        columns = references, predictions, query_ids
        values = {k: metrics.ndcg(*columns, k=k, gain=gain) for k in ks}
        first = next(iter(values.values()))
        return {
            **{f"ndcg@{k}" if k else "ndcg": metrics.query_mean(found) for k, found in values.items()},
            "queries": len(first),
            "queries_without_relevant": int(numpy.isnan(first).sum()),
        }
