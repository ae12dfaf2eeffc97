"""Analyse an A/B test of rankers from its impression log.

    disranker abtest log.parquet --control bm25
    disranker abtest log.parquet --control bm25 --slices device --covariates clicks_before --out abtest.json

Compares each treatment with the control in PageCTR, UserCTR, clicks per page and dwell time after the click, with 95%
interval and p-value (delta method over users), also after Holm correction for all measures. If the users are not split
into the buckets as intended, nothing is concluded and the exit code is 1.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from hf_disranker.evaluation import online
from hf_disranker.evaluation.online import Effect, buckets_of, by_user, effects
from hf_disranker.evaluation.significance import LEVEL
from hf_disranker.recipes.command_line import RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.recipes.impressions import read_log
from hf_disranker.recipes.outputs import check_output, made_by, save_json

MADE_BY = "disranker abtest"
MOST_SLICES = 20
HEAD = f"{'':16}{'control':>10}{'treatment':>11}{'difference':>12}{'95% interval':>22}{'p':>9}{'Holm':>9}"


@dataclass
class AbtestArguments(TableArguments):
    """Log, buckets and output."""

    log: str = field(
        metadata={"help": "Parquet, csv or jsonl with user_id, bucket, clicked, dwell_seconds [, page_id, day]."}
    )
    control: str = field(metadata={"help": "Name of the control bucket."})
    slices: list[str] = field(default_factory=list, metadata={"help": "Columns to slice the effects by."})
    covariates: list[str] = field(
        default_factory=list, metadata={"help": "Columns measured before the test, to reduce the variance (CUPED)."}
    )
    shares: list[str] = field(
        default_factory=list, metadata={"help": "Intended shares of users, as BUCKET=SHARE ...; default: equal."}
    )
    exclude_mixed_users: bool = field(
        default=False, metadata={"help": "Drop users with several buckets instead of refusing the log."}
    )
    out: str | None = field(default=None, metadata={"help": "Json file for the results."})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("abtest", __doc__, AbtestArguments)


def main(args: AbtestArguments) -> dict[str, Any]:
    """Analyse the log, print tables and write json; exit with 1 if nothing can be concluded."""
    if args.out:
        check_output(args.out, lambda path: made_by(path, MADE_BY), [args.log])
    shares = parse_shares(args.shares)
    log, excluded = read_log(args.log, args.slices, args.covariates, args.exclude_mixed_users, args.column_names())
    buckets, users = buckets_of(log, args.control), by_user(log, args.covariates)
    counts = {name: int((users["bucket"] == name).sum()) for name in buckets}
    p = online.sample_ratio(counts, shares)
    found = {"made_by": MADE_BY, "log": args.log, "control": args.control, "users": counts, "excluded_users": excluded}
    found |= {"sample_ratio": {"shares": shares, "p": p}, "refusal": online.refusal(counts, p), "measures": []}
    print(f"{'users':16} {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    left_out = f"; {excluded:,} users in several buckets left out" if excluded else ""
    print(f"{'sample ratio':16} p = {p:.4f}{left_out}")
    if not found["refusal"]:
        found |= analyse(args, log, users, buckets)
    if args.out:
        save_json(found, args.out)
    if found["refusal"]:
        sys.exit(f"Nothing is concluded: {found['refusal']}.")
    return found


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """Parse --shares."""
    try:
        return {name: float(share) for name, share in (text.split("=") for text in texts)}
    except ValueError:
        raise SystemExit(f"--shares must be BUCKET=SHARE, such as old=0.9 new=0.1, got {' '.join(texts)}.") from None


def analyse(args: AbtestArguments, log: pd.DataFrame, users: pd.DataFrame, buckets: list[str]) -> dict[str, Any]:
    """Compute and print all results after the check of the sample ratio."""
    main_effects = effects(users, buckets, args.covariates)
    show("all users", main_effects)
    significant = [f"{one.name} of {one.bucket}" for one in main_effects if one.p_holm < LEVEL]
    print(f"Significant at 5% after Holm: {', '.join(significant) or 'nothing'}.")
    found: dict[str, Any] = {"measures": rows(main_effects, buckets)}
    if args.covariates:
        plain = effects(users, buckets)
        reduced = {
            f"{one.name} of {one.bucket}": 1 - (spread(one) / spread(other)) ** 2 if spread(other) else 0.0
            for one, other in zip(main_effects, plain, strict=True)
        }
        print("Variance less by " + ", ".join(f"{share:.0%} ({name})" for name, share in reduced.items()) + ".")
        found["cuped"] = {"covariates": args.covariates, "variance_reduction": reduced}
        found["cuped"]["without"] = rows(plain, buckets)
    days = log["day"].nunique() if "day" in log else None
    found["power"] = online.power(users, buckets, args.covariates, days)
    print("\nNeeded in each bucket to find the paper's effects four times out of five (and what this log can find)")
    for row in found["power"]:
        needed = f"{row['effect']:+.2%}: {row['users']:,} users" if row["users"] else "-"
        time = f", {row['days']:,} days" if row["days"] else ""
        print(f"{row['name']:16} {needed}{time}  ({row['detectable']:+.2%})")
    if days and days > 1:
        by_day, found["trends"] = online.novelty(log, buckets)
        found["days"] = {day: rows(one, buckets) for day, one in by_day.items()}
        show_days(by_day, found["trends"])
    found["slices"] = {column: by_slice(log, column, buckets, args.covariates) for column in args.slices}
    return found


def by_slice(log: pd.DataFrame, column: str, buckets: list[str], covariates: Sequence[str]) -> list[dict[str, Any]]:
    """Compute and print the effects for each value of a column, most frequent values first."""
    found = []
    values = log.groupby(column)["user"].nunique().sort_values(ascending=False, kind="stable")
    for value in values.index[:MOST_SLICES]:
        users = by_user(log[log[column] == value], covariates)
        counts = {name: int((users["bucket"] == name).sum()) for name in buckets}
        few = min(counts.values()) < online.ENOUGH_USERS
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        inside = effects(users, buckets, covariates)
        show(f"{column} = {value}: {shown} users{' (few)' if few else ''}", inside)
        found.append({"value": value, "users": counts, "few": few, "measures": rows(inside, buckets)})
    if len(values) > MOST_SLICES:
        print(f"{column}: {len(values) - MOST_SLICES:,} rarer values are left out.")
    return found


def rows(found: Sequence[Effect], buckets: Sequence[str]) -> list[dict[str, Any]]:
    """Convert effects for json; `bucket` is left out if there is only one treatment."""
    return [{k: v for k, v in asdict(one).items() if k != "bucket" or len(buckets) > 2} for one in found]


def spread(one: Effect) -> float:
    """Return the width of the interval of the log ratio, which is proportional to the standard error."""
    return math.log1p(one.interval[1]) - math.log1p(one.interval[0])


def show(title: str, found: Sequence[Effect]) -> None:
    """Print a table of effects."""
    print(f"\n{title}\n{HEAD}")
    for one in found:
        interval = "[{:+.2%}, {:+.2%}]".format(*one.interval)
        print(
            f"{one.name:16}{one.control:10.4f}{one.treatment:11.4f}{one.relative_difference:+12.2%}{interval:>22}"
            f"{one.p:9.4f}{one.p_holm:9.4f}  {one.bucket}"
        )


def show_days(days: Mapping[str, Sequence[Effect]], trends: Sequence[Mapping[str, Any]]) -> None:
    """Print the relative differences by day and their trends."""
    columns = next(iter(days.values()))
    print(f"\n{'day':16}" + "".join(f"{one.name:>17}" for one in columns))
    print(" " * 16 + "".join(f"{one.bucket:>17}" for one in columns))
    for day, found in days.items():
        print(f"{day:16}" + "".join(f"{one.relative_difference:+17.2%}" for one in found))
    for one in trends:
        interval = "[{:+.2%}, {:+.2%}]".format(*one["interval"])
        print(f"{one['name']} of {one['bucket']}: {one['per_day']:+.2%} a day {interval}, p = {one['p']:.4f}")


if __name__ == "__main__":
    run_stage("abtest", make_parser, main)
