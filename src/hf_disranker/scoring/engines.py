"""Scoring backends: a model in this process, or a server over HTTP."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import requests
import torch
from accelerate.utils.memory import should_reduce_batch_size
from requests.adapters import HTTPAdapter
from sentence_transformers import CrossEncoder
from urllib3.util import Retry

from hf_disranker.data.templates import STUDENT_TEMPLATES
from hf_disranker.models.checkpoint import load_config
from hf_disranker.models.loading import check_head, check_labels, check_loaded_head, is_ranker
from hf_disranker.models.ranker import Ranker
from hf_disranker.scoring.provenance import of_model, of_module, tokenizer_digest

logger = logging.getLogger(__name__)

Pair = tuple[str, dict[str, str]]


class Engine(Protocol):
    """What scoring asks of whoever computes the scores."""

    @property
    def tokens(self) -> int:
        """Read so far, for the progress line; 0 where nobody counts them."""

    def describe(self) -> dict[str, Any]:
        """What decides the scores, for the manifest: weights, config, tokenizer, dtype, templates, limits ..."""

    def predict(self, pairs: Sequence[Pair], callback: Callable[[int], None] | None = None) -> np.ndarray:
        """Raw logits of (query, {"title", "summary"}) pairs in their order, shape (len(pairs),), float32.

        NaN where a single pair cannot be scored; an exception where nothing can. On the way `callback` is called with
        the number of pairs that were scored since the last call.
        """


@dataclass
class RankerEngine:
    """A ranker of ours, or a checkpoint that reads as one.

    Args:
        ranker: the teacher.
        teacher: its name, for the manifest.
    """

    ranker: Ranker
    teacher: str

    @property
    def tokens(self) -> int:
        """Read so far, without padding."""
        return self.ranker.tokens

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        collator, model = self.ranker.collator, self.ranker.model
        return {
            "teacher": self.teacher,
            **of_model(model, model.config),
            "tokenizer": tokenizer_digest(collator.tokenizer),
            "engine": "transformers",
            "versions": _versions("torch", "transformers"),
            "templates": collator.templates.to_dict(),
            "max_length": collator.max_length,
            "max_query_length": collator.max_query_length,
        }

    def predict(self, pairs: Sequence[Pair], callback: Callable[[int], None] | None = None) -> np.ndarray:
        """See `Engine`."""
        return self.ranker.predict(pairs, callback=callback)


@dataclass
class CrossEncoderEngine:
    """Any reranker of sentence-transformers: one label, or a language model that answers yes or no.

    It reads the query and the document as title and summary in one string.

    Args:
        model: the `CrossEncoder`.
        teacher: its name, for the manifest.
        batch_size: pairs of a forward pass; halved when the memory does not hold them.

    Raises:
        ValueError: the model gives more than one score.
    """

    model: CrossEncoder
    teacher: str
    batch_size: int = 32
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_labels(self.teacher, self.model.num_labels)

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        tokenizer = self.model.tokenizer
        return {
            "teacher": self.teacher,
            **of_model(self.model, self.model.config),
            "tokenizer": tokenizer_digest(tokenizer, tokenizer.chat_template),
            "engine": "sentence-transformers",
            "versions": _versions("torch", "transformers", "sentence-transformers"),
            "templates": STUDENT_TEMPLATES.to_dict(),
            "modules": [of_module(module) for module in self.model],
            "prompts": self.model.prompts,
            "default_prompt_name": self.model.default_prompt_name,
            "max_length": self.model.max_seq_length,
        }

    def predict(self, pairs: Sequence[Pair], callback: Callable[[int], None] | None = None) -> np.ndarray:
        """See `Engine`."""
        texts = [(query, STUDENT_TEMPLATES.render_document(**document)) for query, document in pairs]
        # The longest first, as the CrossEncoder itself would have it of all texts together.
        order = np.argsort([-len(query) - len(document) for query, document in texts], kind="stable")
        scores, start = np.zeros(len(pairs), np.float32), 0
        while start < len(pairs):
            rows = order[start : start + self.batch_size]
            if (batch := self._forward([texts[row] for row in rows])) is not None:
                scores[rows] = batch
                start += len(rows)
                if callback:
                    callback(len(rows))
        return scores

    def _forward(self, texts: list[tuple[str, str]]) -> np.ndarray | None:
        """The scores of one batch; None where the memory does not hold it, with half the batch size from then on."""
        options = {"activation_fn": torch.nn.Identity(), "show_progress_bar": False}
        try:
            return self.model.predict(texts, batch_size=self.batch_size, **options).astype(np.float32)
        except RuntimeError as error:
            if len(texts) == 1 or not should_reduce_batch_size(error):
                raise
        torch.cuda.empty_cache()
        self.batch_size = max(1, min(self.batch_size, len(texts)) // 2)
        logger.warning("Out of memory: going on with batch_size %d.", self.batch_size)
        return None


def load_engine(
    model: str, dtype: str = "auto", token_budget: int | None = None, generative: bool = False
) -> RankerEngine | CrossEncoderEngine:
    """The engine that fits a checkpoint: a ranker of ours where it reads as one, else a CrossEncoder.

    It runs on the GPU of this process, if there is one.

    Args:
        model: folder or Hub id.
        dtype: precision of the weights; "auto" takes the checkpoint's own.
        token_budget: as in `Ranker`; a CrossEncoder has none.
        generative: read a causal language model as a reranker that answers yes or no. One that sentence-transformers
            saved as such says so itself.

    Raises:
        OSError: neither a folder nor on the Hub.
        ValueError: the checkpoint holds no ranking head, one with several labels, or an adapter alone.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    config = load_config(model)
    check_head(model, config, generative)
    if is_ranker(config):
        return RankerEngine(Ranker.from_pretrained(model, device, token_budget, dtype=dtype), model)
    encoder = CrossEncoder(model, device=device, model_kwargs={"dtype": dtype})
    check_loaded_head(model, encoder.transformers_model)
    return CrossEncoderEngine(encoder, model)


