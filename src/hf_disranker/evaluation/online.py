"""A/B tests and interleaving of rankers, from their logs. Users were randomised, so users are the unit of every test.

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
PAPER = {"page_ctr": 0.0047, "user_ctr": 0.0058, "dwell": 0.012}  # the effects that the paper found
MISMATCH_LEVEL = 0.001
ENOUGH_USERS = 200  # in a bucket; below, the normal approximation is not to be trusted


@dataclass(frozen=True)
class Effect:
    """A treatment `bucket` against the control in one measure; nan where nothing defines a value.

    `control` and `treatment` are the measure's values, adjusted if there are covariates; `interval` is the 95%
    interval of `relative_difference`; `p_holm` is corrected for all effects of one call.
    """

    name: str
    bucket: str
    control: float
    treatment: float
    relative_difference: float
    interval: Interval
    p: float
    p_holm: float = np.nan


def buckets_of(log: pd.DataFrame, control: str) -> list[str]:
    """The buckets of a log, the control first."""
    found = sorted(log["bucket"].unique())
    if control not in found or len(found) < 2:
        raise TableError(f"The buckets are {', '.join(found)}: an A/B test needs the control '{control}' and another.")
    return [control, *(name for name in found if name != control)]


def sample_ratio(users: Mapping[str, int], shares: Mapping[str, float] | None = None) -> float:
    """P-value of the chi-square test that users fell into the buckets in the meant shares, by default equal ones."""
    meant = np.array([shares.get(name, 0) if shares else 1 for name in users])
    if shares and (shares.keys() != users.keys() or meant.min() <= 0):
        raise ValueError(f"Give a share above 0 for each of the buckets {', '.join(users)} and for no other.")
    return float(chisquare([*users.values()], meant / meant.sum() * sum(users.values())).pvalue)


def refusal(users: Mapping[str, int], p: float) -> str | None:
    """Why nothing may be concluded from these users and the p-value of their sample ratio; None if it may."""
    if p < MISMATCH_LEVEL:
        counts = ", ".join(f"{name} {count:,}" for name, count in users.items())
        return f"users did not fall into the buckets as meant ({counts}; p = {p:.1e}): assignment or logging is broken"
    if min(users.values()) < ENOUGH_USERS:
        return f"a bucket has fewer than {ENOUGH_USERS} users"
    return None


def by_user(log: pd.DataFrame, covariates: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each user, its number the index."""
    sums = dict.fromkeys(("pages", "clicked_pages", "clicks", "timed_clicks", "seconds"), "sum")
    users = log.groupby("user").agg(dict.fromkeys(("bucket", *covariates), "first") | sums)
    return users.assign(users=1, clicked=users["clicked_pages"] > 0)


def log_ratios(
    users: pd.DataFrame, buckets: Sequence[str], name: str, covariates: Sequence[str] = ()
) -> list[tuple[float, pd.Series]]:
    """The log of a measure in each bucket, and each user's influence on it; these squared add up to its variance.

    Covariates are regressed out by one slope for all buckets; a user without a value counts as the mean.

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
    """Every treatment against the control in every measure.

    The interval is the normal one of the log ratio, as in scipy's `relative_risk`.

    Args:
        users: As from `by_user`. With a row for each page it is the naive test, whose intervals are too narrow.
        buckets: The control first.
        covariates: Columns of `users`.
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
    """An effect from the two log values and the standard error of their difference."""
    values = float(np.exp(control)), float(np.exp(treatment))
    if not np.isfinite([control, treatment]).all():
        return Effect(name, bucket, *values, np.nan, (np.nan, np.nan), np.nan)
    change, half = treatment - control, norm.ppf(1 - LEVEL / 2) * error
    p = 2 * norm.sf(abs(change) / error) if error else float(change == 0)
    interval = float(np.expm1(change - half)), float(np.expm1(change + half))
    return Effect(name, bucket, *values, float(np.expm1(change)), interval, float(p))


