"""Latency of a search with 10, 50 and 100 documents, for students of several depths and formats.

    python benchmarks/latency.py --budget_ms 10
    python benchmarks/latency.py --student runs/quickstart/student --judgments judgments.parquet

Measured from strings to a sorted list, including tokenisation, one search at a time, as in a server with one worker.
Without `--student`, students have MiniLM's width and random weights. A depth fits the budget if 95% of the searches
do. All formats use `--threads` cores; bf16 is included if matrix products are at least as fast in it.
"""

from __future__ import annotations

# ruff: noqa: E402
import os

os.environ["HF_DISRANKER_NO_AUTO"] = "1"  # measure CrossEncoder as without this package

import argparse
import copy
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from speed import MAX_LENGTH, SHAPES, limits, precisions, read_pairs
from transformers import BertConfig

from hf_disranker import BertDistilledRanker, Ranker, read_table, runtime
from hf_disranker.data.tables import pair_texts
from hf_disranker.recipes.quickstart.from_scratch import train_wordpiece
from hf_disranker.serving import export

DEPTHS, DOCUMENTS = (2, 3, 6), (10, 50, 100)
FEWEST = 20


def make_students(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Path]:
    """Save students of MiniLM's width with random weights and return their folders by depth."""
    tokenizer = train_wordpiece([text for pair in pairs for text in pair], 30_522, MAX_LENGTH)
    students = {}
    for depth in DEPTHS:
        shape = SHAPES["minilm"] | {"num_hidden_layers": depth}
        students[f"{depth} layers"] = folder / str(depth)
        BertDistilledRanker(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / str(depth))
        tokenizer.save_pretrained(folder / str(depth))
    return students


def searches(pairs: list[tuple[str, str]], documents: int, count: int) -> list[tuple[str, list[str]]]:
    """Return queries with a fixed number of documents each, filled up with documents of other queries."""
    texts = [text for _, text in pairs]
    starts = np.random.default_rng(0).integers(max(1, len(texts) - documents), size=count)
    return [(pairs[start][0], texts[start : start + documents]) for start in starts]


def make_rankers(path: Path, folder: Path, dtypes: list[str], threads: int) -> dict[str, Any]:
    """Load all formats of a student; exports skip the parity check, which random weights may fail."""
    ranker = Ranker.from_pretrained(path, device="cpu", dtype="float32")
    rankers = {"CrossEncoder": CrossEncoder(str(path), device="cpu")}
    rankers |= {f"ours {name}": Ranker.from_pretrained(path, device="cpu", dtype=name) for name in dtypes}
    export.write_checkpoint(copy.deepcopy(ranker), folder, weights=False)
    for name, file in zip(("onnx", "openvino"), runtime.FILES, strict=True):
        export.write_format(name, ranker, folder)
        rankers[name] = runtime.Ranker(folder, file, threads)
    return rankers


def measure(ranker: Any, asked: list[tuple[str, list[str]]], limit: float) -> list[float]:
    """Return the seconds of each search after three warm-ups, until all are done or the time limit is reached."""
    seconds: list[float] = []
    for query, texts in asked:
        start = time.perf_counter()
        ranker.rank(query, texts)
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= FEWEST + 3 and sum(seconds) > limit:
            break
    return seconds[3:]


def main() -> None:
    """Print p50, p95 and p99 for each format and depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="folder of a trained student; default: random weights")
    parser.add_argument("--judgments", help="table of judgments; --student ranks its dev queries")
    parser.add_argument("--searches", type=int, default=100, help="searches per figure")
    parser.add_argument("--seconds", type=float, default=3.0, help="time limit per figure, but at least 20 searches")
    parser.add_argument("--budget_ms", type=float, default=10.0, help="latency budget of a search in milliseconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    dtypes = precisions(limits())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.student:
            table = read_table(args.judgments, "judgments", split="dev")
            pairs = [(query, f"{text['title']} {text['summary']}") for query, text in pair_texts(table.head(2000))]
            students = {args.student: Path(args.student)}
        else:
            pairs = read_pairs(2000, Path(folder) / "data")
            students = make_students(Path(folder), pairs)
        print(f"{args.threads} threads, load {os.getloadavg()[0]:.1f}; milliseconds", flush=True)
        print(f"{'':12}{'':22}{'documents':>10}{'p50':>8}{'p95':>8}{'p99':>8}")
        for name, path in students.items():
            rankers = make_rankers(path, Path(folder, "exports", Path(name).name), dtypes, args.threads)
            for way, ranker in rankers.items():
                for documents in DOCUMENTS:
                    seconds = measure(ranker, searches(pairs, documents, args.searches + 3), args.seconds)
                    p50, p95, p99 = (1000 * np.percentile(seconds, (50, 95, 99))).tolist()
                    rows.append(
                        {"student": name, "way": way, "documents": documents, "p50": p50, "p95": p95, "p99": p99}
                    )
                    print(f"{Path(name).name:12}{way:22}{documents:10}{p50:8.1f}{p95:8.1f}{p99:8.1f}", flush=True)
    for documents in DOCUMENTS:
        fits = {row["way"]: row for row in rows if row["documents"] == documents and row["p95"] <= args.budget_ms}
        says = "; ".join(f"{way}: {row['student']}" for way, row in fits.items()) or "none"
        print(f"Deepest within {args.budget_ms:g} ms for {documents} documents: {says}")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
