"""HTML report of one or more evaluations: a single self-contained file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy.stats import gaussian_kde

from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.evaluate import UNJUDGED, interval_text, value_text
from hf_disranker.evaluation.significance import Comparison, marks, refusal
from hf_disranker.recipes.rankings import Evaluation, compare_evaluations
from hf_disranker.recipes.report import charts
from hf_disranker.recipes.report.verdict import base_and_ours, is_distilled, teacher_of, tested, verdict

_POINTS = 2000
_CASES = 10
_SHOWN_DOCUMENTS = 3
# Entries of a trainer's log that are not loss terms.
_NOT_TERMS = ("epoch", "step", "grad_norm", "learning_rate", "loss", "score_spread", "total_flos")


def write_report(
    evaluations: Sequence[Evaluation],
    path: Path,
    texts: bool = True,
    pairs: Iterable[tuple[str, str]] | None = None,
    titles: Mapping[str, str] | None = None,
    abtest: Mapping[str, Any] | None = None,
) -> None:
    """Write a report as a single HTML file without scripts or external resources.

    Args:
        evaluations: Rankings of the same judgments. Students are plotted against the evaluation with the role teacher;
            gains and losses are relative to the one with the role bm25, or else the first. Learning curves and
            options are read from the folder of each model, if it exists.
        path: Path of the HTML file.
        texts: If False, omit queries, titles and summaries and show ids only.
        pairs: Names of the rankers to compare, as (first, second); None compares all pairs. The best distilled student
            and rankers that no pair names are compared with the baseline too, so that everything shown is tested.
        titles: Display names of the rankers.
        abtest: Output of `disranker abtest --out`.
    """
    titles = titles or {}
    evaluations = [replace(one, name=titles.get(one.name, one.name)) for one in evaluations]
    pairs = pairs and [(titles.get(first, first), titles.get(second, second)) for first, second in pairs]
    compared = compare_evaluations(evaluations, pairs=tested(evaluations, pairs)) if len(evaluations) > 1 else []
    bm25 = next((one.measures["ndcg@10"] for one in evaluations if one.about.get("role") == "bm25"), None)
    first = evaluations[0]
    why_not = refusal(first.measures["queries"], bm25)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(
        style=Markup(charts.STYLE),
        about=first.about,
        verdict=verdict(evaluations, compared, why_not),
        rankers=_rankers(evaluations, compared, why_not),
        pictures=[
            Markup(charts.intervals([interval_bar(one, one.name, measure) for one in evaluations], name))
            for measure, name in (("ndcg@10", "NDCG@10"), ("pair_accuracy", "Pair accuracy"))
        ],
        comparisons=[_comparison(one) for one in compared],
        refusal=why_not if compared else None,
        slices=_slices(evaluations),
        scatters=_scatters(evaluations),
        distributions=[plot for one in evaluations for plot in _distribution(one)],
        curves=[plot for one in evaluations for plot in _curves(one)],
        changes=_changes(evaluations, texts),
        measures=first.measures,
        abtest=abtest,
        cuts=[(one.name, one.about) for one in evaluations if "documents_cut" in one.about],
        configs=[(one.name, options) for one in evaluations if (options := _options(one))],
        packages=first.about.get("packages", {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def is_report(path: Path) -> bool:
    """Return True if `write_report` wrote the file."""
    return b'<meta name="generator" content="hf-disranker">' in path.read_bytes()[:1000]


def _rankers(
    evaluations: Sequence[Evaluation], compared: Sequence[Comparison], why_not: str | None
) -> list[dict[str, Any]]:
    """Build the rows of the main table."""
    letters = {one.name: chr(ord("a") + place) for place, one in enumerate(evaluations)}
    beaten = marks(compared, letters) if not why_not else dict.fromkeys(letters, "")
    rows = []
    for one in evaluations:
        speed, parameters = one.about.get("pairs_per_s"), one.about.get("parameters")
        cells = {name: _with_interval(one.measures, name) for name in ("ndcg@10", "pnr", "pair_accuracy", "mrr")}
        rows.append(
            {"letter": letters[one.name], "title": one.name, "marks": beaten[one.name], **cells}
            | {"parameters": f"{parameters / 1e6:,.1f}M" if parameters else "–"}
            | {"speed": f"{speed:,.0f}" if speed else "–", "million": duration(1e6 / speed) if speed else "–"}
        )
    return rows


def _with_interval(measures: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Format a measure and its 95% interval."""
    digits = 2 if name == "pnr" else 3
    return value_text(measures, name, digits), interval_text(measures, name, digits, "–")


def interval_bar(one: Evaluation, title: str, measure: str, note: str = "") -> charts.Bar:
    """Build a bar with the value and 95% interval of a measure; NaN where they are undefined."""
    value, low, high = (
        np.nan if end is None else end for end in (one.measures[measure], *one.measures["intervals"][measure])
    )
    return charts.Bar(title, value, low, high, note, is_distilled(one))


