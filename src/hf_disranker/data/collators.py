"""Collators: pairs for scoring, groups for training.

Tokenisation runs here, in the workers of the data loader, not in the training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_disranker.data.templates import Templates

# Tokens left for a document after the longest query: special tokens, template words and a few tokens of text.
_DOCUMENT_ROOM = 16
# Keys of a row, and their names in `tokenizers`.
_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Encoded:
    """Tokenised rows, and the number of truncated queries and documents."""

    rows: list[dict[str, list[int]]]
    queries_cut: int
    documents_cut: int


@dataclass
class PairCollator:
    """Tokenise (query, document) pairs with a model's templates.

    The query is truncated to its own limit, then the document to that of the pair. Thread-safe: the collator works on
    copies of the tokenizer, which must be a fast one, and does not change its settings.

    Raises:
        ValueError: If the limits leave no room for a document.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    max_length: int  # maximum number of tokens per pair, special tokens included
    max_query_length: int

    def __post_init__(self) -> None:
        if self.max_query_length + _DOCUMENT_ROOM > self.max_length:
            raise ValueError(
                f"max_query_length {self.max_query_length} leaves no room for a document within max_length "
                f"{self.max_length}; it can be {self.max_length - _DOCUMENT_ROOM} at most."
            )
        self._whole = copy.deepcopy(self.tokenizer.backend_tokenizer)
        self._whole.no_padding()
        self._whole.no_truncation()
        self._cut = copy.deepcopy(self._whole)
        reads_pairs = self.templates.text is None
        self._cut.enable_truncation(self.max_length, strategy="only_second" if reads_pairs else "longest_first")
        self._fields = {key: field for key, field in _FIELDS.items() if key in self.tokenizer.model_input_names}

    def encode(self, queries: list[str], documents: list[str]) -> Encoded:
        """Tokenise queries and rendered documents, one each per pair, without padding."""
        shorter = self._shorten(set(queries))
        rendered = [self.templates.render_query(shorter.get(query, query)) for query in queries]
        documents = [self._prefix(document) for document in documents]
        queries_cut = sum(query in shorter for query in queries)
        if self.templates.document_first:
            rows, cut = self._cut_inside(rendered, documents)
            return Encoded(rows, queries_cut, cut)
        if self.templates.text is None:
            encodings, cut = self._join(rendered, documents)
        else:
            texts = [self.templates.render_text(*pair) for pair in zip(rendered, documents, strict=True)]
            encodings = self._cut.encode_batch_fast(texts)
            cut = sum(1 for encoding in encodings if encoding.overflowing)
        rows = [{key: getattr(encoding, field) for key, field in self._fields.items()} for encoding in encodings]
        return Encoded(rows, queries_cut, cut)

    def _cut_inside(self, queries: list[str], documents: list[str]) -> tuple[list[dict[str, list[int]]], int]:
        """Tokenise texts with the document first; what is too long loses the end of the document, not of the text."""
        assert self.templates.text is not None
        before = len(self.templates.text.split("{document}")[0].format())
        texts = [self.templates.render_text(*pair) for pair in zip(queries, documents, strict=True)]
        rows, cut = [], 0
        for document, encoding in zip(documents, self._whole.encode_batch(texts), strict=True):
            start = end = 0
            if (over := len(encoding) - self.max_length) > 0:
                last = before + max(len(document.rstrip()) - 1, 0)
                end = (encoding.char_to_token(last) or 0) + 1
                start, cut = end - over, cut + 1
                if start <= (encoding.char_to_token(before) or 0):
                    raise ValueError(f"max_length {self.max_length} leaves no room for a document; raise it.")
            columns = {key: getattr(encoding, field) for key, field in self._fields.items()}
            rows.append({key: values[:start] + values[end:] for key, values in columns.items()})
        return rows, cut

    def _join(self, queries: list[str], documents: list[str]) -> tuple[list[Any], int]:
        """Like `tokenizer(queries, documents, truncation="only_second")`, but tokenising each distinct text once."""
        texts = list(dict.fromkeys([*queries, *documents]))
        parts = dict(zip(texts, self._whole.encode_batch_fast(texts, add_special_tokens=False), strict=True))
        room = self.max_length - self._cut.num_special_tokens_to_add(is_pair=True)
        pairs = [(parts[query], parts[document]) for query, document in zip(queries, documents, strict=True)]
        cut = sum(len(query) + len(document) > room for query, document in pairs)
        return [self._cut.post_process(query, document) for query, document in pairs], cut

    def pad(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad rows of `encode` into tensors of shape (rows, longest)."""
        fill = {"input_ids": self.tokenizer.pad_token_id}
        return {
            key: pad_sequence(
                [torch.tensor(row[key]) for row in rows],
                batch_first=True,
                padding_value=fill.get(key, 0),
                padding_side=self.tokenizer.padding_side,
            )
            for key in rows[0]
        }

    def _prefix(self, document: str) -> str:
        """Return the first `max_length` words, since the tokenizer encodes a text whole before truncating it."""
        words = document.split(None, self.max_length)
        return document[: -len(words[-1])] if len(words) > self.max_length else document

    def _shorten(self, queries: set[str]) -> dict[str, str]:
        """Map the queries above the limit to their truncated texts."""
        # A token has at least one byte, of the query or the space before it, so most queries need no check.
        suspects = sorted(query for query in queries if len(query.encode()) >= self.max_query_length)
        if not suspects:
            return {}
        encodings = self._whole.encode_batch(suspects, add_special_tokens=False)
        last = self.max_query_length - 1
        return {
            query: query[: encoding.offsets[last][1]]
            for query, encoding in zip(suspects, encodings, strict=True)
            if len(encoding) > self.max_query_length
        }


@dataclass
class GroupCollator:
    """Collate rows of `load_groups` into a flat batch of pairs with labels and teacher scores.

    The batch has the padded pairs of all groups in order, shape (pairs, longest), and of shape (groups, docs) `mask`,
    True where a document exists, `labels` and `teacher_scores`, float, NaN where unknown. A gather or scatter by
    `mask` converts between the two shapes.
    """

    pairs: PairCollator

    def encode_pairs(self, groups: list[dict[str, Any]]) -> Encoded:
        """Tokenise all pairs of the groups, in order."""
        queries = [group["query"] for group in groups for _ in group["doc_ids"]]
        documents = [
            self.pairs.templates.render_document(title, summary)
            for group in groups
            for title, summary in zip(group["titles"], group["summaries"], strict=True)
        ]
        return self.pairs.encode(queries, documents)

    def encode(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the tokenised pairs to each group, as the key `rows`."""
        rows = iter(self.encode_pairs(groups).rows)
        return [group | {"rows": list(islice(rows, len(group["doc_ids"])))} for group in groups]

    def __call__(self, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate groups of any sizes, whether or not tokenised by `encode`."""
        encoded = groups if all("rows" in group for group in groups) else self.encode(groups)
        batch = self.pairs.pad([row for group in encoded for row in group["rows"]])
        sizes = torch.tensor([len(group["doc_ids"]) for group in groups])
        mask = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
        batch["mask"] = mask
        for key in ("labels", "teacher_scores"):
            values = [value for group in groups for value in _values(group, key)]
            batch[key] = torch.full(mask.shape, torch.nan).masked_scatter(
                mask, torch.tensor(values, dtype=torch.float)
            )
        return batch


def prefetch_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like `map`, computing the next result in a thread while the caller uses the current one."""
    with ThreadPoolExecutor(1) as thread:
        current = None
        for item in items:
            following = thread.submit(function, item)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()


def budget_batches(lengths: np.ndarray, token_budget: int, sizes: np.ndarray | None = None) -> list[np.ndarray]:
    """Batch rows, longest first, with at most `token_budget` tokens per batch, padding included.

    Sorting by length minimises padding; with the longest first, running out of memory shows at once.

    Args:
        lengths: Tokens per row, or of the longest pair per group, shape (rows,).
        token_budget: Maximum of pairs times longest pair; a longer row is a batch of its own.
        sizes: Number of pairs per row if a row is a group, shape (rows,).

    Returns:
        Row numbers, an array per batch; rows of equal length keep their order.
    """
    batches: list[list[int]] = []
    pairs = 0
    for row in np.argsort(-lengths, kind="stable"):
        size = 1 if sizes is None else int(sizes[row])
        pairs += size
        if not batches or pairs * lengths[batches[-1][0]] > token_budget:
            batches.append([])
            pairs = size
        batches[-1].append(int(row))
    return [np.array(batch) for batch in batches]


def runs_within(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Batch rows of the given lengths in order; return the row numbers of each batch.

    A batch may exceed the budget, which counts shared prefixes for each row, by part of its last row.
    """
    number = (np.cumsum(lengths) - lengths) // token_budget
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(number)) + 1) if len(lengths) else []


def _values(group: dict[str, Any], key: str) -> list[float]:
    """Return a value per document of a group, NaN where unknown."""
    documents = len(group["doc_ids"])
    values = [None] * documents if group.get(key) is None else group[key]
    if len(values) != documents:
        name = group.get("query_id", group["query"])
        raise ValueError(f"Query {name!r}: {len(values)} {key} for {documents} documents.")
    return [torch.nan if value is None else value for value in values]
