"""Positive-negative ratio as a module of `evaluate`: a wrapper of hf_disranker.evaluation.metrics."""

import datasets
import evaluate

from hf_disranker.evaluation import metrics

_MEASURES = ("pnr", "pair_accuracy", "pair_accuracy_per_query", "concordant", "discordant", "tied")
_DESCRIPTION = """Concordant over discordant pairs of documents, over all queries; ties count in neither."""

_INPUTS = """
Args:
    predictions: Scores; higher is better.
    references: Grades, whole numbers >= 0; a fraction is a ValueError.
    query_ids: Query of each row, all strings or all integers.

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

    def _compute(self, predictions, references, query_ids):
        measures = metrics.evaluate(references, predictions, query_ids, ks=())
        return {name: measures[name] for name in _MEASURES}
