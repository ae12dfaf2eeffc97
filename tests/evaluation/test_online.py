"""A/B tests and interleaving: against hand examples, scipy, statsmodels, the bootstrap, and simulated truth."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy.stats import binom, binomtest, chisquare, norm, ttest_1samp
from scipy.stats.contingency import relative_risk

from hf_disranker.data.schema import TableError
from hf_disranker.evaluation.online import (
    MEASURES,
    PAPER,
    by_user,
    draft_lists,
    effects,
    log_ratios,
    novelty,
    power,
    preference,
    refusal,
    sample_ratio,
    team_draft,
)
from hf_disranker.evaluation.significance import bootstrap, holm
from hf_disranker.recipes.impressions import read_credit

simulator = importlib.import_module("hf_disranker.recipes.simulator")
BUCKETS = ["old", "new"]


def grades(share, queries=30, seed=0):
    """Rankings of ten documents with these shares of the grades 0, 1, 2."""
    values = np.random.default_rng(seed).choice(3, size=(queries, 10), p=share)
    return pd.DataFrame(values, index=[f"q{number}" for number in range(queries)])


OLD, NEW = grades([0.65, 0.22, 0.13], seed=1), grades([0.7, 0.2, 0.1])
TRUE = [simulator.true_measures(one) for one in (OLD, NEW)]
PAPERS_SHARE = PAPER["page_ctr"] / (TRUE[1]["page_ctr"] / TRUE[0]["page_ctr"] - 1)  # of pages, for +0.47% PageCTR


def pages_of(users, seed, new=NEW, **options):
    """A simulated log as `read_log` gives it, but with a row for each page."""
    log = simulator.ab_log({"old": OLD, "new": new}, users, seed=seed, **options)
    counts = {
        "pages": 1,
        "clicked_pages": log["clicked"] > 0,
        "clicks": log["clicked"],
        "timed_clicks": log["clicked"],
    }
    return log.assign(user=pd.factorize(log["user_id"])[0], seconds=log["dwell_seconds"], users=1, **counts)


@pytest.fixture(scope="module")
def pages():
    return pages_of(4000, seed=5)


@pytest.fixture(scope="module")
def users(pages):
    return by_user(pages, ["clicks_before"])


# Hand examples


def small(**columns):
    rows = {"bucket": ["old", "old", "new", "new"], "pages": [1, 3, 2, 2], "clicked_pages": [1, 1, 2, 1]}
    rows |= {"clicks": [2, 1, 3, 1], "timed_clicks": [2, 0, 3, 1], "seconds": [40.0, 0.0, 30.0, 50.0]}
    return pd.DataFrame(rows | columns).assign(users=1, clicked=lambda rows: rows["clicked_pages"] > 0)


def test_the_measures_match_hand_example():
    found = {one.name: (one.control, one.treatment, one.relative_difference) for one in effects(small(), BUCKETS)}
    assert_allclose(found["page_ctr"], [2 / 4, 3 / 4, 0.5])
    assert_allclose(found["user_ctr"], [1, 1, 0])
    assert_allclose(found["clicks_per_page"], [3 / 4, 4 / 4, 1 / 3])
    assert_allclose(found["dwell"], [40 / 2, 80 / 4, 0], atol=1e-12)


def test_the_influence_of_a_user_matches_hand_example():
    # 2 clicked pages of 4: users with 1 of 1 and 1 of 3 add 1/2 - 1/4 and 1/2 - 3/4.
    (value, influence), _ = log_ratios(small(), BUCKETS, "page_ctr")
    assert value == pytest.approx(math.log(1 / 2))
    assert_allclose(influence, [0.25, -0.25])


def test_undefined_measures_are_nan_and_not_tested():
    silent = small(clicked_pages=0, clicks=0, timed_clicks=0, seconds=0.0)
    assert all(math.isnan(one.p) and math.isnan(one.p_holm) for one in effects(silent, BUCKETS))
    one_sided = small(timed_clicks=[0, 0, 3, 1], seconds=[0.0, 0, 30, 50])
    found = {one.name: one for one in effects(one_sided, BUCKETS)}
    assert math.isnan(found["dwell"].p) and not math.isnan(found["page_ctr"].p_holm)


# Against others


def test_user_ctr_is_scipys_relative_risk(users):
    counts = users.groupby("bucket")["clicked"].agg(["sum", "size"])
    risk = relative_risk(*(int(n) for name in ("new", "old") for n in counts.loc[name]))
    interval = risk.confidence_interval()
    (one,) = (one for one in effects(users, BUCKETS) if one.name == "user_ctr")
    assert one.relative_difference == pytest.approx(risk.relative_risk - 1, rel=1e-12)
    assert_allclose(one.interval, [interval.low - 1, interval.high - 1], rtol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_statsmodels_regression_with_clustered_errors(pages, users, name):
    # Poisson regression with a log link and clusters of users: its coefficient is the log ratio of the two buckets.
    models = pytest.importorskip("statsmodels.api")
    top, bottom = MEASURES[name]
    rows = (users if name == "user_ctr" else pages[pages[bottom] > 0]).reset_index(drop=name != "user_ctr")
    exog = models.add_constant((rows["bucket"] == "new").astype(float))
    model = models.GLM(
        rows[top] / rows[bottom], exog, models.families.Poisson(), var_weights=rows[bottom].astype(float)
    )
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": rows["user"], "use_correction": False})
    (one,) = (one for one in effects(users, BUCKETS) if one.name == name)
    assert math.log1p(one.relative_difference) == pytest.approx(fit.params["bucket"], rel=1e-6)
    assert one.p == pytest.approx(fit.pvalues["bucket"], rel=1e-4)
    assert_allclose(np.log1p(one.interval), fit.conf_int().loc["bucket"], atol=1e-6)


def test_intervals_agree_with_a_bootstrap_over_users(users):
    rng, columns, values = np.random.default_rng(0), [*{name for pair in MEASURES.values() for name in pair}], []
    for bucket in BUCKETS:
        part = users.loc[users["bucket"] == bucket, columns].to_numpy(np.float64)
        totals = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=1000) @ part
        values.append(totals)
    tops, bottoms = ([columns.index(pair[side]) for pair in MEASURES.values()] for side in (0, 1))
    old, new = (totals[:, tops] / totals[:, bottoms] for totals in values)
    expected = np.quantile(new / old - 1, [0.025, 0.975], axis=0).T
    for one, ends in zip(effects(users, BUCKETS), expected, strict=True):
        width = ends[1] - ends[0]
        assert_allclose(one.interval, ends, atol=0.08 * width, err_msg=one.name)


def test_swapping_the_buckets_flips_the_effect(users):
    for one, other in zip(effects(users, BUCKETS), effects(users, BUCKETS[::-1]), strict=True):
        assert (1 + one.relative_difference) * (1 + other.relative_difference) == pytest.approx(1)
        assert one.p == pytest.approx(other.p)


def test_holm_corrects_for_every_treatment_and_measure():
    log = simulator.ab_log({"a": OLD, "b": NEW, "c": OLD}, 2000)
    log = log.assign(user=pd.factorize(log["user_id"])[0], pages=1, clicked_pages=log["clicked"] > 0)
    log = log.assign(clicks=log["clicked"], timed_clicks=log["clicked"], seconds=log["dwell_seconds"])
    found = effects(by_user(log), ["a", "b", "c"])
    assert [(one.name, one.bucket) for one in found] == [(name, bucket) for name in MEASURES for bucket in "bc"]
    assert_allclose([one.p_holm for one in found], holm([one.p for one in found]))


# Covariates


def test_a_covariate_leaves_the_share_of_variance_that_it_does_not_explain(users):
    # One slope for both buckets: what is left is 1 - r^2 of the scaled influences on the centred covariate.
    plain, adjusted = (effects(users, BUCKETS, names)[0] for names in ([], ["clicks_before"]))
    ratios = log_ratios(users, BUCKETS, "page_ctr")
    before = [users.loc[one.index, "clicks_before"] for _, one in ratios]
    x = np.concatenate([values - values.mean() for values in before])
    y = np.concatenate([len(one) * one for _, one in ratios])
    left = 1 - np.corrcoef(x, y)[0, 1] ** 2
    widths = [math.log1p(one.interval[1]) - math.log1p(one.interval[0]) for one in (plain, adjusted)]
    assert (widths[1] / widths[0]) ** 2 == pytest.approx(left, abs=0.01) and left < 0.9
    shift = np.polyfit(x, y, 1)[0] * (before[1].mean() - before[0].mean())
    assert math.log1p(plain.relative_difference) - math.log1p(adjusted.relative_difference) == pytest.approx(shift)


def test_users_without_a_covariate_count_as_the_mean(users):
    known = users["clicks_before"].astype(float).where(np.arange(len(users)) % 3 > 0)
    filled = known.fillna(known.mean())
    first, second = (effects(users.assign(clicks_before=one), BUCKETS, ["clicks_before"]) for one in (known, filled))
    for one, other in zip(first, second, strict=True):
        assert_allclose(one.interval, other.interval)


# Before and around the test


def test_the_sample_ratio_is_scipys_chi_square():
    users = {"old": 5100, "new": 4900}
    assert sample_ratio(users) == pytest.approx(chisquare([5100, 4900]).pvalue)
    assert sample_ratio(users, {"new": 1, "old": 9}) == pytest.approx(chisquare([5100, 4900], [9000, 1000]).pvalue)
    for shares in ({"old": 1}, {"old": 1, "new": 0}, {"old": 1, "new": 1, "third": 1}):
        with pytest.raises(ValueError, match="a share above 0 for each of the buckets old, new"):
            sample_ratio(users, shares)


def test_nothing_is_concluded_from_a_mismatch_or_from_few_users():
    users = {"old": 5200, "new": 4800}
    assert refusal(users, 0.0011) is None
    assert "old 5,200, new 4,800; p = 9.0e-04" in refusal(users, 0.0009)
    assert refusal({"old": 199, "new": 205}, 0.5) == "a bucket has fewer than 200 users"


def test_the_trend_over_days_matches_weighted_regression_where_every_user_has_one_day(pages):
    first = pages.groupby("user")["day"].transform("first").dt.strftime("%Y-%m-%d")
    log = pages.assign(day=first)
    days, trends = novelty(log, BUCKETS)
    changes = np.array([[math.log1p(one.relative_difference) for one in found] for found in days.values()])
    widths = [[math.log1p(one.interval[1]) - math.log1p(one.interval[0]) for one in found] for found in days.values()]
    errors = np.array(widths) / (2 * 1.959964)
    for place, trend in enumerate(trends):
        weights = 1 / errors[:, place]
        slope, cov = np.polyfit(range(14), changes[:, place], 1, w=weights, cov="unscaled")
        assert math.log1p(trend["per_day"]) == pytest.approx(slope[0], rel=1e-9)
        half = (math.log1p(trend["interval"][1]) - math.log1p(trend["interval"][0])) / 2
        assert half == pytest.approx(1.959964 * math.sqrt(cov[0, 0]), rel=1e-6)


def test_an_effect_that_fades_is_seen_and_a_steady_one_is_not():
    best = grades([0.2, 0.3, 0.5])
    logs = (pages_of(4000, 1, best, share=share) for share in (np.linspace(1, 0, 14), 1.0))
    (fading, *_), (steady, *_) = (novelty(log.assign(day=log["day"].astype(str)), BUCKETS)[1] for log in logs)
    assert fading["name"] == steady["name"] == "page_ctr"
    assert fading["per_day"] < -0.02 and fading["p"] < 1e-6 and steady["p"] > 0.05


def test_the_users_needed_match_hand_example(users):
    # Of a share c, one user's log has the variance (1 - c) / c; twice that for two buckets; (1.96 + 0.8416)^2 = 7.849.
    clicked = users.groupby("bucket")["clicked"].mean()
    spread = 2 * np.mean((1 - clicked) / clicked)
    needed = {row["name"]: row for row in power(users, BUCKETS, days=14)}
    assert needed["user_ctr"]["users"] == pytest.approx(7.8489 * spread / math.log(1.0058) ** 2, rel=1e-3)
    assert needed["user_ctr"]["days"] == math.ceil(14 * needed["user_ctr"]["users"] / 2000)
    assert needed["user_ctr"]["detectable"] == pytest.approx(math.expm1(math.sqrt(7.8489 * spread / 2000)), rel=1e-3)
    assert needed["clicks_per_page"]["users"] is None and set(needed) == set(MEASURES) > set(PAPER)


# Simulated truth


@pytest.mark.parametrize("model", ["position", "cascade"])
def test_the_simulator_knows_its_truth(model):
    log = pages_of(60_000, seed=3, model=model, share=0.4)
    found = {one.name: one for one in effects(by_user(log), BUCKETS)}
    old, new = (simulator.true_measures(OLD, NEW, share, model) for share in (0.0, 0.4))
    for name, one in found.items():
        error = (math.log1p(one.interval[1]) - math.log1p(one.interval[0])) / (2 * 1.96)
        assert math.log(one.control / old[name]) == pytest.approx(0, abs=4 * error)
        assert math.log1p(one.relative_difference) == pytest.approx(math.log(new[name] / old[name]), abs=4 * error)


def coverage(tests, users, share, first_seed=0):
    """How often intervals by user, with a covariate, and by page hold the truth, by measure."""
    old, new = (simulator.true_measures(OLD, NEW, part) for part in (0.0, share))
    held = {unit: dict.fromkeys(MEASURES, 0) for unit in ("user", "cuped", "page")}
    for seed in range(first_seed, first_seed + tests):
        pages = pages_of(users, seed, share=share)
        people = by_user(pages, ["clicks_before"])
        naive = pages.assign(clicked=pages["clicked_pages"])
        for unit, rows, covariates in (
            ("user", people, []),
            ("cuped", people, ["clicks_before"]),
            ("page", naive, []),
        ):
            for one in effects(rows, BUCKETS, covariates):
                low, high = one.interval
                held[unit][one.name] += low <= new[one.name] / old[one.name] - 1 <= high
    return held


def test_intervals_by_user_cover_the_truth_and_naive_ones_do_not():
    held = coverage(tests=60, users=1000, share=1.0)
    for name in MEASURES:
        assert min(held["user"][name], held["cuped"][name]) >= binom.ppf(0.001, 60, 0.95), name
    assert held["page"]["page_ctr"] < binom.ppf(0.001, 60, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, PAPERS_SHARE], ids=["no effect", "the paper's effect"])
def test_intervals_cover_95_percent_of_500_tests(share):
    # A true 95% falls outside of these ends once in a thousand times; with no effect the rest is called significant.
    tests, low, high = 500, *binom.ppf([0.0005, 0.9995], 500, 0.95)
    held = coverage(tests, users=2000, share=share, first_seed=5000 if share else 1000)
    for name in MEASURES:
        print(name, ", ".join(f"by {unit} {found[name] / tests:.1%}" for unit, found in held.items()))
        assert low <= min(held["user"][name], held["cuped"][name]) and held["user"][name] <= high, name
    for name in ("page_ctr", "clicks_per_page"):
        assert held["page"][name] < 0.9 * tests


# Interleaving


def test_team_draft_matches_hand_example():
    # Round 1: 0 picks x, then 1 picks y. Round 2: 1 picks z, then 0 its best that is left, w.
    assert team_draft(["x", "y", "w"], ["y", "z", "x"], [0, 1]) == {"x": 0, "y": 1, "z": 1, "w": 0}
    assert [*team_draft(["x", "y"], ["y", "x"], [1])] == ["y", "x"]
    assert team_draft(["x"], ["x", "y"], [0, 0]) == {"x": 0, "y": 1}  # ends with the shorter ranking


def run_file(path, rankings):
    lines = [f"{q} Q0 {d} {r} {10 - r} tag" for q, docs in rankings.items() for r, d in enumerate(docs, 1)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def runs(tmp_path):
    first = run_file(tmp_path / "a.run", {"q1": "stuvwxyz", "q2": "abcdefgh", "lonely": "a"})
    return first, run_file(tmp_path / "b.run", {"q2": "hgfedcba", "q1": "utszyxwv"})


def test_lists_are_reproducible_and_fair_in_pairs(runs):
    lists = draft_lists(*runs, depth=4, drafts=6)
    pd.testing.assert_frame_equal(lists, draft_lists(*runs, depth=4, drafts=6))
    assert set(lists["query_id"]) == {"q1", "q2"} and lists.groupby(["query_id", "draft"]).size().eq(4).all()
    first = lists[lists["rank"] == 1].pivot(index="query_id", columns="draft", values="team")
    assert (first[[0, 2, 4]].to_numpy() + first[[1, 3, 5]].to_numpy() == 1).all()
    assert lists.groupby(["query_id", "draft"])["team"].sum().eq(2).all()


def test_queries_missing_from_one_run_are_counted(runs, caplog):
    draft_lists(*runs, depth=4)
    assert "1 queries of only one of" in caplog.text


def test_runs_that_share_nothing_and_odd_sizes_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="have no query in common"):
        draft_lists(runs[0], run_file(tmp_path / "c.run", {"q9": "a"}))
    for depth, drafts in ((3, 2), (4, 3), (0, 2)):
        with pytest.raises(ValueError, match="even numbers"):
            draft_lists(*runs, depth=depth, drafts=drafts)


LISTS = pd.DataFrame(
    {
        "query_id": "7",
        "draft": [0, 0, 1, 1],
        "rank": [1, 2, 1, 2],
        "doc_id": ["x", "y", "y", "x"],
        "team": [0, 1, 1, 0],
    }
)


def test_credit_matches_hand_example(tmp_path):
    # u1 clicks the second ranker's pick on one page and both on another; u2 the first ranker's.
    rows = [("u1", 1, "x", 0), ("u1", 1, "y", 1), ("u1", 2, "x", 1), ("u1", 2, "y", 2), ("u2", 3, "x", 1)]
    log = pd.DataFrame(rows, columns=["user_id", "page_id", "doc_id", "clicked"]).assign(query_id=7, draft=0)
    log.to_parquet(tmp_path / "log.parquet")
    found = read_credit(str(tmp_path / "log.parquet"), LISTS)
    assert sorted(found.values.tolist()) == [["u1", 0], ["u1", 1], ["u2", -1]]
    result = preference(found)
    assert [result[name] for name in ("users", "pages", "first_wins", "second_wins", "ties")] == [2, 3, 1, 1, 1]
    assert result["difference"] == 0


def test_a_click_on_a_document_outside_the_list_is_refused(tmp_path):
    log = pd.DataFrame({"user_id": "u", "query_id": "7", "draft": [0, 2], "doc_id": ["x", "y"], "clicked": 1})
    log.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(TableError, match=r"'doc_id': 1 row\(s\) are not on the list of their query_id.*row 1: 'y'"):
        read_credit(str(tmp_path / "log.csv"), LISTS)
    log.assign(draft=0, user_id=["u", None]).to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(TableError, match=r"'user_id': 1 row\(s\) have no value. First: row 1: None"):
        read_credit(str(tmp_path / "log.csv"), LISTS)
    log.assign(draft=0, clicked=[-1, 0]).to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(TableError, match=r"'clicked': 1 row\(s\) have no number of clicks"):
        read_credit(str(tmp_path / "log.csv"), LISTS)


def test_the_preference_is_tested_by_user():
    rng = np.random.default_rng(0)
    size = rng.choice([1, 2, 9], size=400)
    taste = np.repeat(rng.choice([-1, 0, 0, 1, 1], size=400), size)
    credit = np.where(rng.random(len(taste)) < 0.5, taste, rng.integers(-1, 2, size=len(taste)))
    found = preference(pd.DataFrame({"user_id": np.repeat(np.arange(400), size), "credit": credit}))
    sums = np.add.reduceat(credit, np.r_[0, np.cumsum(size)[:-1]])
    low, high = bootstrap(sums, size, rounds=4000)
    assert found["difference"] == pytest.approx(credit.mean())
    assert_allclose(found["interval"], [low, high], atol=0.06 * (high - low))
    assert found["p"] == pytest.approx(2 * norm.sf(credit.mean() * 2 * 1.96 / (high - low)), rel=0.3)
    assert found["p_sign"] == pytest.approx(binomtest(int((sums > 0).sum()), int((sums != 0).sum())).pvalue)


def test_one_page_of_each_user_is_the_t_test():
    credit = np.random.default_rng(0).choice([-1, 0, 1], size=3000, p=[0.2, 0.58, 0.22])
    found, expected = preference(pd.DataFrame({"user_id": range(3000), "credit": credit})), ttest_1samp(credit, 0)
    assert found["p"] == pytest.approx(expected.pvalue, rel=0.01)
    assert_allclose(found["interval"], expected.confidence_interval(), rtol=0.01)


@pytest.fixture
def judged(tmp_path):
    """Twelve queries of eight documents; runs that order them by grade, backwards, and by chance."""
    rng, rows = np.random.default_rng(0), []
    for query in range(12):
        labels = rng.permutation([2, 1, 1, 0, 0, 0, 0, 0])
        rows += [(f"q{query}", f"d{query}-{place}", label) for place, label in enumerate(labels)]
    table = pd.DataFrame(rows, columns=["query_id", "doc_id", "label"]).assign(query="q", title="t", summary="s")
    table["query"] = table["query_id"]
    table.assign(split="dev").to_parquet(tmp_path / "judgments.parquet")
    orders = {"good": table["label"], "bad": -table["label"], "chance": rng.random(len(table))}
    for name, score in orders.items():
        ranked = table.assign(score=score).sort_values("score", ascending=False, kind="stable")
        run_file(tmp_path / f"{name}.run", ranked.groupby("query_id")["doc_id"].agg(list).to_dict())
    return tmp_path


@pytest.mark.parametrize("model", ["position", "cascade"])
def test_interleaving_finds_the_better_ranker_with_few_users_and_none_among_equals(judged, model):
    found = {}
    for first, second in (("bad", "good"), ("good", "bad"), ("chance", "chance")):
        lists = draft_lists(str(judged / f"{first}.run"), str(judged / f"{second}.run"), depth=6)
        log = simulator.interleaved_log(lists, str(judged / "judgments.parquet"), users=1500, model=model)
        log.to_parquet(judged / "log.parquet")
        found[first, second] = preference(read_credit(str(judged / "log.parquet"), lists))
    assert found["bad", "good"]["difference"] > 0 > found["good", "bad"]["difference"]
    assert max(found["bad", "good"]["p"], found["good", "bad"]["p"]) < 1e-6 and found["chance", "chance"]["p"] > 0.01


def test_graded_gives_the_grades_in_the_order_of_the_run(judged):
    found = simulator.graded(str(judged / "good.run"), str(judged / "judgments.parquet"), depth=4)
    assert found.shape == (12, 4) and (found.to_numpy() == [2, 1, 1, 0]).all()
