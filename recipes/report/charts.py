"""Charts as inline SVG: intervals, lines, scatter plots. Colours are defined in the style sheet `STYLE`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np

# Narrow, so that text keeps its size on a phone.
WIDTH, HEIGHT = 360, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 18, 58
_ROW = 40
STYLE = """\
:root { --ink: #1f2328; --quiet: #59636e; --rule: #d1d9e0; --paper: #ffffff; --c0: #0969da; --c1: #bc4c00;
  --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #59636e; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --quiet: #a2abb5; --rule: #3d444d; --paper: #0d1117;
  --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #f778ba; --c5: #a2abb5; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink);
  paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .quiet { fill: var(--quiet); font-size: 11px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; } svg .strong { font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .base { stroke: var(--quiet); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; }
svg .dots { fill: none; stroke-width: 3; stroke-linecap: round; opacity: .35; }
svg .s0 { stroke: var(--c0); } svg .s1 { stroke: var(--c1); stroke-dasharray: 6 2; }
svg .s2 { stroke: var(--c2); stroke-dasharray: 2 2; } svg .s3 { stroke: var(--c3); stroke-dasharray: 8 2 2 2; }
svg .s4 { stroke: var(--c4); stroke-dasharray: 1 3; } svg .s5 { stroke: var(--c5); }
svg .f0 { fill: var(--c0); } svg .f5 { fill: var(--c5); }
"""


class Bar(NamedTuple):
    """Value with an interval; `ours` selects the first colour, `note` is printed at the right edge."""

    title: str
    value: float
    low: float
    high: float
    note: str = ""
    ours: bool = False


@dataclass(frozen=True)
class _Axes:
    """Map from values to pixel coordinates."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, values: np.ndarray | float) -> np.ndarray:
        low, high = self.x_range
        return np.round(_LEFT + (np.asarray(values) - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, values: np.ndarray | float) -> np.ndarray:
        low, high = self.y_range
        return np.round(HEIGHT - _BOTTOM - (np.asarray(values) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)

    def drawn(self, x_title: str, y_title: str) -> list[str]:
        """Return the grid, tick labels and axis titles."""
        parts = []
        for tick in ticks(*self.y_range):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="quiet end" x="{_LEFT - 6}" y="{y + 4}">{tick:g}</text>')
        base = HEIGHT - _BOTTOM
        parts.append(f'<line class="base" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        for tick in ticks(*self.x_range):
            parts.append(f'<text class="quiet middle" x="{self.x(tick)}" y="{base + 15}">{tick:g}</text>')
        parts.append(f'<text class="quiet end" x="{WIDTH - _RIGHT}" y="{base + 32}">{escape(x_title)}</text>')
        parts.append(f'<text class="quiet" x="2" y="10">{escape(y_title)}</text>')
        return parts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` + 1 round tick values between two numbers, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def intervals(bars: Sequence[Bar], title: str) -> str:
    """Draw each value as a dot with its interval as a line; return an empty string if no value is finite."""
    bars = [bar for bar in bars if math.isfinite(bar.value + bar.low + bar.high)]
    ends = [end for bar in bars for end in (bar.low, bar.high)]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    bottom = 30 + _ROW * len(bars)
    noted = 84 if any(bar.note for bar in bars) else 0

    def place(value: float) -> float:
        return round(4 + (WIDTH - 8) * (min(max(value, low), high) - low) / (high - low), 1)

    parts = [f'<text class="quiet" x="0" y="12">{escape(title)}, 95% interval by query</text>']
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{place(tick)}" x2="{place(tick)}" y1="22" y2="{bottom - 4}"/>')
        parts.append(f'<text class="quiet middle" x="{place(tick)}" y="{bottom + 8}">{tick:g}</text>')
    for number, bar in enumerate(bars):
        y, kind = 38 + _ROW * number, "0" if bar.ours else "5"
        strong = " strong" if bar.ours else ""
        parts.append(f'<text class="{strong.strip()}" x="0" y="{y}">{escape(bar.title)}</text>')
        parts.append(f'<text class="end{strong}" x="{WIDTH - noted}" y="{y}">{bar.value:.3f}</text>')
        parts.append(f'<text class="end quiet" x="{WIDTH}" y="{y}">{escape(bar.note)}</text>')
        line = f'x1="{place(bar.low)}" x2="{place(bar.high)}" y1="{y + 12}" y2="{y + 12}"'
        parts.append(f'<line class="line s{kind}" {line}/>')
        parts.append(f'<circle class="f{kind}" cx="{place(bar.value)}" cy="{y + 12}" r="5"/>')
    spoken = "; ".join(f"{bar.title} {bar.value:.3f}, from {bar.low:.3f} to {bar.high:.3f}" for bar in bars)
    return _svg(parts, f"{title} with intervals. {spoken}", bottom + 14)


def lines(series: Mapping[str, tuple[np.ndarray, np.ndarray]], x_title: str, y_title: str, spoken: str) -> str:
    """Draw a line for each series of (x, y), at most six, with a legend."""
    shown = dict(list(series.items())[:6])
    xs, ys = (np.concatenate([pair[axis] for pair in shown.values()]) for axis in (0, 1))
    axes = _Axes((xs.min(), max(xs.max(), xs.min() + 1e-9)), (min(0.0, ys.min()), ys.max() * 1.05 or 1.0))
    parts = axes.drawn(x_title, y_title)
    for number, (x, y) in enumerate(shown.values()):
        points = " ".join(f"{a:g},{b:g}" for a, b in zip(axes.x(x), axes.y(y), strict=True))
        parts.append(f'<polyline class="line s{number}" points="{points}"/>')
    return _svg(parts + _legend(list(shown)), spoken)


def scatter(x: np.ndarray, y: np.ndarray, fit: tuple[float, float], titles: tuple[str, str], spoken: str) -> str:
    """Draw points, the diagonal, and the line y = offset + scale * x for `fit` = (offset, scale)."""
    low, high = (float(end) for end in (min(x.min(), y.min()), max(x.max(), y.max())))
    high = max(high, low + 1e-9)
    axes = _Axes((low, high), (low, high))
    parts = axes.drawn(*titles)
    dots = "".join(f"M{a:g} {b:g}h0" for a, b in zip(axes.x(x), axes.y(y), strict=True))
    parts.append(f'<path class="dots s0" d="{dots}"/>')
    diagonal, ends = np.array([low, high]), np.array([x.min(), x.max()])
    for kind, xs, ys in (("s5", diagonal, diagonal), ("s1", ends, fit[0] + fit[1] * ends)):
        (x1, x2), (y1, y2) = axes.x(xs), axes.y(ys)
        parts.append(f'<line class="line {kind}" x1="{x1:g}" x2="{x2:g}" y1="{y1:g}" y2="{y2:g}"/>')
    return _svg(parts + _legend(["pairs", "fitted line", "equal scores"], (0, 1, 5)), spoken)


def standalone(svg: str) -> str:
    """Turn an inline SVG into a standalone SVG file."""
    return svg.replace(">", f' xmlns="http://www.w3.org/2000/svg" width="560">\n<style>{STYLE}</style>', 1) + "\n"


def _legend(names: Sequence[str], kinds: Sequence[int] = range(6)) -> list[str]:
    """Return the legend, drawn in the bottom line from the left."""
    parts, x = [], 0.0
    for name, kind in zip(names, kinds, strict=False):
        parts.append(f'<line class="line s{kind}" x1="{x}" x2="{x + 16}" y1="{HEIGHT - 12}" y2="{HEIGHT - 12}"/>')
        parts.append(f'<text class="quiet" x="{x + 20}" y="{HEIGHT - 8}">{escape(name)}</text>')
        x += 36 + 6.2 * len(name)
    return parts


def _svg(parts: Sequence[str], spoken: str, height: int = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(spoken)}">'
    return "\n".join([head, *parts, "</svg>"])
