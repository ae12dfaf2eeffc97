"""Recompute the shipped scores of the showcase: SmolLM2's query likelihood of the embedded data set's pairs.

    make showcase-scores                      # scores into runs/showcase_scores, then packs recipes/showcase/scores
    make showcase-scores ARGS="--top_k 20"

The pairs are the judged pools of the development queries, the quickstart's unlabelled pairs and those with a label or
a click, and BM25's first `top_k` documents of each unlabelled query, sorted by document: what a document costs is then
computed once for all its queries. The time is measured on a few pairs and printed first. An interrupted run
resumes with the missing shards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.tables import pair_texts, read_table, write_table
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.command_line import RecipeParser, recipe_parser
from hf_disranker.recipes.quickstart.stages import bf16_is_faster, make_data
from hf_disranker.recipes.showcase.models import MODELS
from hf_disranker.recipes.showcase.shipped import SHIPPED, pack
from hf_disranker.scoring.engines import RankerEngine, process_device
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import INPUT, ScoreStore

TEMPLATE = "Python documentation of {title}\n{summary}\nIn one sentence: {query}"
DOCUMENT_TOKENS = 40
# Pairs of the measurement that precedes the run.
_TRIAL = 256


@dataclass
class ScoringArguments:
    """Model, pairs and output."""

    model: str = field(default=str(MODELS / "smollm2"), metadata={"help": "Causal language model: folder or Hub id."})
    out: str = field(default="runs/showcase_scores", metadata={"help": "Folder for data and scores."})
    packed: str = field(default=str(SHIPPED), metadata={"help": "Folder for the packed scores."})
    top_k: int = field(default=8, metadata={"help": "BM25's first documents of each unlabelled query."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision; auto: bfloat16 on a GPU or where a CPU is faster with it."}
    )
    shard_rows: int = field(default=2000, metadata={"help": "Pairs per shard, the most a crash can lose."})


def make_parser() -> RecipeParser:
    """Return the argument parser."""
    return recipe_parser("showcase scores", __doc__, ScoringArguments)


def main(args: ScoringArguments) -> None:
    """Score the pairs and pack the scores."""
    out = Path(args.out)
    make_data(out / "data")
    engine = load_teacher(args.model, args.dtype)
    pairs = pairs_to_score(out / "data", args.top_k)
    write_table(pairs, f"{out}/pairs.parquet")
    store = ScoreStore(out / "scores")
    todo = store.missing() if store.is_store() else len(pairs)
    if todo:
        speed = trial_speed(engine, pairs)
        print(f"{todo:,} pairs at {speed:.1f} pairs/s: about {todo / speed / 3600:.1f} hours.", flush=True)
    ScoringRun(engine, Candidates(str(out / "pairs.parquet")), store, args.shard_rows).run()
    manifest = {key: value for key, value in store.manifest().items() if key not in INPUT}
    size = pack(store.read(), manifest, Path(args.packed))
    print(f"{len(pairs):,} scores in {args.packed}, {size / 1e6:.2f} MB.")


def load_teacher(model: str, dtype: str = "auto") -> RankerEngine:
    """Load the showcase's teacher: a language model with the template and the limit of the shipped scores."""
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() or bf16_is_faster() else "float32"
    ranker = Ranker.from_pretrained(
        model,
        process_device(),
        dtype=dtype,
        likelihood=True,
        likelihood_template=TEMPLATE,
        document_tokens=DOCUMENT_TOKENS,
    )
    return RankerEngine(ranker, model)


def pairs_to_score(data: Path, top_k: int) -> pd.DataFrame:
    """Return the pairs as a candidates table with texts, those of a document next to each other."""
    corpus = read_table(f"{data}/corpus.parquet", "corpus")
    candidates = read_table(f"{data}/candidates.parquet", "candidates", corpus=corpus)
    tables = [
        read_table(f"{data}/judgments.parquet", "judgments", split="dev"),
        read_table(f"{data}/unlabelled.parquet", "candidates"),
        read_table(f"{data}/clicks_and_labels.parquet", "judgments"),
        candidates[candidates["rank"] <= top_k],
    ]
    columns = ["query_id", "query", "doc_id", "title", "summary"]
    pairs = pd.concat([table[columns] for table in tables]).drop_duplicates(["query_id", "doc_id"])
    return pairs.sort_values(["doc_id", "query_id"], ignore_index=True)


def trial_speed(engine: RankerEngine, pairs: pd.DataFrame) -> float:
    """Measure the throughput in pairs/s on neighbouring pairs from the middle of the table, after a warm-up."""
    start = len(pairs) // 2
    rows = pair_texts(pairs.iloc[start : start + _TRIAL])
    engine.predict(rows[:16])
    begin = time.perf_counter()
    engine.predict(rows)
    return len(rows) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
