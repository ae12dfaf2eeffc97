"""The first sentence of a report: who wins, by how much, at which speed, how sure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_disranker.evaluation.significance import LEVEL, Comparison
from hf_disranker.recipes.rankings import Evaluation


def is_distilled(one: Evaluation) -> bool:
    """Return True for a student with a teacher."""
    return one.about.get("role") == "student" and bool(one.about.get("teacher"))


def base_and_ours(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, Evaluation]:
    """Return BM25 or else the first ranker, and the best distilled student or else the last ranker."""
    base = next((one for one in evaluations if one.about.get("role") == "bm25"), evaluations[0])
    students = filter(is_distilled, evaluations)
    return base, max(students, key=lambda one: one.measures["ndcg@10"], default=evaluations[-1])


def teacher_of(student: Evaluation, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation of a student's teacher; the last teacher if the stored path matches none."""
    teachers = {one.about.get("source"): one for one in evaluations if one.about.get("role") == "teacher"}
    # If the teacher folder was moved, the path stored in the student no longer matches.
    return teachers.get(student.about.get("teacher"), [*teachers.values()][-1] if teachers else None)


def tested(evaluations: Sequence[Evaluation], pairs: Iterable[tuple[str, str]] | None) -> list[tuple[str, str]] | None:
    """Add the pair of the verdict, and one with the baseline for each ranker in no pair; None stays None."""
    if pairs is None:
        return None
    chosen = [*pairs]
    base, ours = (one.name for one in base_and_ours(evaluations))
    if ours != base and not any({*pair} == {ours, base} for pair in chosen):
        chosen.insert(0, (ours, base))
    named = {name for pair in chosen for name in pair}
    return chosen + [(one.name, base) for one in evaluations if one.name not in named | {base}]


def verdict(evaluations: Sequence[Evaluation], compared: Sequence[Comparison], why_not: str | None) -> str:
    """Return one sentence on the student against the baseline and its teacher, or else the best ranker.

    Args:
        evaluations: Rankings of the same judgments.
        compared: Paired tests, with that of the student and the baseline; without it there is no verdict.
        why_not: Reason not to call any difference significant, or None.
    """
    base, ours = base_and_ours(evaluations)
    one = next((one for one in compared if {one.first, one.second} == {base.name, ours.name}), None)
    if one is None:
        return ""
    sign = 1 if one.first == ours.name else -1
    low, high = sorted(sign * end for end in one.interval)
    difference = f"{sign * one.difference:+.3f} NDCG@10, 95% interval {low:+.3f} to {high:+.3f}"
    context = _context(ours, evaluations)
    if why_not:
        verb, sure = ("leads" if sign * one.difference > 0 else "trails"), f"not called significant: {why_not}"
    else:
        won = "beats" if sign * one.difference > 0 else "loses to"
        verb = won if one.p_holm < LEVEL else "shows no significant difference from"
        sure = f"Holm-corrected p = {one.p_holm:.4f}"
    return f"{ours.name} {verb} {base.name} ({difference}, {sure}){context}."


def _context(ours: Evaluation, evaluations: Sequence[Evaluation]) -> str:
    """Relate the student to its teacher in quality and speed, and name the best ranker if it is a third one."""
    parts, teacher = "", teacher_of(ours, evaluations) if is_distilled(ours) else None
    if teacher is not None and teacher.measures["ndcg@10"]:
        share = ours.measures["ndcg@10"] / teacher.measures["ndcg@10"]
        parts = f" and has {share:.0%} of the NDCG@10"
        speed, slower = (one.about.get("pairs_per_s") for one in (ours, teacher))
        if speed and slower:
            times = speed / slower
            parts += f" at {times:,.{int(times < 10)}f} times the speed"
        parts += f" of {teacher.name}"
    best = max(evaluations, key=lambda one: one.measures["ndcg@10"])
    if best.name not in (ours.name, teacher and teacher.name):
        parts += f"; {best.name} has the highest NDCG@10 ({best.measures['ndcg@10']:.3f})"
    return parts