@dataclass(frozen=True)
class Server:
    """How one kind of server is asked for the scores of a query's documents.

    Args:
        path: where it takes them.
        query: what it calls the query.
        documents: what it calls the documents.
        raw: what else is sent: the wish for raw scores.
        results: where its answer holds the list of results; None where the answer is that list.
        score: what a result calls its score.
    """

    path: str
    query: str
    documents: str
    raw: dict[str, Any]
    results: str | None
    score: str


SERVERS = {
    "vllm": Server(
        "/score", "text_1", "text_2", {"use_activation": False, "truncate_prompt_tokens": -1}, "data", "score"
    ),
    "tei": Server("/rerank", "query", "texts", {"raw_scores": True, "truncate": True}, None, "score"),
    "infinity": Server("/rerank", "query", "documents", {"raw_scores": True}, "results", "relevance_score"),
}
# Too busy, or not there for the moment: asked again. A text that cannot be read is not.
_BUSY = (408, 429, 500, 502, 503, 504)
_UNREADABLE = (400, 413, 422)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class HttpEngine:
    """A server that scores: vLLM, Text Embeddings Inference or Infinity.

    Args:
        server: a key of `SERVERS`.
        url: where it listens, such as http://localhost:8000.
        model: the teacher's name, sent along.
        batch_size: documents of one request; all are of one query, so that servers can share its prefix.
        concurrency: requests under way at a time.
        per_second: requests begun in a second at most; None sets no limit.
        retries: how often a request is repeated while the server is away or busy, after 1, 2, 4 ... 120 seconds or
            when the server says.
    """

    server: str
    url: str
    model: str
    batch_size: int = 32
    concurrency: int = 8
    per_second: float | None = None
    retries: int = 8
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.server not in SERVERS:
            raise ValueError(f"There is no server kind {self.server!r}; there are: {', '.join(SERVERS)}.")
        # POST as well: to score twice does no harm.
        again = Retry(
            self.retries, status_forcelist=_BUSY, allowed_methods=None, backoff_factor=1, raise_on_status=False
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=self.concurrency, max_retries=again))
        if key := os.environ.get("HF_DISRANKER_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()
        self._next = 0.0

    def describe(self) -> dict[str, Any]:
        """See `Engine`; a server shows neither weights, config nor tokenizer: the teacher's name stands for them."""
        unknown = dict.fromkeys(("revision", "weights", "config", "tokenizer", "dtype"))
        how = {"engine": self.server, "versions": {}, "templates": STUDENT_TEMPLATES.to_dict()}
        return {"teacher": self.model} | unknown | how

    def predict(self, pairs: Sequence[Pair], callback: Callable[[int], None] | None = None) -> np.ndarray:
        """See `Engine`.

        Raises:
            OSError: the server is away, refuses us, or answers with something else than scores.
        """
        scores = np.full(len(pairs), np.nan, np.float32)
        documents = [STUDENT_TEMPLATES.render_document(**document) for _, document in pairs]
        batches = []
        for query, group in groupby(range(len(pairs)), key=lambda row: pairs[row][0]):
            rows = list(group)
            batches += [(query, rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency) as threads:
            asked = [threads.submit(self._score, query, [documents[row] for row in rows]) for query, rows in batches]
            try:
                for (_, rows), answer in zip(batches, asked, strict=True):
                    scores[rows] = answer.result()
                    if callback:
                        callback(len(rows))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return scores

    def _score(self, query: str, documents: list[str]) -> list[float]:
        """The scores of a query's documents; NaN for one that the server cannot read or gives no score."""
        server = SERVERS[self.server]
        self._wait()
        body = {"model": self.model, server.query: query, server.documents: documents, **server.raw}
        answer = self._session.post(f"{self.url.rstrip('/')}{server.path}", json=body, timeout=(10, 600))
        scores = None if answer.status_code in _UNREADABLE else self._read(answer, len(documents))
        if scores is None and len(documents) > 1:
            half = len(documents) // 2
            return self._score(query, documents[:half]) + self._score(query, documents[half:])
        if scores is None or any(map(math.isnan, scores)):
            logger.warning("%s gives no score of a document: %.200s", self.url, answer.text)
        return scores or [math.nan]

    def _read(self, answer: requests.Response, documents: int) -> list[float] | None:
        """The scores in an answer, NaN for what is no number; None for an error or not each document once.

        Raises:
            OSError: it is no answer to the question.
        """
        if not answer.ok:
            raise OSError(f"{answer.url} answers {answer.status_code}: {answer.text:.200}")
        server = SERVERS[self.server]
        try:
            content = answer.json()
            about = content if isinstance(content, dict) else {}
            if about.get("error") or about.get("object") == "error":
                return None
            found = content[server.results] if server.results else content
            scores = {one.get("index"): _number(one.get(server.score)) for one in found}
            with self._lock:
                self.tokens += (about.get("usage") or {}).get("prompt_tokens") or 0
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OSError(f"{answer.url} gives no scores of {documents} documents: {answer.text:.200}") from error
        if len(found) != documents or scores.keys() != set(range(documents)):
            return None
        return [scores[place] for place in range(documents)]

    def _wait(self) -> None:
        """Hold a request back until the rate allows it."""
        if self.per_second:
            with self._lock:
                at = max(self._next, time.monotonic())
                self._next = at + 1 / self.per_second
            time.sleep(max(0.0, at - time.monotonic()))


def _number(score: Any) -> float:
    """A score as float; NaN unless it is one number, or a list of one, that float32 holds."""
    if isinstance(score, list) and len(score) == 1:
        score = score[0]
    if isinstance(score, bool) or not isinstance(score, int | float):
        return math.nan
    return float(score) if abs(score) <= _LARGEST else math.nan


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
