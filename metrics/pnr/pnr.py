"""Positive-negative ratio as a module of `evaluate`: a shell over hf_disranker.evaluation.metrics."""

import datasets
import evaluate

from hf_disranker.evaluation import metrics

_DESCRIPTION = """Concordant over discordant pairs of documents, over all queries; ties are in neither."""

_INPUTS = """
Args:
    predictions: scores, higher is better.
    references: grades, whole numbers >= 0; a fraction is a ValueError.
    query_ids: which query each row belongs to, all strings or all integers.

Returns:
    pnr (inf without a discordant pair), pair_accuracy, pair_accuracy_per_query, concordant, discordant, tied.
"""


class PNR(evaluate.Metric):
    """Positive-negative ratio."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # Grades as floats, so that a fraction is refused below and not cut to a whole number here.
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

    def _compute(self, predictions, references, query_ids):
        by_query = metrics.query_pair_counts(references, predictions, query_ids)
        pairs = by_query.total
        return {
            "pnr": float(pairs.pnr),
            "pair_accuracy": float(pairs.pair_accuracy),
            "pair_accuracy_per_query": metrics.query_mean(by_query.pair_accuracy),
            **{name: int(count) for name, count in pairs._asdict().items()},
        }
