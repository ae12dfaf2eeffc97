"""Stage 4: measure a ranking.

    disranker evaluate --model runs/student --judgments judgments.parquet --out runs/eval/student.json
    disranker evaluate --run bm25.run --judgments collection.qrels
    disranker evaluate --bm25 --judgments beir/scifact --split test --candidates first_stage.run

--model and --bm25 re-rank the judged documents: tied scores share their gain, and queries without a relevant document
are skipped. --run, --scores and --candidates are evaluated as a run, as in trec_eval and ir_measures: documents that
were not retrieved gain nothing, a query without results or relevant documents counts 0, ties are broken by doc_id. In
PNR a judged document missing from a run ranks last.

Prints PNR, pair accuracy, NDCG, MRR and MAP with 95% bootstrap intervals over queries, and measures of raw scores
across queries. `disranker compare` and `disranker report` read the files of --out.
"""

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hf_disranker.data.bm25 import bm25_scores
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table
from hf_disranker.data.trec import check_run_ids, judged_split, read_candidates, read_judgments, read_run
from hf_disranker.evaluation.evaluate import best_passages, interval_text, join_run, value_text
from hf_disranker.recipes.command_line import RecipeParser, recipe_parser, run_stage
from hf_disranker.recipes.rankings import Evaluation, check_evaluation_output, describe, score_with
from hf_disranker.recipes.score import LikelihoodArguments, check_options, load_local

logger = logging.getLogger("hf_disranker")


@dataclass
class EvaluateArguments(LikelihoodArguments):
    """Ranking, judgments and output."""

    judgments: str = field(metadata={"help": "Table of judgments, TREC qrels, or a BEIR folder."})
    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: dev if there are splits. '' uses all rows."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Student, teacher or any CrossEncoder: folder or Hub id."}
    )
    generative: bool = field(
        default=False, metadata={"help": "If true, the model is a causal language model that answers yes or no."}
    )
    label_index: int | None = field(
        default=None, metadata={"help": "Label that means relevant, from 0, of a classifier with several."}
    )
    run: str | None = field(default=None, metadata={"help": "Run in TREC format."})
    scores: str | None = field(default=None, metadata={"help": "Score store or table of scores."})
    bm25: bool = field(default=False, metadata={"help": "Rank by BM25 over the corpus or the judged documents."})
    corpus: str | None = field(default=None, metadata={"help": "Documents for BM25 and for judgments without texts."})
    queries: str | None = field(default=None, metadata={"help": "Table with query_id and query, for TREC qrels."})
    candidates: str | None = field(
        default=None,
        metadata={"help": "First-stage run or candidates table to rank as a run, instead of the judged documents."},
    )
    measures: list[str] = field(
        default_factory=list,
        metadata={"help": "More measures of ir_measures, for example P@5 ERR@10."},
    )
    by: str | None = field(
        default=None, metadata={"help": "Column to slice the measures by: market, language ... or query_words."}
    )
    max_over: str | None = field(
        default=None,
        metadata={"help": "Column with the document of a passage; the best passage counts."},
    )
    name: str | None = field(default=None, metadata={"help": "Name of the ranker in tables and reports."})
    out: str | None = field(
        default=None,
        metadata={"help": "Json file to write, with OUT.run (TREC) and OUT.parquet (measures by query)."},
    )
    expect: str | None = field(
        default=None,
        metadata={"help": "Yaml with expected measures and a tolerance; differences are an error."},
    )


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("evaluate", __doc__, EvaluateArguments)


def main(args: EvaluateArguments) -> Evaluation:
    """Score the judged pairs and measure the ranking."""
    if sum(map(bool, (args.model, args.run, args.scores, args.bm25))) != 1:
        raise SystemExit("disranker evaluate: name one of --model, --run, --scores and --bm25.")
    check_options(args, args.generative, args.label_index)
    if not args.model and (args.likelihood or args.generative or args.label_index is not None):
        raise SystemExit("disranker evaluate: --likelihood, --generative and --label_index need --model.")
    if args.out:
        inputs = (args.judgments, args.run, args.scores, args.corpus, args.queries, args.candidates, args.expect)
        check_evaluation_output(args.out, inputs)
    expected = read_expected(args.expect) if args.expect else {}
    columns = args.column_names()
    args.split = judged_split(args.judgments, args.split, columns=columns) or ""
    judgments = read_judgments(args.judgments, args.split, args.corpus, args.queries, columns)
    rows, about = rank(args, judgments)
    if args.max_over:
        rows = best_passages(rows, args.max_over)
    source = args.model or args.run or args.scores or "bm25"
    options = ("judgments", "split", "corpus", "queries", "max_over", "label_index")
    about |= {name: getattr(args, name) for name in options} | {"columns": columns}
    name = args.name or source.rstrip("/").rsplit("/", 1)[-1]
    evaluation = Evaluation.of(name, rows, args.measures, args.by, **about)
    print(table_text(evaluation.measures))
    if args.by:
        print(slices_text(args.by, evaluation.measures["slices"]))
    if args.out:
        evaluation.save(args.out)
        print(f"Saved to {args.out}. Next: disranker compare or report, with the files of several rankers")
    if lines := differences(evaluation.measures, expected):
        sys.exit("\n".join([f"{args.expect}: {len(lines)} measure(s) differ.", *lines]))
    return evaluation


