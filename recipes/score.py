"""Stage 3a: score unlabelled pairs with a teacher.

    disranker score --model runs/teacher --pairs candidates.parquet --corpus corpus.parquet --out runs/scores
    disranker score --model runs/teacher --pairs bm25.run --queries beir --corpus beir --out runs/scores
    disranker score --status runs/scores

`pairs` is a table with the columns query_id, query, doc_id and, unless they are in a corpus, title and summary, or a
TREC run, whose texts are in `queries` and `corpus`, for example of a BEIR folder. The output folder contains parquet
shards and a manifest; an interrupted run resumes with the missing shards. Several workers can share a run: `accelerate
launch -m hf_disranker.recipes.score ...` on the GPUs of a machine, `--num_shards N --shard_index I` in a job array.
Worker i mod n scores shard i.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.templates import LIKELIHOOD_TEMPLATE
from hf_disranker.models.ranker import DEFAULT_DOCUMENT_TOKENS, Ranker
from hf_disranker.recipes.command_line import RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.scoring.engines import SERVERS, Engine, HttpEngine, RankerEngine, load_engine, process_device
from hf_disranker.scoring.run import ScoringRun, verify
from hf_disranker.scoring.store import ScoreStore

LIKELIHOOD_OPTIONS = ("likelihood_template", "document_tokens", "gguf_file")
LOCAL_OPTIONS = ("generative", "label_index", "dtype", "token_budget", "likelihood", *LIKELIHOOD_OPTIONS)
SERVER_OPTIONS = ("url", "concurrency")


@dataclass(kw_only=True)
class LikelihoodArguments(TableArguments):
    """Scoring by query likelihood, without labels."""

    likelihood: bool = field(
        default=False, metadata={"help": "If true, score by log P(query | document) under any causal language model."}
    )
    likelihood_template: str = field(
        default=LIKELIHOOD_TEMPLATE,
        metadata={"help": "Text with title and summary, and the query at the end; \\n is a line break."},
    )
    document_tokens: int = field(
        default=DEFAULT_DOCUMENT_TOKENS, metadata={"help": "Maximum tokens of a document, with --likelihood."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file of the model, with --likelihood."})


@dataclass
class ScoreArguments(LikelihoodArguments):
    """Teacher, pairs and output."""

    model: str | None = field(default=None, metadata={"help": "Teacher: folder, Hub id, or model name on a server."})
    pairs: str | None = field(default=None, metadata={"help": "Candidates: file, folder, URL or Hub data set id."})
    out: str | None = field(default=None, metadata={"help": "Folder or URL for the scores."})
    corpus: str | None = field(default=None, metadata={"help": "Table with the texts of the candidates."})
    queries: str | None = field(default=None, metadata={"help": "Table with query_id and query, for a TREC run."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model: auto, float32, bfloat16 ..."})
    token_budget: int | None = field(default=None, metadata={"help": "Tokens per forward pass; default: by device."})
    shard_rows: int = field(default=10_000, metadata={"help": "Pairs per shard, the most a crash can lose."})
    engine: str = field(default="transformers", metadata={"help": f"transformers, or a server: {', '.join(SERVERS)}."})
    url: str = field(default="http://localhost:8000", metadata={"help": "Base URL of the server."})
    concurrency: int = field(default=8, metadata={"help": "Concurrent requests to the server."})
    num_shards: int = field(default=1, metadata={"help": "Jobs that share the run."})
    shard_index: int = field(default=0, metadata={"help": "Number of this job, from 0."})
    status: str | None = field(default=None, metadata={"help": "Only report the progress of the run in this folder."})
    verify: bool = field(default=False, metadata={"help": "Only score a sample of `out` again and compare."})
    tolerance: float = field(
        default=0.05,
        metadata={"help": "With verify: maximum difference, in standard deviations of the stored scores."},
    )
    generative: bool = field(
        default=False, metadata={"help": "The model is a causal language model that answers yes or no."}
    )
    label_index: int | None = field(
        default=None, metadata={"help": "Label that means relevant, from 0, of a classifier with several."}
    )


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("score", __doc__, ScoreArguments)


def main(args: ScoreArguments) -> None:
    """Score the pairs missing from the store, or report on it."""
    if args.status:
        print(ScoreStore(args.status).status())
        return
    if not (args.model and args.out and (args.pairs or args.verify)):
        raise SystemExit("disranker score: name --model, --pairs and --out, or --status.")
    if not 0 <= args.shard_index < args.num_shards:
        raise SystemExit(
            f"disranker score: --shard_index {args.shard_index} of --num_shards {args.num_shards}: they count from 0."
        )
    store = ScoreStore(args.out)
    if args.verify:
        check(make_engine(args), store, args.tolerance)
        return
    candidates = Candidates(args.pairs, args.corpus, args.column_names(), args.queries)
    candidates.check()  # before the model loads
    engine = make_engine(args)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of accelerate launch
    worker = args.shard_index * processes + int(os.environ.get("RANK", 0))
    run = ScoringRun(engine, candidates, store, args.shard_rows)
    done = run.run(worker, args.num_shards * processes)
    ranker = getattr(engine, "ranker", None)
    cut = f"; {ranker.documents_cut} documents and {ranker.queries_cut} queries were truncated" if ranker else ""
    finished = f"Nothing left to score for this job: its pairs are in {args.out}."
    print(f"Scored {done} of {len(candidates)} pairs into {args.out}{cut}." if done else finished)
    if run.quarantined:
        print(f"{run.quarantined} pairs have no score, see disranker score --status {args.out}.")
    print(f"Next: disranker distill --model ENCODER --scores {args.out} --out FOLDER")


def check(engine: Engine, store: ScoreStore, tolerance: float) -> None:
    """Score a sample of a store again; exit with an error if it differs too much."""
    largest, std = verify(engine, store), store.summary().std or 1.0
    print(f"Largest difference: {largest:.2g}, {largest / std:.2g} standard deviations of the scores.")
    if largest > tolerance * std:
        sys.exit(f"{store.path} contains other scores than this teacher computes now: --tolerance is {tolerance:g}.")


def make_engine(args: ScoreArguments) -> Engine:
    """Create the scoring backend; refuse options of other backends."""
    assert args.model is not None
    is_server = args.engine != "transformers"
    if ignored := changed(args, LOCAL_OPTIONS if is_server else SERVER_OPTIONS):
        kind = "a model in this process" if is_server else "a server"
        raise ValueError(f"{', '.join(ignored)}: for {kind}, not for --engine {args.engine}.")
    if is_server:
        return HttpEngine(args.engine, args.url, args.model, concurrency=args.concurrency)
    check_options(args, args.generative, args.label_index)
    return load_local(args, args.model, args.generative, args.label_index, args.dtype, args.token_budget)


def load_local(
    args: LikelihoodArguments,
    model: str,
    generative: bool,
    label_index: int | None,
    dtype: str = "auto",
    token_budget: int | None = None,
) -> Engine:
    """Load a model, with --likelihood as a teacher by query likelihood, on this process's GPU if there is one."""
    if not args.likelihood:
        return load_engine(model, dtype, token_budget, generative, label_index)
    ranker = Ranker.from_pretrained(
        model,
        process_device(),
        token_budget,
        dtype=dtype,
        likelihood=True,
        likelihood_template=args.likelihood_template.replace("\\n", "\n"),
        document_tokens=args.document_tokens,
        gguf_file=args.gguf_file,
    )
    return RankerEngine(ranker, model)


def check_options(args: LikelihoodArguments, generative: bool, label_index: int | None) -> None:
    """Raise ValueError if options do not go together."""
    if args.likelihood + generative + (label_index is not None) > 1:
        raise ValueError("--likelihood, --generative and --label_index are three ways to score: choose one.")
    if not args.likelihood and (ignored := changed(args, LIKELIHOOD_OPTIONS)):
        raise ValueError(f"{', '.join(ignored)}: only with --likelihood.")


def changed(args: LikelihoodArguments, names: Sequence[str]) -> list[str]:
    """Return the options among `names` that differ from their defaults."""
    return [f"--{name}" for name in names if getattr(args, name) != args.__dataclass_fields__[name].default]


if __name__ == "__main__":
    run_stage("score", make_parser, main)
