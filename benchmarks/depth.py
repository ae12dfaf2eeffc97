"""Draws how good and how fast students of 1, 2, 3 and 6 layers are, from what benchmarks/quality.py left behind.

python benchmarks/depth.py --results runs/quality --picture docs/images/depth.svg
"""

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from hf_disranker.evaluation.significance import bootstrap
from hf_disranker.recipes.report import charts

# Cells of configs/quality.yaml, from the fastest on.
CELLS = {"1 layer": "1 layer", "mix 5:1": "2 layers", "3 layers": "3 layers", "6 layers": "6 layers"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 320, 44, 16, 30, 44


class Point(NamedTuple):
    """A ranker: mean NDCG@10 with its 95% interval by query, and pairs by CPU second."""

    title: str
    speed: float
    value: float
    low: float
    high: float


def point(title: str, files: list[Path]) -> Point:
    """Mean over the seeds of one ranker."""
    measures = [json.loads(file.read_text()) for file in files]
    by_query = np.mean([pd.read_parquet(f"{file}.parquet")["ndcg@10"] for file in files], axis=0)
    speed = float(np.mean([one["about"].get("pairs_per_cpu_s", math.nan) for one in measures]))
    return Point(title, speed, float(np.nanmean(by_query)), *bootstrap(by_query))


def picture(students: list[Point], teacher: Point, bm25: Point) -> str:
    """An SVG of its own: the students joined by a line, the teacher apart, BM25 as a level."""
    shown = [*students, teacher]
    low, high = min([bm25.value, *(one.low for one in shown)]), max(one.high for one in shown)
    low, high = low - 0.1 * (high - low), high + 0.05 * (high - low)
    slow, fast = math.log(min(one.speed for one in shown) / 1.4), math.log(max(one.speed for one in shown) * 1.4)

    def x(speed: float) -> float:
        return round(LEFT + (math.log(speed) - slow) / (fast - slow) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    across = f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
    parts = ['<text class="quiet" x="2" y="12">NDCG@10, 95% interval by query</text>']
    for tick in charts.ticks(low, high):
        parts.append(f'<line class="grid" {across} y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="quiet end" x="{LEFT - 6}" y="{y(tick) + 4}">{tick:g}</text>')
    for tick in (step * 10**power for power in range(1, 6) for step in (1, 2, 5)):
        if slow <= math.log(tick) <= fast:
            parts.append(f'<text class="quiet middle" x="{x(tick)}" y="{HEIGHT - BOTTOM + 16}">{tick:,}</text>')
    parts.append(f'<line class="base" {across} y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="quiet end" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}">pairs by CPU second</text>')
    parts.append(f'<line class="line s5" stroke-dasharray="6 4" {across} y1="{y(bm25.value)}" y2="{y(bm25.value)}"/>')
    parts.append(f'<text class="quiet end" x="{WIDTH - RIGHT}" y="{y(bm25.value) - 6}">BM25</text>')
    joined = " ".join(f"{x(one.speed)},{y(one.value)}" for one in students)
    parts.append(f'<polyline class="line s0" points="{joined}"/>')
    for one in shown:
        kind, at = "5" if one is teacher else "0", x(one.speed)
        parts.append(f'<line class="line s{kind}" x1="{at}" x2="{at}" y1="{y(one.low)}" y2="{y(one.high)}"/>')
        parts.append(f'<circle class="f{kind}" cx="{at}" cy="{y(one.value)}" r="5"/>')
        place = y(one.low) + 18 if one is teacher else y(one.high) - 8  # beside a student of its speed
        parts.append(f'<text class="middle strong" x="{at}" y="{place}">{escape(one.title)}</text>')
    spoken = "; ".join(f"{one.title}: NDCG@10 {one.value:.3f}, {one.speed:,.0f} pairs by CPU second" for one in shown)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}; BM25 {bm25.value:.3f}">'
    return charts.standalone("\n".join([head, *parts, "</svg>"]))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/quality"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/depth.svg"))
    args = parser.parse_args()
    found = {title: sorted((args.results / "cells" / cell).glob("*/eval.json")) for cell, title in CELLS.items()}
    students = [point(title, files) for title, files in found.items() if files]
    others = [point(title, [args.results / f"{title.lower()}.json"]) for title in ("teacher", "BM25")]
    args.picture.write_text(picture(students, *others), encoding="utf-8")


if __name__ == "__main__":
    main()
