"""What a run has to show: as plain text, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from hf_disranker.data import mine_candidates, pair_texts
from hf_disranker.ranker import Ranker

TITLES = {
    "bm25": "BM25",
    "label_student": "BERT, labels alone",
    "click_student": "BERT, clicks, labels",
    "teacher_no_cpt": "LLM teacher, no CPT",
    "teacher": "LLM teacher",
    "student": "BERT, distilled",
}


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


_PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
<style>
  text {{ font: 14px system-ui, sans-serif; fill: #1f2328; }}
  .quiet {{ fill: #59636e; font-size: 12px; }} .number {{ text-anchor: end; }} .axis {{ text-anchor: middle; }}
  .grid {{ stroke: #d1d9e0; }} .dot {{ fill: #59636e; }} .interval {{ stroke: #59636e; stroke-width: 2; }}
  .ours .dot {{ fill: #0969da; }} .ours .interval {{ stroke: #0969da; }} .ours text {{ font-weight: 600; }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #f0f6fc; }} .quiet {{ fill: #9198a1; }} .grid {{ stroke: #3d444d; }}
    .dot {{ fill: #9198a1; }} .interval {{ stroke: #9198a1; }}
    .ours .dot {{ fill: #4493f8; }} .ours .interval {{ stroke: #4493f8; }}
  }}
</style>
{body}
</svg>
"""
_PLOT_LEFT, _PLOT_RIGHT, _ROW_HEIGHT, _HEAD = 180, 520, 34, 44


def results_picture(results: Sequence[Mapping[str, Any]]) -> str:
    """NDCG@10 of rankers with its 95% interval, beside their speed, as an SVG that suits light and dark pages.

    Args:
        results: as for `results_table`.
    """
    ends = [end for row in results for end in row["intervals"]["ndcg@10"]]
    low, high = np.floor(min(ends) * 10) / 10, np.ceil(max(ends) * 10) / 10
    bottom = _HEAD + _ROW_HEIGHT * len(results)

    def place(value: float) -> float:
        return round(_PLOT_LEFT + (_PLOT_RIGHT - _PLOT_LEFT) * (value - low) / (high - low), 1)

    lines = [
        f'<text x="{_PLOT_LEFT}" y="18" class="quiet">NDCG@10, 95% interval by query</text>',
        '<text x="590" y="18" class="quiet number">NDCG@10</text>',
        '<text x="680" y="18" class="quiet number">pairs/s</text>',
    ]
    for tick in np.arange(low, high + 0.01, 0.1):
        x = place(tick)
        lines.append(f'<line x1="{x}" x2="{x}" y1="{_HEAD - 14}" y2="{bottom - 10}" class="grid"/>')
        lines.append(f'<text x="{x}" y="{bottom + 6}" class="quiet axis">{tick:.1f}</text>')
    for number, row in enumerate(results):
        y, value = _HEAD + _ROW_HEIGHT * number, row["ndcg@10"]
        start, end = map(place, row["intervals"]["ndcg@10"])
        speed = f"{row['pairs_per_s']:,.0f}" if row["pairs_per_s"] else "–"
        lines.append(
            f'<g class="{"ours" if row["name"] == "student" else "other"}">'
            f'<text x="0" y="{y + 5}">{escape(TITLES[row["name"]])}</text>'
            f'<line x1="{start}" x2="{end}" y1="{y}" y2="{y}" class="interval"/>'
            f'<circle cx="{place(value)}" cy="{y}" r="5" class="dot"/>'
            f'<text x="590" y="{y + 5}" class="number">{value:.3f}</text>'
            f'<text x="680" y="{y + 5}" class="number">{speed}</text></g>'
        )
    label = "; ".join(f"{TITLES[row['name']]}: NDCG@10 {row['ndcg@10']:.3f}" for row in results)
    return _PICTURE.format(width=690, height=bottom + 16, label=escape(label), body="\n".join(lines))


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