def rank(args: EvaluateArguments, judgments: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the scored rows and a description of the ranker; all checks run before the scoring."""
    if source := args.run or args.scores:
        rows = join_run(judgments, read_run(source, args.column_names()))
        check(args, rows)
        return rows, {"role": "run", "source": source}
    columns, rows = args.column_names(), judgments
    corpus = read_table(args.corpus, "corpus", columns=columns) if args.corpus else None
    if not args.candidates and rows.groupby("query_id")["label"].min().median() > 0:
        logger.warning("Most queries have no document of grade 0, so any order is right: name --candidates.")
    if args.candidates:
        corpus = read_table(args.judgments, "corpus", columns=columns) if corpus is None else corpus
        rows = read_candidates(args.candidates, judgments, corpus, columns)
    if "title" not in rows.columns:
        raise TableError(f"{args.judgments} has no texts to rank: name --corpus and --queries.")
    joined = join_run(judgments, rows.assign(teacher_score=np.arange(len(rows)))) if args.candidates else rows
    check(args, joined)
    if args.model:
        engine = load_local(args, args.model, args.generative, args.label_index)
        ranker = getattr(engine, "ranker", engine)
        scores, speed = score_with(ranker, rows)
        about = describe(ranker) | {"source": args.model, "pairs_per_s": speed}
    else:
        scores, about = bm25_scores(rows, corpus), {"role": "bm25"}
    if not args.candidates:
        return rows.assign(score=scores), about
    by_row = np.asarray(scores, np.float64)[joined["score"].clip(lower=0).astype(int)]
    return joined.assign(score=np.where(joined["missing"], np.min(scores) - 1.0, by_row)), about


def check(args: EvaluateArguments, rows: pd.DataFrame) -> None:
    """Refuse options and rows that cannot be measured, with a trial on the query of the highest grade."""
    if args.out:
        check_run_ids(rows)
    rows = rows.assign(score=0.0)
    if args.max_over:
        rows = best_passages(rows, args.max_over)
    one = rows[rows["query_id"] == rows["query_id"].iloc[rows["label"].argmax()]]
    Evaluation.of("check", one.reset_index(drop=True), args.measures, args.by)


def table_text(measures: Mapping[str, Any]) -> str:
    """Format the measures and their intervals, a line each, with the reason for a PNR that is not finite."""
    lines = []
    for name in (one for one in measures if one not in ("intervals", "slices")):
        interval = interval_text(measures, name)
        lines.append(f"{name:>26} {value_text(measures, name):>12}" + (f"  [{interval}]" if interval else ""))
        if name == "pnr" and measures["pnr"] is None:
            lines[-1] += "  (no discordant pair)" if measures["concordant"] else "  (no pair in order or out of it)"
    return "\n".join(lines)


def slices_text(column: str, found: Mapping[str, Any]) -> str:
    """Format NDCG@10 by slice, a line each."""
    lines = [f"\n{column:>26}  queries  ndcg@10"]
    for value, measures in found.items():
        interval = interval_text(measures, "ndcg@10")
        few = ("  [" + interval + "]" if interval else "") + ("  (few queries)" if measures["few"] else "")
        lines.append(f"{value:>26} {measures['queries']:8d}   {value_text(measures, 'ndcg@10')}{few}")
    return "\n".join(lines)


def read_expected(path: str) -> dict[str, float | None]:
    """Load expected measures for `differences` from yaml; TableError if a value is not a number."""
    with open(path, encoding="utf-8") as file:
        try:
            expected = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise TableError(f"{path}: is not yaml: {' '.join(str(error).split())}") from error
    if not isinstance(expected, dict):
        raise TableError(f"{path}: there are no measures.")
    for name, value in expected.items():
        if value is not None and not isinstance(value, float | int):
            raise TableError(f"{path}: {name} is {value!r}, not a number.")
    return expected


def differences(measures: Mapping[str, Any], expected: Mapping[str, float | None]) -> list[str]:
    """List measures that differ from the expected ones by more than `tolerance` (relative, by default 0.01)."""
    expected = dict(expected)
    tolerance = expected.pop("tolerance", None)
    tolerance = 0.01 if tolerance is None else tolerance
    lines = []
    for name, wanted in expected.items():
        found: Any = measures.get(name)
        same = found is wanted if found is None or wanted is None else math.isclose(found, wanted, rel_tol=tolerance)
        if not same:
            lines.append(f"  {name}: expected {wanted}, found {found} (tolerance {tolerance:.1%})")
    return lines


if __name__ == "__main__":
    run_stage("evaluate", make_parser, main)
