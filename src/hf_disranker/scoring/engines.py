"""Scoring backends: an in-process model or an HTTP server."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import requests
import torch
from requests.adapters import HTTPAdapter
from scipy.special import logsumexp
from urllib3.util import Retry

from hf_disranker.data.templates import STUDENT_TEMPLATES
from hf_disranker.models.checkpoint import RAW_LOGITS, load_config
from hf_disranker.models.loading import check_head, check_labels, check_loaded_head, has_own_input, is_ranker
from hf_disranker.models.ranker import Ranker, score_in_halves
from hf_disranker.scoring.provenance import describe_model, describe_module, tokenizer_digest, versions

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

Pair = tuple[str, dict[str, str]]
Callback = Callable[[int], None]


class Engine(Protocol):
    """Interface of a scoring backend."""

    @property
    def tokens(self) -> int:
        """Number of tokens read so far; 0 if the backend does not count them."""

    def describe(self) -> dict[str, Any]:
        """Describe everything that affects the scores, for the manifest: weights, config, tokenizer, templates ..."""

    def predict(self, pairs: Sequence[Pair], callback: Callback | None = None) -> np.ndarray:
        """Score (query, {"title", "summary"}) pairs; raise an exception if none can be scored.

        After each batch, `callback` is called with its number of pairs.

        Returns:
            Raw logits in the order of the pairs, shape (len(pairs),), float32; NaN for a pair that cannot be scored.
        """


@dataclass
class RankerEngine:
    """Backend for a `Ranker`; `teacher` is its name in the manifest."""

    ranker: Ranker
    teacher: str

    @property
    def tokens(self) -> int:
        """Number of tokens read so far, without padding."""
        return self.ranker.tokens

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        model = self.ranker.model
        return {
            "teacher": self.teacher,
            **describe_model(model, model.config),
            "tokenizer": tokenizer_digest(self.ranker.tokenizer),
            "versions": versions("torch", "transformers"),
            **self.ranker.describe(),
        }

    def predict(self, pairs: Sequence[Pair], callback: Callback | None = None) -> np.ndarray:
        """See `Engine`."""
        return self.ranker.predict(pairs, callback=callback)


@dataclass
class CrossEncoderEngine:
    """Backend for any reranker of sentence-transformers: a head of any modules, or a model that answers yes or no.

    Its input is the query, and title and summary of the document as one string; its scores are raw logits. `teacher`
    is the name in the manifest; `batch_size`, the pairs per forward pass, is halved when the GPU runs out of memory.
    Of several labels it ranks by `label_index`: the score is the log-odds of that label's softmax probability, for two
    labels the difference of their logits.

    Raises:
        ValueError: If the model has several labels and none is chosen, or the chosen one is not among them.
    """

    model: CrossEncoder
    teacher: str
    batch_size: int = 32
    label_index: int | None = None
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_labels(self.teacher, self.model.num_labels, self.label_index)

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        tokenizer = self.model.tokenizer
        return {
            "teacher": self.teacher,
            **describe_model(self.model, self.model.config),
            "tokenizer": tokenizer_digest(tokenizer, tokenizer.chat_template),
            "engine": "sentence-transformers",
            "versions": versions("torch", "transformers", "sentence-transformers"),
            "templates": STUDENT_TEMPLATES.to_dict(),
            "modules": [describe_module(module) for module in self.model],
            "prompts": self.model.prompts,
            "default_prompt_name": self.model.default_prompt_name,
            "max_length": self.model.max_seq_length,
            "activation": RAW_LOGITS["activation_fn"],
            "label_index": self.label_index,
        }

    def predict(self, pairs: Sequence[Pair], callback: Callback | None = None) -> np.ndarray:
        """See `Engine`."""
        texts = [(query, STUDENT_TEMPLATES.render_document(**document)) for query, document in pairs]
        # Longest first over all pairs, as `CrossEncoder.predict` does.
        order = np.argsort([-len(query) - len(document) for query, document in texts], kind="stable")
        scores, start = np.zeros(len(pairs), np.float32), 0
        while start < len(pairs):
            rows = order[start : start + self.batch_size]
            scores[rows] = score_in_halves(self._forward, [texts[row] for row in rows], self._reduce_batch_size)
            start += len(rows)
            if callback:
                callback(len(rows))
        return scores

    def _forward(self, texts: Sequence[tuple[str, str]]) -> np.ndarray:
        options = {"activation_fn": torch.nn.Identity(), "show_progress_bar": False}
        logits = self.model.predict(list(texts), batch_size=self.batch_size, **options).astype(np.float32)
        if self.label_index is None:
            return logits
        return logits[:, self.label_index] - logsumexp(np.delete(logits, self.label_index, axis=1), axis=1)

    def _reduce_batch_size(self, texts: Sequence[tuple[str, str]]) -> None:
        self.batch_size = max(1, min(self.batch_size, len(texts)) // 2)
        logger.warning("Out of memory: continuing with batch_size %d.", self.batch_size)


def load_engine(
    model: str,
    dtype: str = "auto",
    token_budget: int | None = None,
    generative: bool = False,
    label_index: int | None = None,
) -> RankerEngine | CrossEncoderEngine:
    """Load a checkpoint as a `Ranker` if it is one, else as a `CrossEncoder`, on this process's GPU if there is one.

    Args:
        model: Folder or Hub id.
        dtype: Precision of the weights; "auto" keeps the checkpoint's own.
        token_budget: Tokens per forward pass of a `Ranker`.
        generative: If True, load a causal language model as a reranker that answers yes or no. One that was saved by
            sentence-transformers does not need it.
        label_index: Label to rank by, of a classifier with several; see `CrossEncoderEngine`.

    Raises:
        OSError: If the model is neither a folder nor on the Hub.
        ValueError: If the checkpoint has no ranking head, several labels of which none is chosen, or only an adapter;
            or if a token budget is given for a CrossEncoder.
    """
    config = load_config(model)
    check_head(model, config, generative, label_index)
    if is_ranker(config) and label_index is None and not has_own_input(model, config):
        return RankerEngine(Ranker.from_pretrained(model, process_device(), token_budget, dtype=dtype), model)
    if token_budget:
        raise ValueError(f"{model} is scored by sentence-transformers, which has no token budget: omit token_budget.")
    from sentence_transformers import CrossEncoder  # imports scikit-learn; a ranker does without

    encoder = CrossEncoder(model, device=process_device(), model_kwargs={"dtype": dtype})
    check_loaded_head(model, encoder.transformers_model)
    return CrossEncoderEngine(encoder, model, label_index=label_index)


def process_device() -> str:
    """Return this process's GPU under `accelerate launch`, or "cpu"."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


