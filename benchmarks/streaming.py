"""Memory of a stream: resident memory and rows/s while training groups are read from a parquet file.

    python benchmarks/streaming.py [--rows 5000000] [--documents 20]

Writes a parquet of that many rows to a temporary folder, reads it once as `RankingTrainer` does (grouped by query,
checked, drawn from a shuffle buffer) and prints a line every tenth. Pages that the system keeps of the file are not
resident memory of the process.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from hf_disranker import load_groups

ROW_GROUP = 50_000


def write(path: Path, rows: int, documents: int) -> None:
    """Rows of random words, all documents of a query together."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    with pq.ParquetWriter(
        path,
        pa.schema(
            [(name, pa.string()) for name in ("query_id", "query", "doc_id", "title", "summary")]
            + [("teacher_score", pa.float32())]
        ),
    ) as file:
        for start in range(0, rows, ROW_GROUP):
            count = min(ROW_GROUP, rows - start)
            number = np.arange(start, start + count)
            queries = (number // documents).astype(str)
            text = words[rng.integers(5000, size=(count, 40))]
            columns: dict[str, Any] = {
                "query_id": queries,
                "query": np.char.add("query ", queries),
                "doc_id": number.astype(str),
            }
            columns |= {"title": [" ".join(row[:6]) for row in text], "summary": [" ".join(row[6:]) for row in text]}
            file.write_table(
                pa.table(columns | {"teacher_score": rng.normal(size=count).astype(np.float32)}, schema=file.schema)
            )


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--shuffle_buffer", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scores.parquet")
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, args.rows, args.documents))
        writer.start()  # its memory is not the reader's
        writer.join()
        print(f"{args.rows} rows, {path.stat().st_size / 2**20:.0f} MiB of parquet")
        groups = load_groups(path, streaming=True).shuffle(seed=0, buffer_size=args.shuffle_buffer)
        process, start, seen = psutil.Process(), time.perf_counter(), 0
        every = args.rows // args.documents // 10
        for number, group in enumerate(groups, 1):
            seen += len(group["doc_ids"])
            if number % every == 0:
                rate = seen / (time.perf_counter() - start)
                print(f"{seen:>9} rows  {process.memory_info().rss / 2**20:6.0f} MiB  {rate:8.0f} rows/s", flush=True)


if __name__ == "__main__":
    main()
