"""What is known of a scoring run without reading its scores: what the shards' footers say, and what the log says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SHOWN_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
# Between two shards of a run that goes on there passes less than this many times a shard's own time.
_PAUSE = 10


@dataclass
class Summary:
    """How many scores a shard holds and how they lie; summaries of several shards add.

    Args:
        scored: pairs with a score.
        mean, std: of the scores, as float64; 0 where there are none.
        quantiles: 101 numbers, from the smallest score to the largest; over several shards they are
            interpolated, to a few hundredths of the standard deviation where shards differ much.
        quarantined: pairs without a score, by reason.
        reused: how many of the scores were taken from another store.
    """

    scored: int = 0
    mean: float = 0.0
    std: float = 0.0
    quantiles: list[float] = field(default_factory=list)
    quarantined: dict[str, int] = field(default_factory=dict)
    reused: int = 0

    @classmethod
    def of(cls, scores: np.ndarray, quarantined: dict[str, int], reused: int) -> Summary:
        """The summary of one shard; scores of shape (pairs,)."""
        if not len(scores):
            return cls(quarantined=quarantined)
        values = scores.astype(np.float64)
        quantiles = np.percentile(values, range(101)).tolist()
        return cls(len(values), float(values.mean()), float(values.std()), quantiles, quarantined, reused)

    @classmethod
    def add(cls, parts: Sequence[Summary]) -> Summary:
        """The summary of all shards together."""
        counts = np.array([part.scored for part in parts])
        quarantined = sum((Counter(part.quarantined) for part in parts), Counter())
        total = cls(quarantined=dict(quarantined), reused=sum(part.reused for part in parts))
        if not counts.sum():
            return total
        total.scored = int(counts.sum())
        means = np.array([part.mean for part in parts])
        total.mean = float(np.average(means, weights=counts))
        squares = np.array([part.std for part in parts]) ** 2 + (means - total.mean) ** 2
        total.std = float(np.sqrt(np.average(squares, weights=counts)))
        values = np.concatenate([part.quantiles for part in parts if part.scored])
        # Each number stands for the hundredth around it, the first and the last for half of one.
        weights = np.outer(counts[counts > 0], [0.5, *[1.0] * 99, 0.5]).ravel()
        order = np.argsort(values)
        places = np.cumsum(weights[order]) - weights[order] / 2
        total.quantiles = np.interp(np.linspace(0, weights.sum(), 101), places, values[order]).tolist()
        return total

    def to_json(self) -> str:
        """For a footer."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Summary:
        """Of a footer."""
        return cls(**json.loads(text))


@dataclass
class Rate:
    """How fast a run has lately gone, all its workers together; per second of the clock."""

    pairs: float
    tokens: float
    last: dict[str, Any]


def rate(records: Sequence[dict[str, Any]]) -> Rate | None:
    """The rate that the records of the latest shards tell; None where there are none.

    Args:
        records: each with shard, started and ended (seconds since 1970), pairs, tokens and worker.
    """
    if not records:
        return None
    last = max(records, key=lambda record: record["ended"])
    usual = float(np.median([record["ended"] - record["started"] for record in records]))
    records = [record for record in records if last["ended"] - record["ended"] <= _PAUSE * usual]
    seconds = max(1e-3, last["ended"] - min(record["started"] for record in records))
    pairs, tokens = (sum(record[key] for record in records) / seconds for key in ("pairs", "tokens"))
    return Rate(pairs, tokens, last)


@dataclass
class Status:
    """How far a run is; as text, what an operator wants to know."""

    path: str
    manifest: dict[str, Any]
    missing: int
    summary: Summary
    rate: Rate | None
    failures: dict[int, str]

    def __str__(self) -> str:
        pairs = self.manifest["pairs"]
        scored, quarantined = self.summary.scored, self.summary.quarantined
        lines = [f"{self.path}: {pairs - self.missing:,} of {pairs:,} pairs, {1 - self.missing / pairs:.1%}"]
        lines.append(f"teacher    {self.manifest['teacher']}, {self.manifest.get('engine', 'engine not known')}")
        if self.rate:
            left = f"{duration(self.missing / self.rate.pairs)} to go" if self.missing else "finished"
            lines.append(f"rate       {rates(self.rate.pairs, self.rate.tokens)}, {left}")
            lines.append(f"last       shard {self.rate.last['shard']} by worker {self.rate.last['worker']}")
        if scored:
            lines.append(f"scores     {scored:,}, mean {self.summary.mean:.3f}, std {self.summary.std:.3f}")
            shown = (f"{at}% {self.summary.quantiles[at]:.3f}" for at in SHOWN_QUANTILES)
            lines.append(f"quantiles  {', '.join(shown)}")
        if self.summary.reused:
            lines.append(f"reused     {self.summary.reused:,}")
        lines += [f"quarantine {count:,}: {reason}" for reason, count in sorted(quarantined.items())]
        lines += [f"failed     shard {shard}: {error}" for shard, error in sorted(self.failures.items())]
        return "\n".join(lines)


def moved(new: Summary, old: Summary) -> str:
    """How the quantiles of the scores differ between two runs, as a table."""
    rows = [f"{'quantile':>8} {'there':>10} {'here':>10} {'moved':>10}"]
    for at in SHOWN_QUANTILES:
        there, here = old.quantiles[at], new.quantiles[at]
        rows.append(f"{at:>7}% {there:>10.3f} {here:>10.3f} {here - there:>+10.3f}")
    return "\n".join(rows)


def rates(pairs: float, tokens: float) -> str:
    """Pairs and tokens per second for people."""
    return f"{pairs:,.{0 if pairs >= 10 else 1}f} pairs/s, {tokens:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """A time for people: 42 s, 17 min, 3 h 05 min, 4 d 02 h."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if hours < 24:
        return f"{int(hours)} h {int(minutes % 60):02d} min"
    return f"{int(hours // 24)} d {int(hours % 24):02d} h"
