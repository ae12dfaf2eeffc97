"""A `Ranker` without torch and transformers: an exported student on onnxruntime or OpenVINO.

pip install --no-deps hf-disranker
pip install onnxruntime tokenizers huggingface_hub numpy
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hf_disranker.data.templates import Templates
from hf_disranker.models.base import Pair, PairRanker, listed

FILES = ("onnx/model.onnx", "openvino/openvino_model.xml")
_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_TOKEN_BUDGET, _MOST_PADDING = 2048, 0.1  # of a batch; a call costs less than the padding of a large one


class Ranker(PairRanker):
    """Scores documents for a query, as `hf_disranker.Ranker` does: with the checkpoint's templates and limits.

    Threads can share one.

    Args:
        folder: what `disranker export` wrote.
        file: the model in it; None takes the first of `FILES` that is there.
        threads: of a forward pass; None lets the engine choose.

    Raises:
        FileNotFoundError: the folder holds no exported model.
    """

    def __init__(self, folder: str | os.PathLike, file: str | None = None, threads: int | None = None) -> None:
        found = [name for name in ([file] if file else FILES) if Path(folder, name).exists()]
        if not found:
            raise FileNotFoundError(f"{folder} holds no {file or 'exported model'}; `disranker export` writes one.")
        marker = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["disranker"]
        self.templates = Templates(**marker["templates"])
        self._queries = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        self._queries.no_padding()
        self._pairs = Tokenizer.from_str(self._queries.to_str())
        self._queries.enable_truncation(marker["max_query_length"])
        self._pairs.enable_truncation(marker["max_length"], strategy="only_second")
        self._run = _engine(Path(folder, found[0]), threads)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, file: str | None = None, **options: Any) -> Ranker:
        """As the class, or from the Hub, where no `file` is the first. Options: threads, revision, token ...

        Raises:
            OSError: neither a folder nor on the Hub.
        """
        threads = options.pop("threads", None)
        if not os.path.isdir(name_or_path):
            from huggingface_hub import snapshot_download

            file = file or FILES[0]
            wanted = ["config.json", "tokenizer.json", str(Path(file).with_suffix(".*"))]
            try:
                name_or_path = snapshot_download(os.fspath(name_or_path), allow_patterns=wanted, **options)
            except (OSError, ValueError) as error:
                raise OSError(f"{name_or_path}: no such folder, and as a Hub id: {error}") from error
        return cls(name_or_path, file, threads)

    def predict(self, pairs: Sequence[Pair] | Pair) -> np.ndarray:
        """See `PairRanker`."""
        pairs, alone = listed(pairs)
        scores = np.zeros(len(pairs), dtype=np.float32)
        shorter = {query: self._shorten(query) for query in {query for query, _ in pairs}}
        rows = self._pairs.encode_batch_fast([(shorter[query], self._text(document)) for query, document in pairs])
        lengths = np.array([len(row.ids) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            chosen = order[start : start + max(1, _TOKEN_BUDGET // longest)]
            chosen = chosen[lengths[chosen] >= (1 - _MOST_PADDING) * longest]
            scores[chosen] = self._forward([rows[row] for row in chosen])
            start += len(chosen)
        return scores[0] if alone else scores

    def _shorten(self, query: str) -> str:
        encoded = self._queries.encode(query, add_special_tokens=False)
        return self.templates.render_query(query[: encoded.offsets[-1][1]] if encoded.overflowing else query)

    def _forward(self, rows: list[Any]) -> np.ndarray:
        batch = {name: np.zeros((len(rows), len(rows[0].ids)), dtype=np.int64) for name in _INPUTS}
        for name, field in _INPUTS.items():
            for place, row in enumerate(rows):  # the longest first; what lies behind a shorter one is masked
                batch[name][place, : len(row.ids)] = getattr(row, field)
        return self._run(batch)[:, 0]


def _engine(path: Path, threads: int | None) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """What gives the logits, shape (rows, 1), of a batch of arrays by name, shape (rows, tokens)."""
    if path.suffix == ".xml":
        import openvino

        # By itself it computes in bfloat16 where the processor can, which swaps documents of close scores.
        config = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        compiled = openvino.Core().compile_model(path, "CPU", config)
        local = threading.local()  # a request holds the tensors of its call

        def run(batch: dict[str, np.ndarray]) -> np.ndarray:
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            return local.request.infer(batch)[0]

        return run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, batch)[0]
