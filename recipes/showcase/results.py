"""Results of the showcase: evaluation, paired tests, goals, verification of the shipped scores, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_disranker.data.bm25 import bm25_scores
from hf_disranker.data.tables import read_table
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.rankings import Evaluation, compare_evaluations, describe, score_with
from hf_disranker.recipes.report.page import write_report
from hf_disranker.recipes.showcase.scoring import load_teacher
from hf_disranker.scoring.run import verify
from hf_disranker.scoring.store import ScoreStore

NAMES = {"bert": "BERT of 0.8M", "minilm3": "MiniLM, 3 layers", "minilm": "MiniLM"}
# Kinds of models, in the order of the table.
KINDS = {"rival": "clicks, labels", "likelihood": "LLM alone", "student": "LLM, clicks, labels"}
# Lead in NDCG@10 over the rival, with p < P in each seed; share of the teacher's NDCG@10; multiple of its pairs/s.
LEADS = {"bert": 0.03, "minilm3": 0.01, "minilm": 0.01}
P, SHARE, FASTER = 0.01, 0.95, 50
# Pairs rescored, pairs timed, and the largest difference tolerated, in standard deviations of the scores: bfloat16
# on another machine rounds in another order.
_SAMPLE, _TIMED, TOLERANCE = 64, 128, 0.1


@dataclass(frozen=True)
class Goal:
    """A goal that was fixed before the runs.

    Args:
        what: Target, in words.
        reached: Result, in words.
        met: True if the target was reached; None if it was not measured.
    """

    what: str
    reached: str
    met: bool | None


class Examined(NamedTuple):
    """Result of verifying and timing the teacher.

    Args:
        verdict: How far rescored samples of the shipped scores differ, or why none were rescored.
        pairs_per_s: Throughput; None if it was not measured.
    """

    verdict: str
    pairs_per_s: float | None


def show_results(out: Path, students: Sequence[str], seeds: Sequence[int], teacher: Examined) -> list[Goal]:
    """Evaluate every ranker on the development queries; print the table and the goals; write the report.

    Args:
        out: Folder of the showcase; files are written to its subfolder `report`.
        students: Names of the students.
        seeds: Seeds of each.
        teacher: Result of `examine_teacher`.
    """
    print("\n== report: every ranker on the same development pairs", flush=True)
    evaluations = evaluate(out, students, seeds)
    evaluations["teacher"].about["pairs_per_s"] = teacher.pairs_per_s
    report = out / "report"
    for name, evaluation in evaluations.items():
        evaluation.save(report / "eval" / f"{name}.json")
    tests = [(f"{name}-student-{seed}", f"{name}-rival-{seed}") for name in students for seed in seeds]
    goals = [goal for name in students for goal in goals_of(evaluations, name, seeds)]
    lines = ["", *table(evaluations, students, seeds), "", *map(goal_line, goals), "", teacher.verdict]
    print("\n".join(lines))
    write_report(list(evaluations.values()), report / "report.html", pairs=tests, titles=titles(students, seeds))
    results = {name: one.measures | {"about": one.about} for name, one in evaluations.items()}
    save_json(
        {"rankers": results, "goals": list(map(asdict, goals)), "check": teacher.verdict}, f"{report}/results.json"
    )
    return goals


def evaluate(out: Path, students: Sequence[str], seeds: Sequence[int]) -> dict[str, Evaluation]:
    """Evaluate BM25, the teacher's shipped scores and all students on the development pairs that have such a score."""
    source = f"{out}/data/judgments.parquet"
    judged, corpus = read_table(source, "judgments", split="dev"), read_table(f"{out}/data/corpus.parquet", "corpus")
    shipped = ScoreStore(out / "dev_scores").read()[["query_id", "doc_id", "teacher_score"]]
    dev = judged.merge(shipped, on=["query_id", "doc_id"])
    if len(dev) < len(judged):
        print(
            f"{len(judged) - len(dev):,} of {len(judged):,} development pairs have no shipped score: left out for all."
        )
    facts = {"judgments": source, "split": "dev"}
    rows, scored = dev.drop(columns="teacher_score"), dev["teacher_score"].to_numpy(np.float64)
    bm25 = bm25_scores(rows, corpus[corpus["split"] == "dev"])
    found = {"bm25": Evaluation.of("bm25", rows.assign(score=bm25), role="bm25", **facts)}
    found["teacher"] = Evaluation.of("teacher", rows.assign(score=scored), role="teacher", source="SmolLM2", **facts)
    for name in [f"{student}-{kind}-{seed}" for student in students for kind in KINDS for seed in seeds]:
        ranker = Ranker.from_pretrained(out / name)
        scores, speed = score_with(ranker, rows, progress=False)
        about = facts | describe(ranker) | {"source": str(out / name), "pairs_per_s": speed}
        found[name] = Evaluation.of(name, rows.assign(score=scores), **about)
    return found


