"""Results of the quickstart: table, picture, paired tests, HTML report and example searches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig

from hf_disranker.data.bm25 import bm25_scores, mine_candidates
from hf_disranker.data.tables import pair_texts, read_table
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.evaluate import interval_text, value_text
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.rankings import Evaluation, compare_evaluations, describe, score_with
from hf_disranker.recipes.report import charts
from hf_disranker.recipes.report.page import interval_bar, write_report

TITLES = {
    "bm25": "BM25",
    "label_student": "BERT, labels alone",
    "click_student": "BERT, clicks, labels",
    "teacher": "LLM teacher",
    "student": "BERT, distilled",
}  # in the order of the table
STUDENTS = ("label_student", "click_student", "student")
# Paired tests: the ranker that should win comes first.
COMPARED = (
    ("teacher", "bm25"),
    ("student", "bm25"),
    ("student", "label_student"),
    ("student", "click_student"),
)
EXAMPLE_QUERIES = (
    "read a json file",
    "how to sort a dict by value",
    "plot a histogram",
    "split a string",
    "download a file from the hub",
    "compute the mean of an array",
    "shortest path between two nodes",
    "parse command line arguments",
    "train a random forest",
    "convert a string to a date",
)


def show_results(out: Path) -> None:
    """Evaluate every ranker on the development queries, print the results and write the report.

    Args:
        out: Folder of the quickstart; files are written to its subfolder `report`, what is printed to `results.txt`.
    """
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    rankers = {name: Ranker.from_pretrained(out / name) for name in (*STUDENTS, "teacher")}
    evaluations = evaluate_all(out, rankers, corpus[corpus["split"] == "dev"])
    report, results = out / "report", [summary(evaluation) for evaluation in evaluations.values()]
    for name, evaluation in evaluations.items():
        evaluation.save(report / "eval" / f"{name}.json")
    save_json(results, f"{report}/results.json")
    (report / "results.svg").write_text(results_picture([*evaluations.values()]), encoding="utf-8")
    write_report([*evaluations.values()], report / "report.html", pairs=COMPARED, titles=TITLES)
    searches = search_examples(EXAMPLE_QUERIES, corpus, rankers["student"])
    (report / "searches.txt").write_text("\n\n".join(searches) + "\n", encoding="utf-8")
    student, teacher = (summary(evaluations[name]) for name in ("student", "teacher"))
    kept, faster = (student[name] / teacher[name] for name in ("ndcg@10", "pairs_per_s"))
    text = f"""{results_table([*evaluations.values()])}

The distilled BERT has {kept:.0%} of its teacher's NDCG@10 at {faster:.1f} times its pairs/s.
{comparisons(out, evaluations)}

{searches[0]}

Open {report}/report.html for scores, learning curves, gains and losses. More searches: {report}/searches.txt.

The student is a stock BERT classifier; sentence-transformers loads it directly:

    from sentence_transformers import CrossEncoder
    ranker = CrossEncoder("{out}/student")
    print(ranker.rank("plot a histogram", ["smtplib: send mail", "numpy.histogram: bins of a data set"]))

Next: run the same stages on your own data, see `disranker cpt --help` and the README.
"""
    (report / "results.txt").write_text(text, encoding="utf-8")
    print(text)


def evaluate_all(out: Path, rankers: Mapping[str, Ranker], corpus: pd.DataFrame) -> dict[str, Evaluation]:
    """Evaluate BM25 and the rankers on the same pairs, in the order of the table.

    Args:
        out: Folder of the quickstart.
        rankers: Rankers by name.
        corpus: Documents for BM25's word statistics.
    """
    source = f"{out}/data/sample/judgments.parquet"
    dev = read_table(source, "judgments", split="dev")
    facts: dict[str, Any] = {"judgments": source, "split": "dev"}
    evaluations = {"bm25": Evaluation.of("bm25", dev.assign(score=bm25_scores(dev, corpus)), role="bm25", **facts)}
    for name, ranker in rankers.items():
        scores, speed = score_with(ranker, dev, progress=False)
        about = facts | describe(ranker) | {"source": str(out / name), "pairs_per_s": speed}
        evaluations[name] = Evaluation.of(name, dev.assign(score=scores), **about)
    return {name: evaluations[name] for name in TITLES}


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the row of the results table: name, parameters, pairs_per_s, measures and their intervals."""
    measures, about = evaluation.measures, evaluation.about
    row = {"name": evaluation.name, "parameters": about.get("parameters"), "pairs_per_s": about.get("pairs_per_s")}
    return row | {kind: measures[kind] for kind in ("ndcg@5", "ndcg@10", "pnr", "intervals")}


