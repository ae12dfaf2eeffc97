"""What footers and logs tell without the scores."""

import numpy as np
import pytest

from hf_disranker.scoring.summary import Summary, duration, moved, rate, rates


def test_a_summary_matches_hand_example():
    summary = Summary.of(np.array([1.0, 3.0], np.float32), {"empty document": 1}, 1)
    assert (summary.scored, summary.mean, summary.std, summary.reused) == (2, 2.0, 1.0, 1)
    assert summary.quantiles[0] == 1.0 and summary.quantiles[25] == 1.5 and summary.quantiles[100] == 3.0
    assert Summary.from_json(summary.to_json()) == summary


def test_summaries_of_parts_are_the_summary_of_the_whole():
    draw = np.random.default_rng(0)
    parts = [draw.normal(at, 1 + at, size).astype(np.float32) for at, size in enumerate((500, 2000, 0, 3000))]
    whole = np.concatenate(parts)
    summary = Summary.add([Summary.of(part, {"a": 1} if at else {}, at) for at, part in enumerate(parts)])
    assert (summary.scored, summary.quarantined, summary.reused) == (5500, {"a": 3}, 1 + 3)
    assert summary.mean == pytest.approx(whole.mean(dtype=np.float64), abs=1e-9)
    assert summary.std == pytest.approx(whole.std(dtype=np.float64), abs=1e-9)
    error = np.abs(np.array(summary.quantiles) - np.percentile(whole, range(101)))
    assert error[5:96].max() < 0.03 * whole.std() and error[1:100].max() < 0.07 * whole.std()
    alike = Summary.add([Summary.of(whole[at::4], {}, 0) for at in range(4)])
    assert np.abs(np.array(alike.quantiles) - np.percentile(whole, range(101)))[1:100].max() < 0.04 * whole.std()


def test_nothing_has_an_empty_summary():
    assert Summary.add([]) == Summary.add([Summary.of(np.array([]), {}, 0)]) == Summary()


def record(started, ended, worker="0 of 1", pairs=100):
    times = {"started": started, "ended": ended}
    return {"shard": 0, "pairs": pairs, "tokens": 10 * pairs, "worker": worker, **times}


def test_workers_side_by_side_add_up():
    both = [record(at, at + 10, worker) for at in (0, 10, 20) for worker in ("0 of 2", "1 of 2")]
    assert rate(both).pairs == pytest.approx(600 / 30) and rate(both).tokens == pytest.approx(200)


def test_a_pause_does_not_count():
    records = [record(0, 10), record(10, 20), record(100_000, 100_010)]
    assert rate(records).pairs == pytest.approx(10)
    assert rate([]) is None


def test_moved_shows_each_quantile():
    old, new = (Summary.of(np.linspace(0, high, 101), {}, 0) for high in (100, 110))
    lines = moved(new, old).splitlines()
    assert lines[0].split() == ["quantile", "there", "here", "moved"]
    assert lines[4].split() == ["50%", "50.000", "55.000", "+5.000"] and len(lines) == 8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (1000, "17 min"), (3 * 3600 + 300, "3 h 05 min"), (100 * 3600, "4 d 04 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_rates_are_for_people():
    assert rates(0.25, 3) == "0.2 pairs/s, 3 tokens/s"
    assert rates(12345.6, 1e6) == "12,346 pairs/s, 1,000,000 tokens/s"
