"""Team-draft interleaving of two rankers: make the lists to show, then read the clicks on them.

    disranker interleave --a bm25.run --b student.run --out lists.parquet
    disranker interleave --lists lists.parquet --log clicks.parquet --out runs/online/interleaving.json

Every query gets several lists (drafts). Show a user the draft crc32(user_id) modulo --drafts, and log user_id,
query_id, draft, doc_id and clicked for every shown document. The ranker whose documents got more clicks wins the page;
the test is by user.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from trl import TrlParser

from hf_disranker.data.impressions import read_credit
from hf_disranker.evaluation.online import draft_lists, preference
from hf_disranker.recipes.command_line import recipe_parser
from hf_disranker.training.runs import refuse_foreign, save_json

MADE_BY = "disranker interleave"
COLUMNS = ["query_id", "draft", "rank", "doc_id", "team"]


@dataclass
class InterleaveArguments:
    """What is read and written: --a and --b make lists, --lists and --log read clicks."""

    a: str | None = field(default=None, metadata={"help": "One ranker's ranking: TREC run or table of scores."})
    b: str | None = field(default=None, metadata={"help": "The other's."})
    lists: str | None = field(default=None, metadata={"help": "Parquet that this command made from --a and --b."})
    log: str | None = field(
        default=None, metadata={"help": "Clicks on the lists: user_id, query_id, draft, doc_id, clicked [, page_id]."}
    )
    out: str | None = field(default=None, metadata={"help": "Lists (parquet) or result (json) to write."})
    depth: int = field(default=10, metadata={"help": "Documents in a list."})
    drafts: int = field(default=16, metadata={"help": "Lists for each query."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("interleave", __doc__, InterleaveArguments)


def main(args: InterleaveArguments) -> Any:
    """Make lists, or read the clicks on them."""
    if args.a and args.b and args.out and not args.log:
        return make_lists(args.a, args.b, args.out, args.depth, args.drafts)
    if args.lists and args.log and not (args.a or args.b):
        return read_clicks(args.lists, args.log, args.out)
    raise SystemExit("Name --a, --b and --out to make lists, or --lists and --log to read clicks.")


def make_lists(a: str, b: str, out: str, depth: int, drafts: int) -> pd.DataFrame:
    """Write the lists of all queries that both rank."""
    if os.path.exists(out) and columns_of(out) != COLUMNS:
        raise SystemExit(f"{out}: `{MADE_BY}` did not write this file and does not overwrite it.")
    lists = draft_lists(a, b, depth, drafts)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    lists.to_parquet(out, index=False)
    print(f"{out}: {lists['query_id'].nunique():,} queries, {drafts} lists of up to {depth} documents each")
    return lists


def read_clicks(lists: str, log: str, out: str | None) -> dict[str, Any]:
    """Print who was preferred."""
    refuse_foreign(out, MADE_BY)
    if columns_of(lists) != COLUMNS:
        raise SystemExit(f"{lists}: `{MADE_BY}` did not make these lists; they have the columns {', '.join(COLUMNS)}.")
    found = {"made_by": MADE_BY, "lists": lists, "log": log} | preference(read_credit(log, pd.read_parquet(lists)))
    low, high = found["interval"]
    print(f"{found['users']:,} users, {found['pages']:,} pages: a wins {found['first_wins']:,}, ", end="")
    print(f"b wins {found['second_wins']:,}, {found['ties']:,} are ties")
    print(f"b less a: {found['difference']:+.2%} of the pages [{low:+.2%}, {high:+.2%}], p = {found['p']:.4f}")
    print(f"sign test over users: p = {found['p_sign']:.4f}")
    if out:
        save_json(json.loads(json.dumps(found), parse_constant=lambda _: None), out)
    return found


def columns_of(path: str) -> list[str]:
    """The columns of a parquet file; none of any other file."""
    try:
        return pa.parquet.read_schema(path).names
    except pa.ArrowInvalid:
        return []


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
