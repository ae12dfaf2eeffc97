"""What a run has to show: one self-contained HTML file, and plain text for the quickstart."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy.stats import gaussian_kde

from hf_disranker.data.bm25 import mine_candidates
from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.evaluate import UNJUDGED
from hf_disranker.evaluation.rankings import Evaluation, compare_evaluations
from hf_disranker.evaluation.significance import Comparison, marks, refusal
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.report import charts

TITLES = {
    "bm25": "BM25",
    "label_student": "BERT, labels alone",
    "click_student": "BERT, clicks, labels",
    "teacher_no_cpt": "LLM teacher, no CPT",
    "teacher": "LLM teacher",
    "teachers": "mean of both teachers",
    "student": "BERT, distilled",
}
_POINTS = 2000
_CASES = 10
_SHOWN_DOCUMENTS = 3
# In a trainer's log beside the terms of the loss.
_NOT_TERMS = ("epoch", "step", "grad_norm", "learning_rate", "loss", "score_spread", "total_flos")


def write_report(
    evaluations: Sequence[Evaluation],
    path: Path,
    texts: bool = True,
    pairs: Iterable[tuple[str, str]] | None = None,
    titles: Mapping[str, str] | None = None,
    abtest: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file that needs nothing else: no network, no scripts.

    Args:
        evaluations: rankings of the same judgments. The one with the role teacher is what students are seen against,
            the one named bm25, or else the first, is what gains and losses are counted from. Learning curves and
            options come from the folder of each model, where there is one.
        path: the file.
        texts: False leaves out queries, titles and summaries; ids stay.
        pairs: names of rankers to compare, (first, second); None compares each with each.
        titles: what to call the rankers instead of their names.
        abtest: what `disranker abtest --out` wrote.
    """
    shown = {one.name: (titles or {}).get(one.name, one.name) for one in evaluations}
    compared = compare_evaluations(evaluations, pairs=pairs) if len(evaluations) > 1 else []
    bm25 = next((one.measures["ndcg@10"] for one in evaluations if one.about.get("role") == "bm25"), None)
    first = evaluations[0]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(
        style=Markup(charts.STYLE),
        titles=shown,
        about=first.about,
        rankers=_rankers(evaluations, shown, compared, refusal(first.measures["queries"], bm25)),
        pictures=[
            Markup(charts.intervals([_bar(one, shown[one.name], measure) for one in evaluations], name))
            for measure, name in (("ndcg@10", "NDCG@10"), ("pair_accuracy", "Pair accuracy"))
        ],
        comparisons=[_comparison(one, shown) for one in compared],
        refusal=refusal(first.measures["queries"], bm25) if compared else None,
        slices=_slices(evaluations, shown),
        scatters=_scatters(evaluations, shown),
        distributions=[one for run in evaluations for one in _distribution(run, shown[run.name])],
        curves=[curve for one in evaluations for curve in _curves(one, shown[one.name])],
        changes=_changes(evaluations, shown, texts),
        measures=first.measures,
        abtest=abtest,
        cuts=[(shown[one.name], one.about) for one in evaluations if "documents_cut" in one.about],
        configs=[(shown[one.name], options) for one in evaluations if (options := _options(one))],
        packages=first.about.get("packages", {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`."""
    return b'<meta name="generator" content="hf-disranker">' in path.read_bytes()[:1000]


def _rankers(
    evaluations: Sequence[Evaluation], titles: Mapping[str, str], compared: Sequence[Comparison], why_not: str | None
) -> list[dict[str, Any]]:
    """Rows of the headline table."""
    letters = {one.name: chr(ord("a") + place) for place, one in enumerate(evaluations)}
    beaten = marks(compared, letters) if not why_not else dict.fromkeys(letters, "")
    rows = []
    for one in evaluations:
        speed, parameters = one.about.get("pairs_per_s"), one.about.get("parameters")
        cells = {name: _with_interval(one.measures, name) for name in ("ndcg@10", "pnr", "pair_accuracy", "mrr")}
        rows.append(
            {"letter": letters[one.name], "title": titles[one.name], "marks": beaten[one.name], **cells}
            | {"parameters": f"{parameters / 1e6:,.1f}M" if parameters else "–"}
            | {"speed": f"{speed:,.0f}" if speed else "–", "million": duration(1e6 / speed) if speed else "–"}
        )
    return rows


def _with_interval(measures: Mapping[str, Any], name: str) -> tuple[str, str]:
    digits = 2 if name == "pnr" else 3
    value, ends = measures[name], measures["intervals"].get(name)
    number = "∞" if value is None else f"{value:.{digits}f}"
    return number, "" if ends is None else "–".join("∞" if end is None else f"{end:.{digits}f}" for end in ends)


def _bar(one: Evaluation, title: str, measure: str, note: str = "") -> charts.Bar:
    value, low, high = (
        np.nan if end is None else end for end in (one.measures[measure], *one.measures["intervals"][measure])
    )
    return charts.Bar(title, value, low, high, note, _distilled(one))


def _distilled(one: Evaluation) -> bool:
    return one.about.get("role") == "student" and bool(one.about.get("teacher"))


def _comparison(one: Comparison, titles: Mapping[str, str]) -> dict[str, Any]:
    low, high = one.interval
    return {
        "first": titles[one.first],
        "second": titles[one.second],
        "difference": f"{one.difference:+.3f}",
        "interval": f"{low:+.3f} to {high:+.3f}",
        "p": f"{one.p:.4f}",
        "p_holm": f"{one.p_holm:.4f}",
        "effect": f"{one.effect:+.2f}",
        "queries": f"{one.queries:,}",
        "needed": f"{one.queries_needed:,}" if one.queries_needed else "–",
        "changed": [f"{share:.0%}" for share in one.changed.values()],
    }


def _slices(evaluations: Sequence[Evaluation], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """NDCG@10 by slice; a ranker that was not measured by slices has none."""
    return [
        {"title": titles[one.name], "value": value, "queries": found["queries"], "few": found["few"]}
        | {"ndcg": _with_interval(found, "ndcg@10")}
        for one in evaluations
        for value, found in one.measures.get("slices", {}).items()
    ]


def _scatters(evaluations: Sequence[Evaluation], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The scores of each student that was distilled against its teacher's, on the pairs that both rank.

    The teacher's are in the scale that the student learned.
    """
    teachers = {one.about.get("source"): one for one in evaluations if one.about.get("role") == "teacher"}
    found = []
    for one in filter(_distilled, evaluations if teachers else ()):
        # A folder that was moved since is not the one that the student names.
        teacher = teachers.get(one.about["teacher"], [*teachers.values()][-1])
        both = _ranked(teacher).merge(_ranked(one), on=["query_id", "doc_id"])
        x, y, queries = (both[name].to_numpy() for name in ("score_x", "score_y", "query_id"))
        transform = one.about.get("score_transform") or {"shift": 0.0, "scale": 1.0}
        x = (x - transform["shift"]) / transform["scale"]
        scale, offset = np.polyfit(x, y, 1)
        error = metrics.teacher_error(y, x, queries)
        tau = metrics.query_mean(metrics.kendall_tau(y, x, queries))
        facts = {
            "scale": f"{scale:.2f}",
            "offset": f"{offset:+.2f}",
            "RMSE": f"{error.rmse:.2f}",
            "offset by query": f"{error.offset:.2f}",
            "order in a query": f"{error.order:.2f}",
            "Kendall tau": f"{tau:.3f}",
        }
        drawn = np.random.default_rng(0).permutation(len(x))[:_POINTS]
        axes = titles[teacher.name] + (", rescaled" if one.about.get("score_transform") else ""), titles[one.name]
        spoken = f"Scores of {axes[1]} against {axes[0]}: scale {scale:.2f}, offset {offset:+.2f}"
        picture = Markup(charts.scatter(x[drawn], y[drawn], (offset, scale), axes, spoken))
        found.append({"title": titles[one.name], "picture": picture, "facts": facts, "pairs": len(x)})
    return found


def _ranked(one: Evaluation) -> pd.DataFrame:
    """The rows that have a score of their own: not what a run lacks."""
    return one.rows[~one.rows["missing"].astype(bool)] if "missing" in one.rows.columns else one.rows


def _distribution(one: Evaluation, title: str) -> list[dict[str, Any]]:
    """How a ranker's scores lie for each grade."""
    rows = _ranked(one)
    rows = rows[rows["label"] != UNJUDGED]
    low, high = np.quantile(rows["score"], [0.001, 0.999])
    places = np.linspace(low, high, 100)
    series, means = {}, []
    for grade, part in rows.groupby("label"):
        if part["score"].nunique() > 1:
            drawn = part["score"].sample(min(len(part), _POINTS), random_state=0)
            series[f"grade {grade}"] = places, gaussian_kde(drawn)(places)
            means.append(f"grade {grade} {part['score'].mean():.2f}")
    if not series:
        return []
    spoken = f"Scores of {title} by grade; means: {', '.join(means)}"
    return [{"title": title, "picture": Markup(charts.lines(series, "score", "density", spoken))}]


def _curves(one: Evaluation, title: str) -> list[dict[str, Any]]:
    """The terms of the loss as a model learned."""
    history = _history(one)
    terms = {name for entry in history for name in entry if not name.startswith(("eval_", "train_"))} - {*_NOT_TERMS}
    series = {}
    for name in sorted(terms):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if len(points) > 1:
            steps, values = np.array(points, np.float64).T
            series[name] = steps, values
    if not series:
        return []
    ends = ", ".join(f"{name} from {y[0]:.2f} to {y[-1]:.2f}" for name, (_, y) in series.items())
    picture = Markup(charts.lines(series, "step", "loss term", f"Learning curves of {title}: {ends}"))
    return [{"title": title, "picture": picture}]


def _folder(one: Evaluation) -> Path:
    return Path(one.about.get("source") or "/nowhere")


def _history(one: Evaluation) -> list[dict[str, Any]]:
    """What the trainer logged, of the last checkpoint in the model's folder."""
    states = [*_folder(one).glob("checkpoint-*/trainer_state.json")]
    if not states:
        return []
    last = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    return json.loads(last.read_text(encoding="utf-8"))["log_history"]


def _options(one: Evaluation) -> str:
    """The record of a model's making, as text."""
    for name in ("run.json", "finished.json"):
        if (path := _folder(one) / name).is_file():
            return path.read_text(encoding="utf-8")
    return ""


def _changes(evaluations: Sequence[Evaluation], titles: Mapping[str, str], texts: bool) -> dict[str, Any] | None:
    """The queries that gained and lost most, with the first documents of both rankers."""
    if len(evaluations) < 2:
        return None
    base = next((one for one in evaluations if one.about.get("role") == "bm25"), evaluations[0])
    ours = next(filter(_distilled, evaluations), evaluations[-1])
    values = base.queries.merge(ours.queries, on="query_id")[["query_id", "ndcg@10_x", "ndcg@10_y"]].dropna()
    values = values.assign(change=values["ndcg@10_y"] - values["ndcg@10_x"]).sort_values("change")
    gains = values[values["change"] > 0][::-1].head(_CASES)
    losses = values[values["change"] < 0].head(_CASES)

    def cases(chosen: pd.DataFrame) -> list[dict[str, Any]]:
        return [
            {"before": f"{before:.2f}", "after": f"{after:.2f}", "change": f"{after - before:+.2f}"}
            | {"query": _query(ours, query_id) if texts else query_id}
            | {"tops": [_top(one, query_id, texts) for one in (base, ours)]}
            for query_id, before, after, _ in chosen.itertuples(index=False)
        ]

    return {"base": titles[base.name], "ours": titles[ours.name], "gains": cases(gains), "losses": cases(losses)}


def _query(one: Evaluation, query_id: str) -> str:
    return str(one.rows.loc[one.rows["query_id"] == query_id, "query"].iloc[0])


def _top(one: Evaluation, query_id: str, texts: bool) -> list[dict[str, Any]]:
    """The first documents of a query."""
    rows = one.rows[one.rows["query_id"] == query_id]
    rows = rows.sort_values("score", ascending=False, kind="stable").head(_SHOWN_DOCUMENTS)
    has_texts = texts and "title" in rows.columns
    return [
        {
            "grade": "not judged" if row["label"] == UNJUDGED else f"grade {row['label']}",
            "score": f"{row['score']:.2f}",
        }
        | {"title": (row["title"] if has_texts else "") or row["doc_id"]}
        | {"summary": textwrap.shorten(str(row["summary"]), 180, placeholder=" …") if has_texts else ""}
        for row in rows.to_dict("records")
    ]


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Rankers side by side; the brackets are 95% intervals by query.

    Args:
        results: a mapping for each ranker: name, parameters, ndcg@5, ndcg@10, pnr, pairs_per_s and intervals; None
            where something has no meaning.
    """
    head = f"{'':22}{'parameters':>11}{'NDCG@5':>9}{'NDCG@10':>9}{'':16}{'PNR':>7}{'':15}{'pairs/s':>8}"
    return "\n".join([head, *map(_line, results)])


def _line(row: Mapping[str, Any]) -> str:
    parameters, speed = row["parameters"], row["pairs_per_s"]
    return (
        f"{TITLES[row['name']]:22}"
        + (f"{parameters / 1e6:10.1f}M" if parameters else f"{'-':>11}")
        + f"{row['ndcg@5']:9.3f}{row['ndcg@10']:9.3f}{_interval(row, 'ndcg@10', 3):>16}"
        + (f"{row['pnr']:7.2f}" if row["pnr"] is not None else f"{'inf':>7}")
        + f"{_interval(row, 'pnr', 2):>15}"
        + (f"{speed:8,.0f}" if speed else f"{'-':>8}")
    )


def _interval(row: Mapping[str, Any], measure: str, digits: int) -> str:
    return "[" + ", ".join("inf" if end is None else f"{end:.{digits}f}" for end in row["intervals"][measure]) + "]"


def results_picture(evaluations: Sequence[Evaluation]) -> str:
    """NDCG@10 of rankers with its 95% interval, beside their speed, as an SVG that suits light and dark pages."""
    speeds = [one.about.get("pairs_per_s") for one in evaluations]
    notes = [f"{speed:,.0f} pairs/s" if speed else "" for speed in speeds]
    bars = [_bar(one, TITLES[one.name], "ndcg@10", note) for one, note in zip(evaluations, notes, strict=True)]
    return charts.standalone(charts.intervals(bars, "NDCG@10"))


def search_examples(
    queries: Sequence[str], corpus: pd.DataFrame, ranker: Ranker, depth: int = 20, top: int = 3
) -> list[str]:
    """The first documents of typed queries, by BM25 and by a ranker that sorts BM25's first ones anew.

    Args:
        queries: as somebody would type them.
        corpus: columns doc_id, title, summary.
        ranker: sorts the candidates.
        depth: how many candidates BM25 finds.
        top: documents to show for each.

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


def duration(seconds: float) -> str:
    """Format a duration: 42 s, 17 min, 3 h 05 min, 4 d 02 h."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if hours < 24:
        return f"{int(hours)} h {int(minutes % 60):02d} min"
    return f"{int(hours // 24)} d {int(hours % 24):02d} h"
