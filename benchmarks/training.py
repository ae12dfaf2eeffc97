"""Training speed and memory against sentence-transformers on the same rows and the same model.

    python benchmarks/training.py --quick                    # minutes on two CPU cores
    python benchmarks/training.py --layers 6 --size 384      # the shape of MiniLM-L6
    accelerate launch --num_processes 1 benchmarks/training.py --layers 12 --size 768 --queries 32     # on a GPU

A row is a query with all its documents and a teacher score for each. sentence-transformers receives it as one n-tuple,
or as triplets of the best document with each other one. The systems alternate, each in a separate process; figures are
the median over rounds of the median step, excluding the first two steps. Documents/s counts every document of a
forward pass. A preference pair is a teacher margin that the loss compares: n (n - 1) / 2 for n documents with ours,
n - 1 with `MarginMSELoss`, which compares the first document with each other one. Peak memory is that of the GPU or,
on a CPU, the peak resident memory of the process, including libraries. Runs in fp32 by default, and also in bf16 if
matrix products are at least as fast in it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import MarginMSELoss
from speed import limits, make_stock, precisions
from transformers import AutoTokenizer, TrainerCallback

from hf_disranker import BertDistilledRanker, DistillationConfig, DistillationTrainer
from hf_disranker.recipes.quickstart.from_scratch import small_bert, train_wordpiece
from hf_disranker.training.sentence_transformers import to_n_tuples

PEERS = {"sentence-transformers, n-tuples": "tuples", "sentence-transformers, triplets": "triplets"}
SYSTEMS = ("ours", "ours, token budget", *PEERS)
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
MAX_LENGTH = 256


class StepTimes(TrainerCallback):
    """Record the seconds of each optimizer step, excluding data loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock after the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def make_rows(queries: int, documents: int) -> Dataset:
    """Create queries of 3 to 8 words with documents of log-normal length, about 50 words, and teacher scores."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(3000)])

    def text(length: float) -> str:
        return " ".join(rng.choice(words, max(1, int(length))))

    rows = []
    for query in range(queries):
        ids = [f"{query}-{place}" for place in range(documents)]
        summaries = [text(length) for length in rng.lognormal(3.7, 0.6, documents).clip(5, 200)]
        scores = rng.normal(size=documents).tolist()
        row = {
            "query_id": str(query),
            "query": text(int(rng.integers(3, 9))),
            "doc_ids": ids,
            "titles": [""] * documents,
        }
        rows.append(row | {"summaries": summaries, "teacher_scores": scores})
    return Dataset.from_list(rows)


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the rows as groups, n-tuples and triplets, and a random model."""
    rows = make_rows(args.queries * args.steps, args.documents)
    rows.save_to_disk(folder / "groups")
    to_n_tuples(rows, args.documents).save_to_disk(folder / "tuples")
    to_n_tuples(rows, 2).save_to_disk(folder / "triplets")
    texts = [row["query"] for row in rows] + [text for row in rows for text in row["summaries"]]
    tokenizer = train_wordpiece(texts[:20_000], vocab_size=5000, max_length=MAX_LENGTH)
    torch.manual_seed(0)
    model = small_bert(tokenizer, layers=args.layers, size=args.size)
    for name in ("model", "stock"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_stock(folder / "stock")


def run_one(system: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Train one system for some steps and return its speed and memory."""
    times = StepTimes()
    options = {"output_dir": str(folder / "out"), "max_steps": args.steps, "bf16": args.precision == "bf16"}
    options |= {"per_device_train_batch_size": args.queries, "report_to": "none", "save_strategy": "no"}
    options |= {"disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "logging_steps": 1000, "seed": 0}
    torch.manual_seed(0)
    seen, compared = args.queries * args.documents, (args.documents - 1) / 2  # documents per step, pairs per document
    if system in PEERS:
        width = 2 if PEERS[system] == "triplets" else args.documents
        options["per_device_train_batch_size"] = seen // width  # as many documents per step
        compared = 1 - 1 / width
        model = CrossEncoder(str(folder / "stock"), max_length=MAX_LENGTH)
        assert type(model[0].model).__name__ == "BertForSequenceClassification"
        trainer = CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(**options),
            train_dataset=load_from_disk(str(folder / PEERS[system])),
            loss=MarginMSELoss(model),
        )
    else:
        if system == "ours, token budget":
            # As many pairs per step on average: a padded pair has about 90 tokens.
            options["token_budget"] = args.queries * args.documents * 90
        trainer = DistillationTrainer(
            model=BertDistilledRanker.from_pretrained(folder / "model"),
            args=DistillationConfig(
                **options, eval_strategy="no", point_weight=0.0, margin_weight=1.0, max_length=MAX_LENGTH
            ),
            train_dataset=load_from_disk(str(folder / "groups")),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
    trainer.add_callback(times)
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    if system == "ours, token budget":
        loader = trainer.get_train_dataloader()
        seen = args.documents * statistics.mean(len(batch) for batch in loader.batch_sampler)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * max_resident()
    step = statistics.median(times.seconds[2:])
    return {
        "documents": seen / step,
        "pairs": compared * seen / step,
        "step": step,
        "memory": memory / 2**20,
        "wall": wall,
    }


def max_resident() -> int:
    """Return the peak resident memory of this process in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run all systems alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--queries", type=int, default=8, help="queries per step")
    parser.add_argument("--documents", type=int, default=16, help="documents per query")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS.values()))
    parser.add_argument("--quick", action="store_true", help="a BERT of 4 layers x 128, 4 queries, 2 rounds")
    parser.add_argument("--out", help="write the results to this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.size, args.queries, args.rounds = 4, 128, 4, 2
    if args.one:
        args.precision = args.precision[0]
        print(json.dumps(run_one(args.one[0], Path(args.one[1]), args)))
        return
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    args.precision = args.precision or [PRECISIONS[name] for name in precisions(limits("cuda" if gpu else "cpu"))]
    print(f"BERT {args.layers} x {args.size}, {args.queries} queries x {args.documents} documents per step, {device}")
    print(f"{'':40}{'documents/s':>12}{'pairs/s':>12}{'step, ms':>10}{'peak, MiB':>11}")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args)
        shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "size", "queries", "documents", "steps")]
        for precision in args.precision:
            runs: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
            for turn in range(args.rounds):
                for system in SYSTEMS[:: 1 if turn % 2 else -1]:
                    command = [sys.executable, __file__, *shape, "--precision", precision, "--one", system, folder]
                    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    runs[system].append(json.loads(output.splitlines()[-1]))
            for system, rounds in runs.items():
                row = {name: statistics.median(run[name] for run in rounds) for name in rounds[0]}
                print(
                    f"{precision} {system:35}{row['documents']:12.0f}{row['pairs']:12.0f}{1000 * row['step']:10.0f}"
                    f"{row['memory']:11.0f}",
                    flush=True,
                )
                found[f"{precision} {system}"] = row
    if args.out:
        results = {"device": device, "torch": torch.__version__, "arguments": vars(args), "rows": found}
        Path(args.out).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