def examine_teacher(out: Path, folder: Path) -> Examined:
    """Rescore samples of the shipped scores and time the teacher.

    Args:
        out: Folder of the showcase, with the score stores.
        folder: Folder of SmolLM2; without one, nothing is verified or timed.

    Raises:
        ValueError: If the scores differ by more than the tolerance, or are those of another teacher.
    """
    if not (folder / "config.json").is_file():
        return Examined(f"Shipped scores: NOT VERIFIED, speed not measured: {folder} is missing (make models).", None)
    stores = [ScoreStore(out / name) for name in ("scores", "dev_scores")]
    engine = load_teacher(str(folder), stores[0].manifest()["dtype"])
    differences = [verify(engine, store, _SAMPLE) / store.summary().std for store in stores]
    largest = (
        f"largest difference of {len(stores) * _SAMPLE} pairs scored again: {max(differences):.3f} standard deviations"
    )
    if max(differences) > TOLERANCE:
        raise ValueError(f"The shipped scores are not those of {folder}: {largest}, more than {TOLERANCE}.")
    _, speed = score_with(engine, stores[1].read().head(_TIMED), progress=False)
    return Examined(f"Shipped scores: verified, {largest}.", speed)


def goals_of(evaluations: Mapping[str, Evaluation], name: str, seeds: Sequence[int]) -> list[Goal]:
    """Compare a student with its rival, query by query and seed by seed, and with the teacher."""
    pairs = [(f"{name}-student-{seed}", f"{name}-rival-{seed}") for seed in seeds]
    compared = compare_evaluations([*evaluations.values()], pairs=pairs)
    title, lead = NAMES[name], LEADS[name]
    reached = ", ".join(f"{one.difference:+.3f} (p = {one.p:.4f})" for one in compared)
    ahead = all(one.difference >= lead and one.p < P for one in compared)
    goals = [
        Goal(f"{title}: NDCG@10 {lead:+.2f} over the rival, p < {P:g}, each of {len(seeds)} seeds", reached, ahead)
    ]
    teacher = evaluations["teacher"]
    shares = [evaluations[first].measures["ndcg@10"] / teacher.measures["ndcg@10"] for first, _ in pairs]
    reached = ", ".join(f"{share:.1%}" for share in shares)
    goals.append(Goal(f"{title}: {SHARE:.0%} of the teacher's NDCG@10", reached, min(shares) >= SHARE))
    speed, slow = mean_speed(evaluations, [first for first, _ in pairs]), teacher.about.get("pairs_per_s")
    times = f"{speed / slow:,.0f} times" if slow else "not measured"
    goals.append(Goal(f"{title}: {FASTER} times its pairs/s", times, speed / slow >= FASTER if slow else None))
    return goals


def mean_speed(evaluations: Mapping[str, Evaluation], names: Sequence[str]) -> float:
    """Return the mean throughput of several rankers in pairs/s."""
    return float(np.mean([evaluations[name].about["pairs_per_s"] for name in names]))


def goal_line(goal: Goal) -> str:
    """Format a goal as a line."""
    verdict = {True: "met", False: "MISSED", None: "?"}[goal.met]
    return f"{verdict:7}{goal.what}: {goal.reached}"


def titles(students: Sequence[str], seeds: Sequence[int]) -> dict[str, str]:
    """Return the display name of each ranker."""
    models = {
        f"{name}-{kind}-{seed}": f"{NAMES[name]} ({KINDS[kind]}; seed {seed})"
        for name in students
        for kind in KINDS
        for seed in seeds
    }
    return {"bm25": "BM25", "teacher": "SmolLM2-135M, not trained"} | models


def table(evaluations: Mapping[str, Evaluation], students: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Format the rankers as a text table: NDCG@10 of each seed, means of NDCG@10 and PNR, pairs/s."""
    head = "".join(f"{f'seed {seed}':>8}" for seed in seeds)
    lines = [f"{'NDCG@10':40}{head}{'mean':>8}{'PNR':>8}{'pairs/s':>9}"]
    shown = titles(students, seeds)
    for name in ("bm25", "teacher"):
        lines.append(_line(shown[name], [evaluations[name]], len(seeds)))
    for student in students:
        for kind, what in KINDS.items():
            runs = [evaluations[f"{student}-{kind}-{seed}"] for seed in seeds]
            lines.append(_line(f"{NAMES[student]}: {what}", runs, len(seeds)))
    return lines


def _line(title: str, runs: Sequence[Evaluation], columns: int) -> str:
    values = [run.measures["ndcg@10"] for run in runs]
    by_seed = "".join(f"{value:8.3f}" for value in values) if len(runs) == columns else " " * 8 * columns
    pnr = np.mean([np.inf if run.measures["pnr"] is None else run.measures["pnr"] for run in runs])
    speeds = [run.about["pairs_per_s"] for run in runs if run.about.get("pairs_per_s")]
    speed = f"{np.mean(speeds):9,.0f}" if speeds else f"{'-':>9}"
    return f"{title:40}{by_seed}{np.mean(values):8.3f}{pnr:8.2f}{speed}"
