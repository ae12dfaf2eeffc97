"""Throughput and memory of the score store without a model, by table size.

    python benchmarks/store.py --rows 1000000 10000000

A stub engine scores the pairs, so only input checks, the corpus join and the shards are measured. Each size runs in a
separate process and reports its peak memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS = 200_000
PER_QUERY = 50
SHARD_ROWS = 100_000


def write_tables(folder: Path, rows: int) -> None:
    """Write candidates in files of a million rows, 50 documents per query, and documents of 400 characters."""
    words = np.random.default_rng(0).integers(10**9, 10**10, (DOCUMENTS, 40)).astype(str)
    ids = np.char.add("d", np.arange(DOCUMENTS).astype(str))
    corpus = {"doc_id": ids, "title": words[:, 0], "summary": [" ".join(row[1:]) for row in words]}
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    (folder / "pairs").mkdir()
    for start in range(0, rows, 1_000_000):
        place = np.arange(start, min(rows, start + 1_000_000))
        query = np.char.add("q", (place // PER_QUERY).astype(str))
        table = {"query_id": query, "query": np.char.add("what is known about ", query)}
        table |= {"doc_id": ids[place * 7919 % DOCUMENTS], "rank": (place % PER_QUERY).astype(np.int32)}
        pq.write_table(pa.table(table), folder / "pairs" / f"{start:012d}.parquet")


def measure(folder: Path) -> dict[str, float]:
    """Check, score and read back; return rows/s of each and the peak memory in MB."""
    from hf_disranker.data.candidates import Candidates
    from hf_disranker.scoring.run import ScoringRun
    from hf_disranker.scoring.store import ScoreStore

    class Stub:
        tokens = 0

        def describe(self) -> dict:
            return {"teacher": "stub", "weights": "stub"}

        def predict(self, pairs: Sequence[Any], callback: Callable[[int], None] | None = None) -> np.ndarray:
            return np.fromiter((len(document["summary"]) for _, document in pairs), np.float32, len(pairs))

    start = peak_mb()
    candidates = Candidates(folder / "pairs", folder / "corpus.parquet")
    times = [time.perf_counter()]
    candidates.check()
    times.append(time.perf_counter())
    store = ScoreStore(folder / "scores")
    assert ScoringRun(Stub(), candidates, store, SHARD_ROWS).run() == len(candidates)
    times.append(time.perf_counter())
    assert store.summary().scored == len(candidates)
    times.append(time.perf_counter())
    check, score, status = np.diff(times)
    size = sum(file.stat().st_size for file in (folder / "scores").glob("*.parquet")) / len(candidates)
    rates = {"check rows/s": len(candidates) / check, "score rows/s": len(candidates) / score, "status s": status}
    return rates | {"bytes/row": size, "MB at start": start, "peak MB": peak_mb()}


def peak_mb() -> float:
    """Return the peak memory of this process in MB; Linux only (getrusage includes the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Print a row for each table size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(Path(args.folder))))
        return
    for number, rows in enumerate(args.rows):
        with tempfile.TemporaryDirectory() as folder:
            write_tables(Path(folder), rows)
            command = [sys.executable, __file__, "--folder", folder]
            results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if number == 0:
            print(f"{'rows':>12}", *(f"{name:>14}" for name in results))
        print(f"{rows:>12,}", *(f"{value:>14,.1f}" for value in results.values()), flush=True)


if __name__ == "__main__":
    main()
