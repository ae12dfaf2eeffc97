"""Stage 4: measure a ranking of judged documents.

    disranker evaluate --model runs/student --judgments judgments.parquet --out eval.json
    disranker evaluate --scores runs/scores --judgments judgments.parquet
    disranker evaluate --bm25 --judgments judgments.parquet

Prints PNR, NDCG, MRR and MAP, with 95% bootstrap intervals by query for the first two.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from hf_disranker.data import bm25_scores, read_table
from hf_disranker.evaluation import Scored, evaluate, score_with, scores_of
from hf_disranker.ranker import Ranker
from hf_disranker.runs import recipe_parser, save_json


@dataclass
class EvaluateArguments:
    """What the stage reads and writes."""

    judgments: str = field(metadata={"help": "Table of judgments: file, URL or Hub data set id."})
    split: str = field(default="dev", metadata={"help": "Split to evaluate on; '' for all rows."})
    model: str | None = field(default=None, metadata={"help": "A ranker: folder or Hub id."})
    scores: str | None = field(default=None, metadata={"help": "A score store or a table of scores."})
    bm25: bool = field(default=False, metadata={"help": "Rank by BM25 over the judged documents or the corpus."})
    corpus: str | None = field(default=None, metadata={"help": "Documents over which BM25 counts words."})
    out: str | None = field(default=None, metadata={"help": "Where to write all measures as json."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("evaluate", __doc__, EvaluateArguments)


def main(args: EvaluateArguments) -> dict:
    """Score the judged pairs in the way that was asked for and measure the ranking."""
    if sum(map(bool, (args.model, args.scores, args.bm25))) != 1:
        raise SystemExit("Name one of --model, --scores and --bm25.")
    judgments = read_table(args.judgments, "judgments", split=args.split)
    if args.model:
        ranker = Ranker.from_pretrained(args.model)
        scored = score_with(ranker, judgments)
        print(f"{ranker.documents_cut} of {len(judgments)} documents and {ranker.queries_cut} queries were cut.")
    elif args.scores:
        scored = scores_of(judgments, read_table(args.scores, "scores", corpus=args.corpus))
    else:
        corpus = read_table(args.corpus, "corpus") if args.corpus else None
        scored = Scored(bm25_scores(judgments, corpus))
    measures = evaluate(judgments, scored.scores) | {"pairs_per_s": scored.pairs_per_s}
    for name, value in measures.items():
        if isinstance(value, float | int):
            low, high = measures["intervals"].get(name, (None, None))
            interval = f"  [{low:.4f}, {high:.4f}]" if low is not None and high is not None else ""
            print(f"{name:>26} {value:12.4f}{interval}" if isinstance(value, float) else f"{name:>26} {value:12d}")
    if args.out:
        save_json(measures, args.out)
    return measures


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
