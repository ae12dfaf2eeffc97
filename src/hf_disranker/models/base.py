"""What every ranker makes of its scores, with torch or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_disranker.data.templates import Templates

Document = str | Mapping[str, str | None]
Pair = tuple[str, Document]


class PairRanker(ABC):
    """Sorts documents by the scores that `predict` gives."""

    templates: Templates

    @abstractmethod
    def predict(self, pairs: Sequence[Pair] | Pair) -> np.ndarray:
        """Raw logits of (query, document) pairs in their order, shape (len(pairs),), float32.

        One pair that is not in a list gives its score alone, as in `CrossEncoder`.
        """

    def probabilities(self, pairs: Sequence[Pair] | Pair) -> np.ndarray:
        """The logistic function of `predict`, of the same shape, float32 between 0 and 1.

        In the order of the raw scores; calibrated only if the labels of the training were probabilities.
        """
        return (1.0 / (1.0 + np.exp(-self.predict(pairs).astype(np.float64)))).astype(np.float32)

    def rank(self, query: str, documents: Sequence[Document], top_k: int | None = None) -> list[dict[str, Any]]:
        """Sort documents for a query, best first.

        Args:
            query: what the user typed.
            documents: strings or mappings with title and summary.
            top_k: how many to give back; None gives all.

        Returns:
            For each document {"corpus_id": its place in `documents`, "score": float, "text": str}, as
            `CrossEncoder.rank` does.
        """
        scores = self.predict([(query, document) for document in documents])
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"corpus_id": int(i), "score": float(scores[i]), "text": self._text(documents[i])} for i in order]

    def _text(self, document: Document) -> str:
        if isinstance(document, str):
            return document
        if not isinstance(document, Mapping) or (document and not document.keys() & {"title", "summary"}):
            raise ValueError(f"A document is a string or a mapping with title and summary, not {document!r:.80}.")
        return self.templates.render_document(document.get("title"), document.get("summary"))


def listed(pairs: Sequence[Pair] | Pair) -> tuple[Sequence[Pair], bool]:
    """(query, document) pairs as a list, and whether there was a single one, not in a list.

    Raises:
        ValueError: it is neither.
    """
    if len(pairs) == 2 and isinstance(pairs[0], str) and not isinstance(pairs, str):
        return [(pairs[0], pairs[1])], True  # type: ignore[list-item]
    if any(isinstance(pair, str) for pair in pairs[:1]):
        raise ValueError(f"Give pairs (query, document), or a single one, not {pairs!r:.80}.")
    return pairs, False  # type: ignore[return-value]
