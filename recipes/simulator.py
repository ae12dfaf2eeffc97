"""Simulated click logs of A/B tests and interleavings with a known effect.

    control, treatment = (graded(run, "judgments.parquet") for run in ("bm25.run", "student.run"))
    ab_log({"bm25": control, "student": treatment}, users=20_000).to_parquet("log.parquet")
    print(true_measures(control), true_measures(treatment))

There are two click models on judged documents. `position` (examination hypothesis): rank k is examined at probability
`EXAMINED[k]`, independently of other documents, and an examined document is clicked with a probability that depends on
its grade. `cascade` (Craswell, Zoeter, Taylor and Ramsey 2008): documents are examined from the top until the first
click. Users differ in click rate, dwell time and number of pages, so the pages of a user are correlated.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from hf_disranker.data.trec import read_judgments, read_run

Model = Literal["position", "cascade"]
# By grade, the last for all higher ones: click probability of an examined document, and mean dwell time in seconds.
ATTRACTION, SECONDS = np.array([0.04, 0.12, 0.3]), np.array([15.0, 45.0, 75.0])
EXAMINED = 1 / np.sqrt(np.arange(1, 101))
# Factors on the click probability by kind of user, equally frequent; numbers of pages per user, and their frequencies.
READINESS = np.array([0.2, 0.8, 2.0])
PAGES, PAGES_SHARE = np.array([1, 2, 4, 8, 30]), np.array([0.4, 0.25, 0.2, 0.1, 0.05])
PAGES_BEFORE = 10


def graded(run: str, judgments: str, split: str = "dev", depth: int = 10) -> pd.DataFrame:
    """Return the grades of a run's first documents, a row per query: 0 for unjudged ones, -1 beyond its end."""
    rows = read_run(run).sort_values("teacher_score", ascending=False, kind="stable")
    judged = read_judgments(judgments, split)[["query_id", "doc_id", "label"]]
    rows = rows.assign(place=rows.groupby("query_id").cumcount()).query("place < @depth")
    rows = rows.merge(judged, on=["query_id", "doc_id"], how="left").fillna({"label": 0})
    return rows.pivot(index="query_id", columns="place", values="label").fillna(-1).astype(int)


def true_measures(
    control: pd.DataFrame, treatment: pd.DataFrame | None = None, share: float = 1.0, model: Model = "position"
) -> dict[str, float]:
    """Compute the expected measures if a share of the pages shows the treatment's ranking."""
    pages = np.zeros((3, len(READINESS)))  # clicked pages, clicks and seconds per page, by kind of user
    for grades, weight in ((control, 1.0 - share), (treatment if treatment is not None else control, share)):
        clicks = _probabilities(grades.to_numpy(), READINESS[:, None, None], model)
        clicked = 1 - (1 - clicks).prod(axis=2)
        if model == "cascade":
            above = np.cumprod(1 - clicks, axis=2) / (1 - clicks)
            clicks = clicks * above
        seconds = clicks * SECONDS[_grade(grades.to_numpy())]
        pages += weight * np.array([clicked.mean(1), clicks.sum(2).mean(1), seconds.sum(2).mean(1)])
    never = ((1 - pages[0][:, None]) ** PAGES * PAGES_SHARE).sum(axis=1)
    clicked, clicks, seconds = pages.mean(axis=1)
    values = clicked, 1 - never.mean(), clicks, seconds / clicks
    return dict(zip(("page_ctr", "user_ctr", "clicks_per_page", "dwell"), map(float, values), strict=True))


