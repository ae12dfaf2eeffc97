"""A/B tests and interleaving of rankers, from logs. Users are randomised, so they are the unit of every test.

| measure         | numerator                           | denominator                    |
|-----------------|-------------------------------------|--------------------------------|
| page_ctr        | pages with at least one click       | pages                          |
| user_ctr        | users with at least one click       | users                          |
| clicks_per_page | clicks                              | pages                          |
| dwell           | seconds on documents after a click  | clicks whose seconds are known |
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, chisquare, norm

from hf_disranker.data.schema import TableError
from hf_disranker.data.trec import read_run
from hf_disranker.evaluation.significance import LEVEL, Interval, holm

logger = logging.getLogger(__name__)

MEASURES = {
    "page_ctr": ("clicked_pages", "pages"),
    "user_ctr": ("clicked", "users"),
    "clicks_per_page": ("clicks", "pages"),
    "dwell": ("seconds", "timed_clicks"),
}
PAPER = {"page_ctr": 0.0047, "user_ctr": 0.0058, "dwell": 0.012}  # effects reported by the paper
MISMATCH_LEVEL = 0.001
ENOUGH_USERS = 200  # per bucket; below, the normal approximation is unreliable


@dataclass(frozen=True)
class Effect:
    """Effect of a treatment on a measure, relative to the control; nan where undefined."""

    name: str  # key of `MEASURES`
    bucket: str  # of the treatment
    control: float  # value of the measure, adjusted for covariates if there are any
    treatment: float
    relative_difference: float  # treatment / control - 1
    interval: Interval  # 95%, of the relative difference
    p: float  # two-sided
    p_holm: float = np.nan  # corrected for all effects of the call


def buckets_of(log: pd.DataFrame, control: str) -> list[str]:
    """Return the buckets of a log, the control first; TableError unless there is a control and a treatment."""
    found = sorted(log["bucket"].unique())
    if control not in found or len(found) < 2:
        raise TableError(f"The buckets are {', '.join(found)}: an A/B test needs the control '{control}' and another.")
    return [control, *(name for name in found if name != control)]


def sample_ratio(users: Mapping[str, int], shares: Mapping[str, float] | None = None) -> float:
    """Return the p-value of the chi-square test for a sample ratio mismatch.

    `users` are numbers by bucket; `shares` the intended shares in any unit, None for equal ones.
    """
    intended = np.array([shares.get(name, 0) if shares else 1 for name in users])
    if shares and (shares.keys() != users.keys() or intended.min() <= 0):
        raise ValueError(f"Give a share above 0 for each of the buckets {', '.join(users)}, and for these only.")
    return float(chisquare([*users.values()], intended / intended.sum() * sum(users.values())).pvalue)


def refusal(users: Mapping[str, int], p: float) -> str | None:
    """Return the reason not to conclude anything from a test, or None; `p` is that of `sample_ratio`."""
    if p < MISMATCH_LEVEL:
        counts = ", ".join(f"{name} {count:,}" for name, count in users.items())
        return f"users are not split as intended ({counts}; p = {p:.1e}): assignment or logging is broken"
    if min(users.values()) < ENOUGH_USERS:
        return f"a bucket has fewer than {ENOUGH_USERS} users"
    return None


def by_user(log: pd.DataFrame, covariates: Sequence[str] = ()) -> pd.DataFrame:
    """Sum a log of `impressions.read_log` to a row per user, indexed by user."""
    sums = dict.fromkeys(("pages", "clicked_pages", "clicks", "timed_clicks", "seconds"), "sum")
    users = log.groupby("user").agg(dict.fromkeys(("bucket", *covariates), "first") | sums)
    return users.assign(users=1, clicked=users["clicked_pages"] > 0)


def log_ratios(
    users: pd.DataFrame, buckets: Sequence[str], name: str, covariates: Sequence[str] = ()
) -> list[tuple[float, pd.Series]]:
    """Compute the log of a measure in each bucket, and the influence of each user on it.

    The variance is the sum of the squared influences. Covariates are regressed out with a common slope for all
    buckets; missing values are replaced by the mean.

    Source: delta method, Deng, Knoblich and Lu 2018, arXiv 1803.06336; CUPED, Deng, Xu, Kohavi and Walker 2013.
    """
    parts = [users[users["bucket"] == bucket] for bucket in buckets]
    found = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for part in parts:
            top, bottom = (part[column].astype(np.float64) for column in MEASURES[name])
            value = np.log(np.float64(top.sum()) / bottom.sum())
            found.append((value, top / top.sum() - bottom / bottom.sum()))
    if not covariates or not np.isfinite([value for value, _ in found]).all():
        return found
    mean = users[list(covariates)].mean()
    before = [(part[list(covariates)].fillna(mean) - mean).to_numpy() for part in parts]
    centred = [values - values.mean(axis=0) for values in before]
    outcome = np.concatenate([len(influence) * influence for _, influence in found])
    slope = np.linalg.lstsq(np.concatenate(centred), outcome, rcond=None)[0]
    return [
        (value - before[place].mean(axis=0) @ slope, influence - centred[place] @ slope / len(influence))
        for place, (value, influence) in enumerate(found)
    ]


def effects(users: pd.DataFrame, buckets: Sequence[str], covariates: Sequence[str] = ()) -> list[Effect]:
    """Compare every treatment with the control in every measure.

    The users are those of `by_user`; rows of pages instead would be the naive test, whose intervals are too narrow.
    The first bucket is the control. Intervals are normal ones of the log ratio, as in scipy's `relative_risk`.
    """
    found = []
    for name in MEASURES:
        (control, influence), *treatments = log_ratios(users, buckets, name, covariates)
        for bucket, (value, other) in zip(buckets[1:], treatments, strict=True):
            error = np.sqrt((influence**2).sum() + (other**2).sum())
            found.append(_effect(name, bucket, control, value, error))
    corrected = iter(holm([one.p for one in found if not np.isnan(one.p)]))
    return [one if np.isnan(one.p) else replace(one, p_holm=next(corrected)) for one in found]


def _effect(name: str, bucket: str, control: float, treatment: float, error: float) -> Effect:
    """Build an effect from the two log values and the standard error of their difference."""
    values = float(np.exp(control)), float(np.exp(treatment))
    if not np.isfinite([control, treatment]).all():
        return Effect(name, bucket, *values, np.nan, (np.nan, np.nan), np.nan)
    (low, high), p = _normal_test(treatment - control, error)
    interval = float(np.expm1(low)), float(np.expm1(high))
    return Effect(name, bucket, *values, float(np.expm1(treatment - control)), interval, p)


def _normal_test(value: float, error: float) -> tuple[Interval, float]:
    """Return the 95% interval of a value with a standard error, and the two-sided p-value of its distance from 0."""
    half = norm.ppf(1 - LEVEL / 2) * error
    return (value - half, value + half), float(2 * norm.sf(abs(value) / error) if error else value == 0)


def novelty(log: pd.DataFrame, buckets: Sequence[str]) -> tuple[dict[str, list[Effect]], list[dict[str, Any]]]:
    """Compute the effects by day, and their trends.

    A trend is the slope of the log ratio over the days, weighted by precision, with a standard error over users.

    Returns:
        The effects by day; and, with three days or more, a trend {name, bucket, per_day, interval, p} per measure and
        treatment.
    """
    days = {str(day).strip(): by_user(part) for day, part in log.groupby("day")}
    trends = []
    for name in MEASURES:
        ratios = [log_ratios(users, buckets, name) for users in days.values()]
        for place, bucket in enumerate(buckets[1:], 1):
            change = np.array([one[place][0] - one[0][0] for one in ratios])
            spread = np.array([(one[place][1] ** 2).sum() + (one[0][1] ** 2).sum() for one in ratios])
            known = np.flatnonzero(np.isfinite(change) & (spread > 0))
            if len(known) < 3:
                continue
            weight = 1 / spread[known]
            centred = known - np.average(known, weights=weight)
            share = weight * centred / (weight * centred**2).sum()
            parts = [part * ratios[day][at][1] for part, day in zip(share, known, strict=True) for at in (0, place)]
            error = np.sqrt((pd.concat(parts).groupby(level=0).sum() ** 2).sum())
            one = _effect(name, bucket, 0.0, share @ change[known], error)
            trend = {"name": name, "bucket": bucket, "per_day": one.relative_difference}
            trends.append(trend | {"interval": one.interval, "p": one.p})
    return {day: effects(users, buckets) for day, users in days.items()}, trends


def power(
    users: pd.DataFrame, buckets: Sequence[str], covariates: Sequence[str] = (), days: int | None = None
) -> list[dict[str, Any]]:
    """Compute the sample size to detect the paper's effects with power 0.8, two-sided at 5%.

    Arguments as in `effects`, and the number of days of the log.

    Returns:
        Per measure {name, detectable, effect, users, days}: the relative difference that this log can detect, the
        paper's effect, and the users per bucket and days at the same traffic to detect it; None if unknown.
    """
    found, sides = [], norm.ppf(1 - LEVEL / 2) + norm.ppf(0.8)
    for name in MEASURES:
        ratios = log_ratios(users, buckets, name, covariates)
        # Variance of the log ratio of two buckets of one user each.
        spread = 2 * float(np.mean([len(one) * (one**2).sum() for _, one in ratios]))
        size, effect = len(users) / len(buckets), PAPER.get(name)
        needed = int(np.ceil(sides**2 * spread / np.log1p(effect) ** 2)) if effect and np.isfinite(spread) else None
        row = {"name": name, "detectable": float(np.expm1(sides * np.sqrt(spread / size))), "effect": effect}
        time = int(np.ceil(days * needed / size)) if days and needed else None
        found.append(row | {"users": needed, "days": time})
    return found


def team_draft(first: Sequence[str], second: Sequence[str], flips: Sequence[int]) -> dict[str, int]:
    """Draft a list from two rankings: in each round both pick their best remaining document, in random order.

    Rankings are document ids, best first; `flips` names the ranker, 0 or 1, that picks first in each round.

    Returns:
        The ranker, 0 or 1, that picked each document, in the order of the list; it ends with the shorter ranking.

    Source: Radlinski, Kurup and Joachims 2008, "How does clickthrough data reflect retrieval quality?"
    """
    picked: dict[str, int] = {}
    for flip in flips:
        for team in (flip, 1 - flip):
            best = next((document for document in (first, second)[team] if document not in picked), None)
            if best is None:
                return picked
            picked[best] = team
    return picked


def draft_lists(first: str, second: str, depth: int = 10, drafts: int = 16) -> pd.DataFrame:
    """Draft lists of `depth` documents for the queries of two runs (TREC or tables of scores), reproducibly.

    Draft 2k + 1 is draft 2k with all flips inverted, so that both rankers have the same number of first picks.

    Returns:
        Columns query_id, draft, rank (from 1), doc_id and team: 0 for a pick of the first run, 1 of the second.

    Raises:
        ValueError: If depth or drafts are not even, or the runs have no query in common.
    """
    if depth < 2 or depth % 2 or drafts < 2 or drafts % 2:
        raise ValueError(f"depth and drafts must be even numbers, got {depth} and {drafts}.")
    runs = [
        read_run(source).sort_values("teacher_score", ascending=False, kind="stable") for source in (first, second)
    ]
    one, other = (run.groupby("query_id")["doc_id"].agg(list) for run in runs)
    if not len(both := one.index.intersection(other.index)):
        raise ValueError(f"{first} and {second} have no query in common.")
    if alone := len(one) + len(other) - 2 * len(both):
        logger.warning("%d queries of only one of %s and %s have no list.", alone, first, second)
    rows = []
    for query in both:
        for draft in range(drafts):
            flips = np.random.default_rng([zlib.crc32(query.encode()), draft // 2]).integers(2, size=depth // 2)
            picked = team_draft(one[query], other[query], [int(flip) ^ draft % 2 for flip in flips])
            rows += [(query, draft, rank, *pick) for rank, pick in enumerate(picked.items(), 1)]
    return pd.DataFrame(rows, columns=["query_id", "draft", "rank", "doc_id", "team"])


def preference(pages: pd.DataFrame) -> dict[str, Any]:
    """Test by the result of `impressions.read_credit` whether users prefer the second ranker.

    Returns:
        Numbers of users, pages, first_wins, second_wins and ties; difference, the share of pages won by the second
        ranker minus that of the first, with 95% interval and p over users (delta method); p_sign of the sign test over
        users.
    """
    users, wins = pages.groupby("user_id")["credit"].agg(["sum", "size"]), pages["credit"].value_counts()
    difference = users["sum"].sum() / len(pages)
    error = float(np.sqrt(((users["sum"] - difference * users["size"]) ** 2).sum())) / len(pages)
    interval, p = _normal_test(difference, error)
    up, down = int((users["sum"] > 0).sum()), int((users["sum"] < 0).sum())
    return {
        "users": len(users),
        "pages": len(pages),
        "first_wins": int(wins.get(-1, 0)),
        "second_wins": int(wins.get(1, 0)),
        "ties": int(wins.get(0, 0)),
        "difference": float(difference),
        "interval": interval,
        "p": p,
        "p_sign": float(binomtest(up, up + down).pvalue) if up + down else 1.0,
    }
