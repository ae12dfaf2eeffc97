"""Stage 4: measure a ranking of judged documents.

    disranker evaluate --model runs/student --judgments judgments.parquet --out runs/eval/student.json
    disranker evaluate --run bm25.run --judgments collection.qrels
    disranker evaluate --bm25 --judgments beir/scifact --split test --candidates first_stage.run

Prints PNR, pair accuracy, NDCG, MRR and MAP with 95% bootstrap intervals by query, and what compares raw scores across
queries. `disranker compare` and `disranker report` read what --out wrote.
"""

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from trl import TrlParser

from hf_disranker.engines import load_engine
from hf_disranker.evaluation import best_passages, describe, join_run, score_with
from hf_disranker.mining import bm25_scores
from hf_disranker.rankings import Evaluation, differences, slices_text, table_text
from hf_disranker.readers import read_candidates, read_corpus, read_judgments, read_run
from hf_disranker.runs import recipe_parser
from hf_disranker.schema import TableError

logger = logging.getLogger("hf_disranker")


@dataclass
class EvaluateArguments:
    """What the stage reads and writes."""

    judgments: str = field(metadata={"help": "Table of judgments, TREC qrels, or a BEIR folder."})
    split: str = field(default="dev", metadata={"help": "Split to evaluate on; '' for all rows."})
    model: str | None = field(
        default=None, metadata={"help": "A student, a teacher or any CrossEncoder: folder or Hub id."}
    )
    generative: bool = field(
        default=False, metadata={"help": "The model is a causal language model that answers yes or no."}
    )
    run: str | None = field(default=None, metadata={"help": "A ranking in TREC's format."})
    scores: str | None = field(default=None, metadata={"help": "A score store or a table of scores."})
    bm25: bool = field(default=False, metadata={"help": "Rank by BM25 over the corpus, or the judged documents."})
    corpus: str | None = field(default=None, metadata={"help": "Documents, for BM25 and for judgments without texts."})
    queries: str | None = field(default=None, metadata={"help": "For TREC qrels: table with query_id and query."})
    candidates: str | None = field(
        default=None,
        metadata={"help": "A first stage's run or candidates table to rank instead of the judged documents."},
    )
    measures: list[str] = field(
        default_factory=list, metadata={"help": "Further measures by their ir_measures names, such as P@5 ERR@10."}
    )
    by: str | None = field(
        default=None, metadata={"help": "Also measure by a column: market, language ... or query_words."}
    )
    max_over: str | None = field(
        default=None, metadata={"help": "Rows are passages: a document, named in this column, counts as its best one."}
    )
    name: str | None = field(default=None, metadata={"help": "Name of the ranker in tables and reports."})
    out: str | None = field(
        default=None, metadata={"help": "Json to write; beside it a TREC run and the values by query (parquet)."}
    )
    expect: str | None = field(
        default=None, metadata={"help": "Yaml with measures to find again: tolerance, and a number for each measure."}
    )


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("evaluate", __doc__, EvaluateArguments)


def main(args: EvaluateArguments) -> Evaluation:
    """Score the judged pairs in the way that was asked for and measure the ranking."""
    if sum(map(bool, (args.model, args.run, args.scores, args.bm25))) != 1:
        raise SystemExit("Name one of --model, --run, --scores and --bm25.")
    judgments = read_judgments(args.judgments, args.split, args.corpus, args.queries)
    rows, about = rank(args, judgments)
    if args.max_over:
        rows = best_passages(rows, args.max_over)
    source = args.model or args.run or args.scores or "bm25"
    about |= {name: getattr(args, name) for name in ("judgments", "split", "corpus", "queries", "max_over")}
    name = args.name or source.rstrip("/").rsplit("/", 1)[-1]
    evaluation = Evaluation.of(name, rows, args.measures, args.by, **about)
    print(table_text(evaluation.measures))
    if args.by:
        print(slices_text(args.by, evaluation.measures["slices"]))
    if args.out:
        evaluation.save(args.out)
    if args.expect and (lines := differences(evaluation.measures, args.expect)):
        sys.exit("\n".join([f"{args.expect}: {len(lines)} measure(s) differ.", *lines]))
    return evaluation


def rank(args: EvaluateArguments, judgments: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows with their scores, and what is known of the ranker."""
    if source := args.run or args.scores:
        return join_run(judgments, read_run(source)), {"role": "run", "source": source}
    rows, corpus = judgments, read_corpus(args.corpus) if args.corpus else None
    if not args.candidates and rows.groupby("query_id")["label"].min().median() > 0:
        logger.warning("Most queries have no document of grade 0, so any order is right: name --candidates.")
    if args.candidates:
        corpus = read_corpus(args.judgments) if corpus is None else corpus
        rows = read_candidates(args.candidates, judgments, corpus)
    if "title" not in rows.columns:
        raise TableError(f"{args.judgments} holds no texts to rank: name --corpus and --queries.")
    if args.model:
        engine = load_engine(args.model, generative=args.generative)
        ranker = getattr(engine, "ranker", engine)
        scores, speed = score_with(ranker, rows)
        about = describe(ranker) | {"source": args.model, "pairs_per_s": speed}
    else:
        scores, about = bm25_scores(rows, corpus), {"role": "bm25"}
    if args.candidates:
        return join_run(judgments, rows.assign(teacher_score=scores)), about
    return rows.assign(score=scores), about


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
