"""Team-draft interleaving of two rankers: write the lists to show, then evaluate the clicks on them.

    disranker interleave --a bm25.run --b student.run --out lists.parquet
    disranker interleave --lists lists.parquet --log clicks.parquet --out runs/online/interleaving.json

Every query has several lists (drafts). Show a user the draft crc32(user_id) modulo --drafts, and log user_id,
query_id, draft, doc_id and clicked for every shown document. The ranker whose documents get more clicks wins the page;
users are the unit of the test.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from hf_disranker.evaluation.online import draft_lists, preference
from hf_disranker.recipes.command_line import RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.recipes.impressions import read_credit
from hf_disranker.recipes.outputs import check_output, made_by, save_json

MADE_BY = "disranker interleave"
COLUMNS = ["query_id", "draft", "rank", "doc_id", "team"]


@dataclass
class InterleaveArguments(TableArguments):
    """Rankings or clicks, and output."""

    a: str | None = field(default=None, metadata={"help": "Ranking of the first ranker: TREC run or table of scores."})
    b: str | None = field(default=None, metadata={"help": "Ranking of the second ranker."})
    lists: str | None = field(default=None, metadata={"help": "Lists that this command wrote from --a and --b."})
    log: str | None = field(
        default=None, metadata={"help": "Clicks on the lists: user_id, query_id, draft, doc_id, clicked [, page_id]."}
    )
    out: str | None = field(default=None, metadata={"help": "File for the lists (parquet) or the result (json)."})
    depth: int = field(default=10, metadata={"help": "Documents per list."})
    drafts: int = field(default=16, metadata={"help": "Lists per query."})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("interleave", __doc__, InterleaveArguments)


def main(args: InterleaveArguments) -> Any:
    """Write lists, or evaluate the clicks on them."""
    if args.columns and not args.log:
        raise SystemExit("--columns names the columns of --log.")
    if args.a and args.b and args.out and not args.log:
        return make_lists(args.a, args.b, args.out, args.depth, args.drafts)
    if args.lists and args.log and not (args.a or args.b):
        return read_clicks(args.lists, args.log, args.out, args.column_names())
    raise SystemExit("Name --a, --b and --out to make lists, or --lists and --log to read clicks.")


def make_lists(a: str, b: str, out: str, depth: int, drafts: int) -> pd.DataFrame:
    """Write lists for the queries of both rankings."""
    check_output(out, lambda path: columns_of(path) == COLUMNS, [a, b])
    lists = draft_lists(a, b, depth, drafts)
    lists.to_parquet(out, index=False)
    print(f"{out}: {lists['query_id'].nunique():,} queries, {drafts} lists of up to {depth} documents each")
    return lists


def read_clicks(lists: str, log: str, out: str | None, columns: dict[str, str]) -> dict[str, Any]:
    """Print which ranker the users prefer, and write the result."""
    if out:
        check_output(out, lambda path: made_by(path, MADE_BY), [lists, log])
    if columns_of(lists) != COLUMNS:
        raise SystemExit(f"{lists}: not lists of `{MADE_BY}`, whose columns are {', '.join(COLUMNS)}.")
    credit = read_credit(log, pd.read_parquet(lists), columns)
    found = {"made_by": MADE_BY, "lists": lists, "log": log} | preference(credit)
    low, high = found["interval"]
    print(f"{found['users']:,} users, {found['pages']:,} pages: a wins {found['first_wins']:,}, ", end="")
    print(f"b wins {found['second_wins']:,}, {found['ties']:,} are ties")
    print(f"b less a: {found['difference']:+.2%} of the pages [{low:+.2%}, {high:+.2%}], p = {found['p']:.4f}")
    print(f"sign test over users: p = {found['p_sign']:.4f}")
    if out:
        save_json(found, out)
    return found


def columns_of(path: str | Path) -> list[str]:
    """Return the columns of a parquet file; none for any other file."""
    try:
        return pa.parquet.read_schema(path).names
    except pa.ArrowInvalid:
        return []


if __name__ == "__main__":
    run_stage("interleave", make_parser, main)
