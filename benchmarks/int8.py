"""Ways to int8 side by side: how far scores move, and how far they move with their batch.

    python benchmarks/int8.py --model runs/quickstart/student --pairs runs/quickstart/data/judgments.parquet

Each way scores the pairs in batches of 32 of like length and again in batches of 5 at random; one of them takes a pair
at a time, so that its scale is that pair's own.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from hf_disranker import Ranker, export, metrics
from hf_disranker.data import pair_texts

Rows = list[dict[str, list[int]]]
BATCHES = (32, 5)


def batch(rows: Rows) -> dict[str, np.ndarray]:
    """Padded arrays of tokenised rows."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {key: np.array([row[key] + [0] * (longest - len(row[key])) for row in rows]) for key in rows[0]}


def score(path: Path, rows: Rows, order: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Scores in the order of the rows, and pairs in a second of processor time on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session, scores = onnxruntime.InferenceSession(str(path), options), np.zeros(len(rows))
    start = time.process_time()
    for at in range(0, len(rows), size):
        places = order[at : at + size]
        scores[places] = session.run(None, batch([rows[place] for place in places]))[0][:, 0]
    return scores, len(rows) / (time.process_time() - start)


class Calibration(CalibrationDataReader):
    """Some of the rows, one at a time."""

    def __init__(self, rows: Rows) -> None:
        chosen = np.random.default_rng(1).choice(len(rows), min(256, len(rows)), replace=False)
        self.rows: Iterator[Any] = (batch([rows[place]]) for place in chosen)

    def get_next(self) -> Any:
        """The next one, or None."""
        return next(self.rows, None)


def variants(folder: Path, model: Any, rows: Rows) -> Iterator[tuple[str, Path, tuple[int, int]]]:
    """Each way's name, file and sizes of batches."""
    plain = folder / "fp32.onnx"
    onnx.save(model, plain)
    yield "fp32", plain, BATCHES
    quantize_dynamic(plain, folder / "dynamic.onnx", weight_type=QuantType.QInt8)
    yield "dynamic, one scale a tensor", folder / "dynamic.onnx", BATCHES
    yield "dynamic, one scale a tensor, a pair at a time", folder / "dynamic.onnx", (1, 1)
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True, "weight_type": QuantType.QInt8}
    quantize_static(plain, folder / "static.onnx", Calibration(rows), activation_type=QuantType.QUInt8, **options)
    yield "static, one scale a tensor, calibrated on 256 pairs", folder / "static.onnx", BATCHES
    for size, level, what in ((32, 4, "int8"), (128, 4, "int8"), (32, 1, "fp32")):
        quantizer = MatMulNBitsQuantizer(onnx.load(plain), 8, size, is_symmetric=True, accuracy_level=level)
        quantizer.process()
        path = folder / f"blocks_{size}_{what}.onnx"
        quantizer.model.save_model_to_file(str(path))
        yield f"blocks of {size}, {what} activations", path, BATCHES


def main() -> None:
    """Make every variant, score, print the table."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The student: a folder.")
    parser.add_argument("--pairs", required=True, help="Judgments or candidates with texts.")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--max_pairs", type=int, default=5000)
    args = parser.parse_args()
    ranker = Ranker.from_pretrained(args.model, device="cpu")
    wanted = export.ExportArguments(args.model, "", "onnx", args.pairs, split=args.split, max_pairs=args.max_pairs)
    table = export.read_pairs(wanted, ranker)
    queries, texts = table["query_id"].to_numpy(), pair_texts(table)
    rows = ranker.collator.encode(
        [q for q, _ in texts], [ranker.collator.templates.render_document(**d) for _, d in texts]
    )
    by_length = np.argsort([-len(row["input_ids"]) for row in rows.rows], kind="stable")
    random = np.random.default_rng(0).permutation(len(rows.rows))
    groups = table.reset_index(drop=True).groupby("query_id").indices.values()
    print(f"{len(table):,} pairs\n\n| | largest difference | tau | same first | moved by its batch | pairs/CPU-s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path, (large, small) in variants(Path(folder), export.onnx_model(ranker), rows.rows):
            scores, speed = score(path, rows.rows, by_length, large)
            again, _ = score(path, rows.rows, random, small)
            if name == "fp32":
                expected = scores
            tau = metrics.query_mean(metrics.kendall_tau(scores, expected, queries))
            first = np.mean([scores[group].argmax() == expected[group].argmax() for group in groups])
            moved = np.abs(scores - again).max()
            difference = np.abs(scores - expected).max()
            print(f"| {name} | {difference:.2g} | {tau:.4f} | {first:.1%} | {moved:.2g} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
