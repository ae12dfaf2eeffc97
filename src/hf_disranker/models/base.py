"""What every ranker makes of its scores, with torch or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_disranker.data.templates import Templates

Document = str | Mapping[str, str]


class PairRanker(ABC):
    """Sorts documents by the scores that `predict` gives."""

    templates: Templates

    @abstractmethod
    def predict(self, pairs: Sequence[tuple[str, Document]]) -> np.ndarray:
        """Raw logits of (query, document) pairs in their order, shape (len(pairs),), float32."""

    def probabilities(self, pairs: Sequence[tuple[str, Document]]) -> np.ndarray:
        """The logistic function of `predict`, shape (len(pairs),), float32 between 0 and 1.

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
        return self.templates.render_document(document["title"], document["summary"])
