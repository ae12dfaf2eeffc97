"""From texts to tensors: pairs for scoring, whole groups for training.

Tokenisation happens here, in the data loader's workers, never in the training step.
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

# Room for a document behind the longest query allowed: special tokens, the template's words, and a few tokens of text.
_DOCUMENT_ROOM = 16
# Keys of a row, and how `tokenizers` calls them.
_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass
class Encoded:
    """Tokenised rows: for each a dict of lists, and how many queries and documents did not fit whole."""

    rows: list[dict[str, list[int]]]
    queries_cut: int
    documents_cut: int


@dataclass
class PairCollator:
    """Tokenises (query, document) pairs as a model's templates say.

    The query is cut at its own limit, then the document's end at the limit of the whole. Threads can share a collator:
    it reads with copies of the tokenizer, whose limits stay as they are.

    Args:
        tokenizer: a fast tokenizer of the model.
        templates: the model's templates.
        max_length: tokens of a pair at most, special tokens included.
        max_query_length: tokens of a query at most.

    Raises:
        ValueError: the limits leave no room for a document.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    max_length: int
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

    def encode(self, queries: list[str], documents: list[str]) -> Encoded:
        """Tokenise without padding.

        Args:
            queries: one query per pair, as typed.
            documents: one document per pair, as one string.
        """
        shorter = self._shorten(set(queries))
        rendered = [self.templates.render_query(shorter.get(query, query)) for query in queries]
        documents = [self._beginning(document) for document in documents]
        encode = self._encode_pairs if self.templates.text is None else self._encode_texts
        rows, cut = encode(rendered, documents)
        return Encoded(rows, sum(query in shorter for query in queries), cut)

    def _encode_pairs(self, queries: list[str], documents: list[str]) -> tuple[list[dict[str, list[int]]], int]:
        """What `tokenizer(queries, documents, truncation="only_second")` gives, each text being read once."""
        texts = list(dict.fromkeys([*queries, *documents]))
        parts = dict(zip(texts, self._whole.encode_batch_fast(texts, add_special_tokens=False), strict=True))
        room = self.max_length - self._cut.num_special_tokens_to_add(is_pair=True)
        rows, cut = [], 0
        for query, document in zip(queries, documents, strict=True):
            one, two = parts[query], parts[document]
            cut += len(one) + len(two) > room
            pair = self._cut.post_process(one, two)
            rows.append({key: getattr(pair, field) for key, field in _FIELDS.items()})
        return rows, cut

    def _encode_texts(self, queries: list[str], documents: list[str]) -> tuple[list[dict[str, list[int]]], int]:
        texts = [self.templates.render_text(*pair) for pair in zip(queries, documents, strict=True)]
        encodings = self._cut.encode_batch_fast(texts)
        read = {key: field for key, field in _FIELDS.items() if key in self.tokenizer.model_input_names}
        rows = [{key: getattr(encoding, field) for key, field in read.items()} for encoding in encodings]
        return rows, sum(1 for encoding in encodings if encoding.overflowing)

    def pad(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Stack rows of `encode` to tensors of shape (rows, longest)."""
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

    def _beginning(self, document: str) -> str:
        """As many words as there can be tokens, since the tokenizer reads all before it cuts."""
        words = document.split(None, self.max_length)
        return document[: -len(words[-1])] if len(words) > self.max_length else document

    def _shorten(self, queries: set[str]) -> dict[str, str]:
        """What is left of the queries beyond the limit."""
        # A token holds at least one byte, of the query or of the blank put before it: most queries need no look.
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
    """Turns rows of `load_groups` into one flat batch of pairs and what is known of them.

    The batch holds the padded pairs of all groups, shape (pairs, longest), in group order, and over (groups, docs):
    `mask`, True where a document exists; `labels`, float, NaN where none is known; `teacher_scores`, likewise.
    `model_output[mask]` and a scatter by `mask` lead from one shape to the other.

    Args:
        pairs: how a pair is tokenised.
    """

    pairs: PairCollator

    def encode_pairs(self, groups: list[dict[str, Any]]) -> Encoded:
        """All pairs of the groups, tokenised, in their order."""
        queries = [group["query"] for group in groups for _ in group["doc_ids"]]
        documents = [
            self.pairs.templates.render_document(title, summary)
            for group in groups
            for title, summary in zip(group["titles"], group["summaries"], strict=True)
        ]
        return self.pairs.encode(queries, documents)

    def encode(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups with their tokenised pairs, as the further key `rows`."""
        rows = iter(self.encode_pairs(groups).rows)
        return [group | {"rows": list(islice(rows, len(group["doc_ids"])))} for group in groups]

    def __call__(self, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate groups of any sizes, tokenised by `encode` or not."""
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


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`map`, with the next result made in a thread while the caller works with the one before."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            coming = thread.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def budget_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut rows, longest first, into batches that hold at most `token_budget` tokens with their padding.

    Sorting by length leaves almost no padding; the longest first shows at once whether the memory suffices.

    Args:
        lengths: tokens of each row, shape (rows,).
        token_budget: rows times longest row of a batch; a longer row gets a batch of its own.

    Returns:
        Row numbers, an array per batch; every row once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def runs_within(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut rows, in their order, into batches of at most `token_budget` tokens and the rest of one row.

    Args:
        lengths: tokens of each row, shape (rows,).
        token_budget: of a batch, before what its rows share is counted once.

    Returns:
        Row numbers, an array per batch; every row once.
    """
    number = (np.cumsum(lengths) - lengths) // token_budget
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(number)) + 1) if len(lengths) else []


def _values(group: dict[str, Any], key: str) -> list[float]:
    """A value for each document of a group, NaN where none is known."""
    documents = len(group["doc_ids"])
    found = group.get(key)
    if found is None:
        return [torch.nan] * documents
    if len(found) != documents:
        raise ValueError(
            f"Query {group.get('query_id', group['query'])!r}: {len(found)} {key} for {documents} documents."
        )
    return [torch.nan if value is None else value for value in found]
