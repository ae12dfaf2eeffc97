"""PairRanker: ranking by pair scores, with torch or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_disranker.data.templates import Templates

Document = str | Mapping[str, str | None]
Pair = tuple[str, Document]


class PairRanker(ABC):
    """Ranks documents by the scores of `predict`."""

    templates: Templates

    @abstractmethod
    def predict(
        self, pairs: Sequence[Pair] | Pair, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> np.ndarray:
        """Score (query, document) pairs.

        Args:
            pairs: Pairs, or a single one that is not in a list. A document is a string or a mapping with title and
                summary; one that is missing, None or NaN is an empty text.
            batch_size: Pairs of a forward pass; None batches by tokens.
            show_progress_bar: If True, show a progress bar.

        Returns:
            Raw logits in the order of `pairs`, shape (len(pairs),), float32; for a single pair its score.
        """

    def probabilities(self, pairs: Sequence[Pair] | Pair) -> np.ndarray:
        """Return the logistic function of `predict`, of the same shape, float32 between 0 and 1.

        The order is that of the raw scores; values are calibrated only if the training labels were probabilities.
        """
        return (1.0 / (1.0 + np.exp(-self.predict(pairs).astype(np.float64)))).astype(np.float32)

    def rank(
        self,
        query: str,
        documents: Sequence[Document],
        top_k: int | None = None,
        return_documents: bool = True,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> list[dict[str, Any]]:
        """Sort documents for a query, best first.

        Args:
            query: Query as typed.
            documents: Strings, or mappings with title and summary.
            top_k: Number of documents to return; None for all.
            return_documents: If True, results have the key "text"; the default of `CrossEncoder.rank` is False.
            batch_size: As in `predict`.
            show_progress_bar: As in `predict`.

        Returns:
            For each document {"corpus_id": its index in `documents`, "score": float, "text": str}, as
            `CrossEncoder.rank` does.
        """
        scores = self.predict([(query, document) for document in documents], batch_size, show_progress_bar)
        ranking = []
        for place in np.argsort(-scores, kind="stable")[:top_k]:
            row: dict[str, Any] = {"corpus_id": int(place), "score": float(scores[place])}
            ranking.append(row | {"text": self._text(documents[place])} if return_documents else row)
        return ranking

    def _text(self, document: Document) -> str:
        if isinstance(document, str):
            return document
        if not isinstance(document, Mapping) or (document and not document.keys() & {"title", "summary"}):
            raise ValueError(f"A document is a string or a mapping with title and summary, not {document!r:.80}.")
        return self.templates.render_document(document.get("title"), document.get("summary"))


def listed(pairs: Sequence[Pair] | Pair) -> tuple[Sequence[Pair], bool]:
    """Return (query, document) pairs as a list, and whether a single pair was given.

    Raises:
        ValueError: If it is neither.
    """
    if len(pairs) == 2 and isinstance(pairs[0], str) and not isinstance(pairs, str):
        return [(pairs[0], pairs[1])], True  # type: ignore[list-item]
    if any(isinstance(pair, str) for pair in pairs[:1]):
        raise ValueError(f"Give pairs (query, document), or a single one, not {pairs!r:.80}.")
    return pairs, False  # type: ignore[return-value]


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError for a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; None batches by tokens.")