def ab_log(
    rankings: Mapping[str, pd.DataFrame],
    users: int,
    model: Model = "position",
    share: float | Sequence[float] = 1.0,
    days: int = 14,
    documents: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Simulate the log of an A/B test over the queries of the control, which all rankings must have.

    Args:
        rankings: Results of `graded` by bucket; the first is the control.
        users: Number of users, split at random over the buckets.
        model: Click model.
        share: Share of a treatment's pages with its own ranking instead of the control's; a sequence has one value per
            day, for an effect that changes.
        days: Number of days.
        documents: If True, write a row per shown document, with a page_id, instead of a row per page.
        seed: Random seed.

    Returns:
        Columns user_id, bucket, query_id, day, device, clicks_before (on the same number of pages before the test for
        every user), clicked and dwell_seconds.
    """
    rng = np.random.default_rng(seed)
    names, control = [*rankings], next(iter(rankings.values()))
    grades = np.stack([one.loc[control.index].to_numpy() for one in rankings.values()])
    bucket, kind, visitor = _visitors(users, rng, len(rankings))
    query, day = rng.integers(len(control), size=len(visitor)), rng.integers(days, size=len(visitor))
    shown = np.where(rng.random(len(visitor)) < np.broadcast_to(share, days)[day], bucket[visitor], 0)
    clicks, seconds = _clicks(
        grades[shown, query], kind[visitor], rng.lognormal(-0.125, 0.5, users)[visitor], model, rng
    )
    before = _probabilities(grades[0], READINESS[:, None, None], model).mean(axis=(1, 2))[kind] * grades.shape[2]
    rows = {"user_id": np.char.add("u", visitor.astype(str)), "bucket": np.array(names)[bucket[visitor]]}
    rows |= {"query_id": control.index.to_numpy()[query], "day": np.datetime64("2026-03-02") + day}
    rows |= {"device": np.where(rng.random(users) < 0.6, "phone", "desktop")[visitor]}
    log = pd.DataFrame(rows | {"clicks_before": rng.poisson(PAGES_BEFORE * before)[visitor]})
    if not documents:
        return log.assign(clicked=clicks.sum(axis=1), dwell_seconds=seconds.sum(axis=1))
    log = log.assign(page_id=np.arange(len(log))).loc[np.repeat(log.index, clicks.shape[1])]
    return log.assign(clicked=clicks.ravel(), dwell_seconds=seconds.ravel()).reset_index(drop=True)


def interleaved_log(
    lists: pd.DataFrame, judgments: str, users: int, split: str = "dev", model: Model = "position", seed: int = 0
) -> pd.DataFrame:
    """Simulate the log of an interleaving, with a row per shown document; user ids determine the drafts.

    Args:
        lists: Result of `draft_lists`.
        judgments: Judgments as in `read_judgments`.
        users: Number of users.
        split: Split of the judgments.
        model: Click model.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    judged = read_judgments(judgments, split).set_index(["query_id", "doc_id"])["label"]
    key = pd.MultiIndex.from_frame(lists[["query_id", "doc_id"]])
    places = lists.assign(grade=judged.reindex(key).fillna(0).to_numpy(int)).set_index(["query_id", "draft", "rank"])
    grades = places["grade"].unstack(fill_value=-1)  # -1 past the end of a list
    documents = places["doc_id"].unstack().reindex(grades.index).to_numpy()
    drafts = lists["draft"].nunique()
    _, kind, visitor = _visitors(users, rng, 1)
    draft = np.array([zlib.crc32(b"u%d" % user) % drafts for user in range(users)])[visitor]
    query = rng.integers(len(grades) // drafts, size=len(visitor))
    row, depth = query * drafts + draft, grades.shape[1]
    clicks, _ = _clicks(grades.to_numpy()[row], kind[visitor], np.ones(len(visitor)), model, rng)
    log = pd.DataFrame(
        {"user_id": np.char.add("u", visitor.astype(str)), "draft": draft, "page_id": np.arange(len(row))}
    )
    log["query_id"] = grades.index.get_level_values("query_id").to_numpy()[row]
    log = log.loc[np.repeat(log.index, depth)].assign(doc_id=documents[row].ravel(), clicked=clicks.ravel())
    return log.dropna(subset="doc_id").reset_index(drop=True)


def _visitors(users: int, rng: np.random.Generator, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the bucket and kind of each user, and the user of each page."""
    pages = rng.choice(PAGES, size=users, p=PAGES_SHARE)
    kind = rng.integers(len(READINESS), size=users)
    return rng.integers(buckets, size=users), kind, np.repeat(np.arange(users), pages)


def _grade(grades: np.ndarray) -> np.ndarray:
    return np.minimum(grades, len(ATTRACTION) - 1)


def _probabilities(grades: np.ndarray, readiness: np.ndarray, model: Model) -> np.ndarray:
    """Return click probabilities, in a cascade given examination; `readiness` broadcasts with `grades`."""
    examined = EXAMINED[: grades.shape[-1]] if model == "position" else 1.0
    attraction = np.where(grades >= 0, ATTRACTION[_grade(grades)], 0)
    return np.minimum(readiness * attraction * examined, 0.95)


def _clicks(
    grades: np.ndarray, kind: np.ndarray, patience: np.ndarray, model: Model, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw clicks and dwell times in seconds on the documents of pages, both of shape (pages, depth)."""
    clicks = rng.random(grades.shape) < _probabilities(grades, READINESS[kind][:, None], model)
    if model == "cascade":
        clicks &= np.cumsum(clicks, axis=1) == 1
    seconds = rng.exponential(SECONDS[_grade(grades)]) * patience[:, None]
    return clicks.astype(int), np.where(clicks, seconds, 0.0)
