"""`Ranker` without torch and transformers: an exported student on onnxruntime or OpenVINO.

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
from tqdm.auto import tqdm

from hf_disranker.data.templates import Templates
from hf_disranker.models.base import Pair, PairRanker, check_batch_size, listed

FILES = ("onnx/model.onnx", "openvino/openvino_model.xml")
_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_TOKEN_BUDGET, _MOST_PADDING = 2048, 0.1  # per batch; a call costs less than the padding of a large batch


class Ranker(PairRanker):
    """Scores documents for a query as `hf_disranker.Ranker` does, with the checkpoint's templates and limits.

    Threads can share one.

    Args:
        folder: Folder of `disranker export`.
        file: Model file in it; None for the first existing one of `FILES`.
        threads: Threads of a forward pass; None for the engine's default.

    Raises:
        FileNotFoundError: If the folder has no exported model.
    """

    def __init__(self, folder: str | os.PathLike, file: str | None = None, threads: int | None = None) -> None:
        found = [name for name in ([file] if file else FILES) if Path(folder, name).exists()]
        if not found:
            raise FileNotFoundError(f"{folder} has no {file or 'exported model'}; `disranker export` writes one.")
        marker = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["disranker"]
        self.templates = Templates(**marker["templates"])
        self._queries = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        self._queries.no_padding()
        self._pairs = Tokenizer.from_str(self._queries.to_str())
        self._queries.enable_truncation(marker["max_query_length"])
        self._pairs.enable_truncation(marker["max_length"], strategy="only_second")
        self._run = _engine(Path(folder, found[0]), threads)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        file: str | None = None,
        threads: int | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Ranker:
        """Load from a folder, as the class does, or from the Hub.

        Args:
            name_or_path: Folder or Hub id.
            file: As in the class; on the Hub, None for the first of `FILES`.
            threads: As in the class.
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub.
            cache_dir: Folder of downloads.
            local_files_only: If True, use only what was downloaded before.

        Raises:
            OSError: If there is no such folder or Hub repository.
        """
        if not os.path.isdir(name_or_path):
            from huggingface_hub import snapshot_download

            file = file or FILES[0]
            wanted = ["config.json", "tokenizer.json", str(Path(file).with_suffix(".*"))]
            hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            hub |= {"local_files_only": local_files_only, "allow_patterns": wanted}
            try:
                name_or_path = snapshot_download(os.fspath(name_or_path), **hub)
            except (OSError, ValueError) as error:
                raise OSError(f"{name_or_path}: no such folder, and as a Hub id: {error}") from error
        return cls(name_or_path, file, threads)

    def predict(
        self, pairs: Sequence[Pair] | Pair, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> np.ndarray:
        """See `PairRanker.predict`."""
        check_batch_size(batch_size)
        pairs, alone = listed(pairs)
        scores = np.zeros(len(pairs), dtype=np.float32)
        shorter = {query: self._shorten(query) for query in {query for query, _ in pairs}}
        rows = self._pairs.encode_batch_fast([(shorter[query], self._text(document)) for query, document in pairs])
        lengths = np.array([len(row.ids) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        start = 0
        with tqdm(total=len(pairs), desc="pairs", unit=" pairs", disable=not show_progress_bar) as bar:
            while start < len(order):
                longest = lengths[order[start]]
                chosen = order[start : start + (batch_size or max(1, _TOKEN_BUDGET // longest))]
                if batch_size is None:
                    chosen = chosen[lengths[chosen] >= (1 - _MOST_PADDING) * longest]
                scores[chosen] = self._forward([rows[row] for row in chosen])
                start += len(chosen)
                bar.update(len(chosen))
        return scores[0] if alone else scores

    def _shorten(self, query: str) -> str:
        encoded = self._queries.encode(query, add_special_tokens=False)
        return self.templates.render_query(query[: encoded.offsets[-1][1]] if encoded.overflowing else query)

    def _forward(self, rows: list[Any]) -> np.ndarray:
        batch = {name: np.zeros((len(rows), len(rows[0].ids)), dtype=np.int64) for name in _INPUTS}
        for name, field in _INPUTS.items():
            for place, row in enumerate(rows):  # the longest first; shorter ones are padded and masked
                batch[name][place, : len(row.ids)] = getattr(row, field)
        return self._run(batch)[:, 0]


def _engine(path: Path, threads: int | None) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return a function from arrays by name, shape (rows, tokens), to logits, shape (rows, 1)."""
    if path.suffix == ".xml":
        import openvino

        # The default is bfloat16 where the processor supports it, which swaps documents with close scores.
        config = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        compiled = openvino.Core().compile_model(path, "CPU", config)
        local = threading.local()  # a request owns the tensors of its call

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