class Server(NamedTuple):
    """Request and response format of a kind of server."""

    path: str
    query: str  # request fields of the query and the documents
    documents: str
    options: dict[str, Any]  # further request fields, which ask for raw scores
    results: str | None  # response field of the list of results; None if the response is that list
    score: str  # field of the score in a result


_VLLM_OPTIONS = {"use_activation": False, "truncate_prompt_tokens": -1}
SERVERS = {
    "vllm": Server("/score", "text_1", "text_2", _VLLM_OPTIONS, "data", "score"),
    "tei": Server("/rerank", "query", "texts", {"raw_scores": True, "truncate": True}, None, "score"),
    "infinity": Server("/rerank", "query", "documents", {"raw_scores": True}, "results", "relevance_score"),
}
# Retried: the server is busy or down. A text that it cannot read is not.
_BUSY = (408, 429, 500, 502, 503, 504)
_UNREADABLE = (400, 413, 422)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class HttpEngine:
    """Backend for a server: vLLM, Text Embeddings Inference or Infinity.

    Args:
        server: A key of `SERVERS`.
        url: Base URL, such as http://localhost:8000.
        model: Name of the teacher, sent with each request.
        batch_size: Documents per request, all of one query, so that servers can share its prefix.
        concurrency: Number of concurrent requests.
        retries: Number of retries while the server is down or busy, after 1, 2, 4 ... 120 seconds or as it asks.
    """

    server: str
    url: str
    model: str
    batch_size: int = 32
    concurrency: int = 8
    retries: int = 8
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.server not in SERVERS:
            raise ValueError(f"There is no server kind {self.server!r}; there are: {', '.join(SERVERS)}.")
        # allowed_methods=None retries POST too: scoring twice does no harm.
        retry = Retry(
            self.retries, status_forcelist=_BUSY, allowed_methods=None, backoff_factor=1, raise_on_status=False
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=self.concurrency, max_retries=retry))
        if key := os.environ.get("HF_DISRANKER_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """See `Engine`; a server reveals neither weights, config nor tokenizer, so the name identifies the teacher."""
        unknown = dict.fromkeys(("revision", "weights", "config", "tokenizer", "dtype"))
        known = {"engine": self.server, "versions": {}, "templates": STUDENT_TEMPLATES.to_dict()}
        return {"teacher": self.model} | unknown | known

    def predict(self, pairs: Sequence[Pair], callback: Callback | None = None) -> np.ndarray:
        """See `Engine`; raises OSError if the server is down, refuses the request, or returns no scores."""
        scores = np.full(len(pairs), np.nan, np.float32)
        documents = [STUDENT_TEMPLATES.render_document(**document) for _, document in pairs]
        batches = []
        for query, group in groupby(range(len(pairs)), key=lambda row: pairs[row][0]):
            rows = list(group)
            batches += [(query, rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency) as threads:
            futures = [threads.submit(self._score, query, [documents[row] for row in rows]) for query, rows in batches]
            try:
                for (_, rows), future in zip(batches, futures, strict=True):
                    scores[rows] = future.result()
                    if callback:
                        callback(len(rows))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return scores

    def _score(self, query: str, documents: list[str]) -> list[float]:
        """Score the documents of a query; NaN for one that the server cannot read or does not score."""
        server = SERVERS[self.server]
        body = {"model": self.model, server.query: query, server.documents: documents, **server.options}
        response = self._session.post(f"{self.url.rstrip('/')}{server.path}", json=body, timeout=(10, 600))
        scores = None if response.status_code in _UNREADABLE else self._read(response, len(documents))
        if scores is None and len(documents) > 1:
            half = len(documents) // 2
            return self._score(query, documents[:half]) + self._score(query, documents[half:])
        if scores is None or any(map(math.isnan, scores)):
            logger.warning("%s returned no score for a document: %.200s", self.url, response.text)
        return scores or [math.nan]

    def _read(self, response: requests.Response, documents: int) -> list[float] | None:
        """Read the scores of a response, NaN where not a number; None for an error or an incomplete list."""
        if not response.ok:
            raise OSError(f"{response.url} returned {response.status_code}: {response.text:.200}")
        server = SERVERS[self.server]
        try:
            content = response.json()
            about = content if isinstance(content, dict) else {}
            if about.get("error") or about.get("object") == "error":
                return None
            results = content[server.results] if server.results else content
            scores = {one.get("index"): _number(one.get(server.score)) for one in results}
            with self._lock:
                self.tokens += (about.get("usage") or {}).get("prompt_tokens") or 0
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OSError(
                f"{response.url} returned no scores of {documents} documents: {response.text:.200}"
            ) from error
        if len(results) != documents or scores.keys() != set(range(documents)):
            return None
        return [scores[place] for place in range(documents)]


def _number(score: Any) -> float:
    """Convert a number, or a list of one number, to float; NaN for anything else or beyond float32."""
    if isinstance(score, list) and len(score) == 1:
        score = score[0]
    if isinstance(score, bool) or not isinstance(score, int | float):
        return math.nan
    return float(score) if abs(score) <= _LARGEST else math.nan