def novelty(log: pd.DataFrame, buckets: Sequence[str]) -> tuple[dict[str, list[Effect]], list[dict[str, Any]]]:
    """The effects of each day, and whether they grow or fade.

    The trend is the slope of the log ratio over the days, which weigh by their precision. Its error is by user too.

    Returns:
        The effects by day; for each measure and treatment {name, bucket, per_day, interval, p}, from three days on.
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
            influence = np.zeros(log["user"].max() + 1)
            for part, day in zip(share, known, strict=True):
                for _, values in (ratios[day][0], ratios[day][place]):
                    influence[values.index] += part * values.to_numpy()
            slope, error = share @ change[known], np.sqrt((influence**2).sum())
            one = _effect(name, bucket, 0.0, slope, error)
            trend = {"name": name, "bucket": bucket, "per_day": one.relative_difference}
            trends.append(trend | {"interval": one.interval, "p": one.p})
    return {day: effects(users, buckets) for day, users in days.items()}, trends


def power(
    users: pd.DataFrame, buckets: Sequence[str], covariates: Sequence[str] = (), days: int | None = None
) -> list[dict[str, Any]]:
    """What it takes on traffic like this to find the paper's effects four times out of five, two-sided at 5%.

    Args:
        users: As from `by_user`.
        buckets: The control first.
        covariates: Columns of `users`.
        days: How many days the log holds.

    Returns:
        For each measure {name, detectable, effect, users, days}: the relative difference that this log can find, the
        paper's effect, users needed for it in each bucket, days if they keep coming as they did; None if unknown.
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
    """Draft one list from two rankings: in each round both pick their best document that is left, in random order.

    Args:
        first: Document ids of one ranker, best first.
        second: Those of the other.
        flips: For each round who picks first: 0 or 1.

    Returns:
        The shown documents in order with who picked them, 0 or 1; it ends where one ranking does.

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
    """Lists for every query that two runs rank, the same whenever they are made.

    Draft 2k + 1 is draft 2k with every flip turned, so neither ranker has more first picks.

    Args:
        first: TREC run or table of scores.
        second: Another.
        depth: Documents in a list.
        drafts: Lists for each query.

    Returns:
        Columns query_id, draft, rank from 1, doc_id, team (0: the first run's pick, 1: the second's).

    Raises:
        ValueError: Depth or drafts are not even, or the runs share no query.
    """
    if depth < 2 or depth % 2 or drafts < 2 or drafts % 2:
        raise ValueError(f"depth and drafts are even numbers, not {depth} and {drafts}.")
    runs = [
        read_run(source).sort_values("teacher_score", ascending=False, kind="stable") for source in (first, second)
    ]
    one, other = (run.groupby("query_id")["doc_id"].agg(list) for run in runs)
    if not len(both := one.index.intersection(other.index)):
        raise ValueError(f"{first} and {second} share no query.")
    if alone := len(one) + len(other) - 2 * len(both):
        logger.warning("%d queries that only one of %s and %s ranks get no list.", alone, first, second)
    rows = []
    for query in both:
        for draft in range(drafts):
            flips = np.random.default_rng([zlib.crc32(query.encode()), draft // 2]).integers(2, size=depth // 2)
            picked = team_draft(one[query], other[query], [int(flip) ^ draft % 2 for flip in flips])
            rows += [(query, draft, rank, *pick) for rank, pick in enumerate(picked.items(), 1)]
    return pd.DataFrame(rows, columns=["query_id", "draft", "rank", "doc_id", "team"])


def preference(pages: pd.DataFrame) -> dict[str, Any]:
    """Whether users prefer the second ranker, from what `read_credit` gives.

    Returns:
        users, pages, first_wins, second_wins and ties (of pages); difference, the share of pages that the second
        ranker won less that of the first, with its 95% interval and p by user (delta method); p_sign of the sign test
        over users.
    """
    users, wins = pages.groupby("user_id")["credit"].agg(["sum", "size"]), pages["credit"].value_counts()
    difference = users["sum"].sum() / len(pages)
    error = float(np.sqrt(((users["sum"] - difference * users["size"]) ** 2).sum())) / len(pages)
    half, up, down = norm.ppf(1 - LEVEL / 2) * error, int((users["sum"] > 0).sum()), int((users["sum"] < 0).sum())
    found = {"users": len(users), "pages": len(pages), "first_wins": int(wins.get(-1, 0))}
    found |= {"second_wins": int(wins.get(1, 0)), "ties": int(wins.get(0, 0))}
    p = 2 * norm.sf(abs(difference) / error) if error else float(difference == 0)
    test = {"difference": float(difference), "interval": (difference - half, difference + half), "p": float(p)}
    return found | test | {"p_sign": float(binomtest(up, up + down).pvalue) if up + down else 1.0}