def _comparison(one: Comparison) -> dict[str, Any]:
    low, high = one.interval
    return {
        "first": one.first,
        "second": one.second,
        "difference": f"{one.difference:+.3f}",
        "interval": f"{low:+.3f} to {high:+.3f}",
        "p": f"{one.p:.4f}",
        "p_holm": f"{one.p_holm:.4f}",
        "effect": f"{one.effect:+.2f}",
        "queries": f"{one.queries:,}",
        "needed": f"{one.queries_needed:,}" if one.queries_needed else "–",
        "changed": {k: f"{share:.0%}" for k, share in one.changed.items()},
    }


def _slices(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Return NDCG@10 by slice of the rankers that were evaluated by slices."""
    return [
        {"title": one.name, "value": value, "queries": found["queries"], "few": found["few"]}
        | {"ndcg": _with_interval(found, "ndcg@10")}
        for one in evaluations
        for value, found in one.measures.get("slices", {}).items()
    ]


def _scatters(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Plot the scores of each distilled student against its teacher's scores on the pairs that both ranked.

    Teacher scores are first mapped to the scale the student was trained on.
    """
    found = []
    for one in filter(is_distilled, evaluations):
        teacher = teacher_of(one, evaluations)
        if teacher is None:
            continue
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
        axes = teacher.name + (", rescaled" if one.about.get("score_transform") else ""), one.name
        spoken = f"Scores of {axes[1]} against {axes[0]}: scale {scale:.2f}, offset {offset:+.2f}"
        picture = Markup(charts.scatter(x[drawn], y[drawn], (offset, scale), axes, spoken))
        found.append({"title": one.name, "picture": picture, "facts": facts, "pairs": len(x)})
    return found


def _ranked(one: Evaluation) -> pd.DataFrame:
    """Return the rows with a score, without judged documents that are missing from a run."""
    return one.rows[~one.rows["missing"].astype(bool)] if "missing" in one.rows.columns else one.rows


def _distribution(one: Evaluation) -> list[dict[str, Any]]:
    """Plot the density of a ranker's scores for each grade."""
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
    spoken = f"Scores of {one.name} by grade; means: {', '.join(means)}"
    return [{"title": one.name, "picture": Markup(charts.lines(series, "score", "density", spoken))}]


def _curves(one: Evaluation) -> list[dict[str, Any]]:
    """Plot the loss terms logged during training."""
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
    picture = Markup(charts.lines(series, "step", "loss term", f"Learning curves of {one.name}: {ends}"))
    return [{"title": one.name, "picture": picture}]


def _folder(one: Evaluation) -> Path:
    return Path(one.about.get("source") or "/nowhere")


def _history(one: Evaluation) -> list[dict[str, Any]]:
    """Return the log history of the last checkpoint in the model's folder."""
    states = [*_folder(one).glob("checkpoint-*/trainer_state.json")]
    if not states:
        return []
    last = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    return json.loads(last.read_text(encoding="utf-8"))["log_history"]


def _options(one: Evaluation) -> str:
    """Return the training record of a model, as text; empty if there is none."""
    for name in ("run.json", "finished.json"):
        if (path := _folder(one) / name).is_file():
            return path.read_text(encoding="utf-8")
    return ""


def _changes(evaluations: Sequence[Evaluation], texts: bool) -> dict[str, Any] | None:
    """Return the queries with the largest gains and losses, with the top documents of both rankers."""
    if len(evaluations) < 2:
        return None
    base, ours = base_and_ours(evaluations)
    values = base.queries.merge(ours.queries, on="query_id")[["query_id", "ndcg@10_x", "ndcg@10_y"]].dropna()
    values = values.assign(change=values["ndcg@10_y"] - values["ndcg@10_x"]).sort_values("change")
    gains = values[values["change"] > 0][::-1].head(_CASES)
    losses = values[values["change"] < 0].head(_CASES)

    def cases(chosen: pd.DataFrame) -> list[dict[str, Any]]:
        return [
            {"before": f"{before:.2f}", "after": f"{after:.2f}", "change": f"{after - before:+.2f}"}
            | {"query": ours.rows.loc[ours.rows["query_id"] == query_id, "query"].iloc[0] if texts else query_id}
            | {"tops": [_top(one, query_id, texts) for one in (base, ours)]}
            for query_id, before, after, _ in chosen.itertuples(index=False)
        ]

    return {"base": base.name, "ours": ours.name, "gains": cases(gains), "losses": cases(losses)}


def _top(one: Evaluation, query_id: str, texts: bool) -> list[dict[str, Any]]:
    """Return the top documents of a query."""
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
