"""Stage 3a: a teacher's scores for unlabelled pairs.

    disranker score --model runs/teacher --pairs candidates.parquet --corpus corpus.parquet --out runs/scores

`pairs` is a table with the columns query_id, query, doc_id and, unless a corpus holds them, title and summary. The
output folder holds parquet shards and a manifest; a run that was cut off goes on with the shards that are missing.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from hf_disranker.data import read_table
from hf_disranker.ranker import Ranker
from hf_disranker.runs import recipe_parser
from hf_disranker.scoring import score_pairs
from hf_disranker.store import ScoreStore


@dataclass
class ScoreArguments:
    """What the stage reads and writes."""

    model: str = field(metadata={"help": "The teacher: folder or Hub id."})
    pairs: str = field(metadata={"help": "Table of candidates: file, URL or Hub data set id."})
    out: str = field(metadata={"help": "Folder or URL for the scores."})
    corpus: str | None = field(default=None, metadata={"help": "Table with the texts of the candidates."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model: auto, float32, bfloat16 ..."})
    token_budget: int | None = field(default=None, metadata={"help": "Tokens of a forward pass; by the device."})
    shard_rows: int = field(default=10_000, metadata={"help": "Pairs per shard: what a crash can cost at most."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("score", __doc__, ScoreArguments)


def main(args: ScoreArguments) -> None:
    """Read the pairs, then score what the store does not hold yet."""
    pairs = read_table(args.pairs, "candidates", corpus=args.corpus)
    ranker = Ranker.from_pretrained(args.model, dtype=args.dtype)
    ranker.token_budget = args.token_budget or ranker.token_budget
    done = score_pairs(ranker, pairs, ScoreStore(args.out), args.model, args.shard_rows)
    cut = f"{ranker.documents_cut} documents and {ranker.queries_cut} queries were cut"
    print(f"Scored {done} of {len(pairs)} pairs into {args.out}; {cut}.")


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