def comparisons(out: Path, evaluations: dict[str, Evaluation]) -> str:
    """Describe the pre-training loss, the students' agreement with the teacher and the paired tests; save both."""
    losses = json.loads((out / "cpt" / "cpt.json").read_text())
    before, after = losses["loss_before"], losses["loss_after"]
    uniform = np.log(AutoConfig.from_pretrained(out / "cpt").vocab_size)
    teacher = evaluations["teacher"].rows
    taus = {
        name: metrics.query_mean(
            metrics.kendall_tau(evaluations[name].rows["score"], teacher["score"], teacher["query_id"])
        )
        for name in STUDENTS
    }
    agreement = ", ".join(f"{name} {tau:.3f}" for name, tau in taus.items())
    lines = [
        f"Held-out loss on title + summary: {before:.2f} -> {after:.2f} nats per token (uniform: {uniform:.2f}).",
        f"Kendall tau with the teacher, mean over queries: {agreement}.",
        "Paired differences in NDCG@10 (95% interval; p of a randomisation test, p after Holm's correction):",
    ]
    compared = compare_evaluations([*evaluations.values()], pairs=COMPARED)
    for one in compared:
        names, (low, high) = f"{TITLES[one.first]:22} - {TITLES[one.second]:22}", one.interval
        lines.append(f"  {names} {one.difference:+.3f}  [{low:+.3f}, {high:+.3f}]  p = {one.p:.4f}, {one.p_holm:.4f}")
    tests = [asdict(one) | {"rankers": [one.first, one.second]} for one in compared]
    save_json({"kendall_tau_with_teacher": taus, "ndcg@10": tests}, f"{out}/report/comparison.json")
    return "\n".join(lines)


def results_table(evaluations: Sequence[Evaluation]) -> str:
    """Format the rankers as a text table with 95% intervals by query in brackets."""
    head = f"{'':22}{'parameters':>11}{'NDCG@5':>9}{'NDCG@10':>9}{'':16}{'PNR':>7}{'':15}{'pairs/s':>8}"
    return "\n".join([head, *map(_line, evaluations)])


def _line(one: Evaluation) -> str:
    measures, parameters, speed = one.measures, one.about.get("parameters"), one.about.get("pairs_per_s")
    ndcg, pnr = (f"[{interval_text(measures, name, digits)}]" for name, digits in (("ndcg@10", 3), ("pnr", 2)))
    return (
        f"{TITLES[one.name]:22}"
        + (f"{parameters / 1e6:10.1f}M" if parameters else f"{'-':>11}")
        + f"{measures['ndcg@5']:9.3f}{measures['ndcg@10']:9.3f}{ndcg:>16}"
        + f"{value_text(measures, 'pnr', 2):>7}{pnr:>15}"
        + (f"{speed:8,.0f}" if speed else f"{'-':>8}")
    )


def results_picture(evaluations: Sequence[Evaluation]) -> str:
    """Draw NDCG@10 with its 95% interval and the speed of each ranker as an SVG for light and dark pages."""
    speeds = [one.about.get("pairs_per_s") for one in evaluations]
    notes = [f"{speed:,.0f} pairs/s" if speed else "" for speed in speeds]
    bars = [interval_bar(one, TITLES[one.name], "ndcg@10", note) for one, note in zip(evaluations, notes, strict=True)]
    return charts.standalone(charts.intervals(bars, "NDCG@10"))


def search_examples(
    queries: Sequence[str], corpus: pd.DataFrame, ranker: Ranker, depth: int = 20, top: int = 3
) -> list[str]:
    """Show the top documents of each query before and after re-ranking BM25's candidates.

    Args:
        queries: Queries as a user would type them.
        corpus: Table with the columns doc_id, title and summary.
        ranker: Ranker that sorts the candidates.
        depth: Number of candidates from BM25.
        top: Number of documents to show.

    Returns:
        A few lines of text for each query.
    """
    typed = pd.DataFrame({"query_id": [str(place) for place in range(len(queries))], "query": list(queries)})
    found = mine_candidates(typed, corpus, top_k=depth).merge(corpus, on="doc_id").sort_values("rank")
    by_query = (found[found["query_id"] == query_id].reset_index(drop=True) for query_id in typed["query_id"])
    return [_search(query, rows, ranker, top) for query, rows in zip(queries, by_query, strict=True)]


def _search(query: str, rows: pd.DataFrame, ranker: Ranker, top: int) -> str:
    order = np.argsort(-ranker.predict(pair_texts(rows)), kind="stable")
    before, after = rows["title"][:top].tolist(), rows["title"].iloc[order[:top]].tolist()
    width = max(map(len, [TITLES["bm25"], *before]))
    lines = [f"Query: {query}", f"     {TITLES['bm25']:{width}}   {TITLES['student']}"]
    lines += [
        f"  {place}. {old:{width}}   {new}" for place, (old, new) in enumerate(zip(before, after, strict=True), 1)
    ]
    return "\n".join(lines)
