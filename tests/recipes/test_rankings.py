"""Evaluated rankings: saved, loaded and compared."""

import numpy as np
import pandas as pd
import pytest

from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation.evaluate import evaluate, join_run
from hf_disranker.recipes.rankings import Evaluation, compare_evaluations, load_evaluations, score_with


def test_score_with_counts_each_truncation_once(student_ranker, judgments):
    rows = judgments.assign(query="read " * 40)
    scores, pairs_per_s = score_with(student_ranker, rows, progress=False)
    assert np.array_equal(scores, student_ranker.predict(pair_texts(rows)))
    assert pairs_per_s > 0
    assert student_ranker.queries_cut == 2 * len(rows)  # once by score_with, once above


def test_evaluations_round_trip(tmp_path, judgments):
    source = tmp_path / "judgments.parquet"
    judgments.to_parquet(source)
    rng = np.random.default_rng(0)
    table = judgments.assign(teacher_score=rng.normal(size=len(judgments)))
    extra = table.iloc[:2].assign(doc_id=["n1", "n2"])
    rows = join_run(judgments, pd.concat([table.drop(index=3), extra]))
    written = Evaluation.of("my ranker", rows, ["P@5"], judgments=str(source), split="", role="run")
    written.save(tmp_path / "eval" / "one.json")
    (read,) = load_evaluations([tmp_path / "eval"])
    assert (read.name, read.measures, read.about) == (written.name, written.measures, written.about)
    pd.testing.assert_frame_equal(read.queries, written.queries)
    assert evaluate(read.rows, read.rows["score"].to_numpy())["ndcg@10"] == written.measures["ndcg@10"]
    run = (tmp_path / "eval" / "one.json.run").read_text().splitlines()
    assert len(run) == len(judgments) + 1  # without the judged document that the run lacked
    query, q0, doc, rank, score, tag = run[0].split()
    assert (q0, rank, tag) == ("Q0", "1", "my_ranker") and query in set(judgments["query_id"])


def test_evaluations_of_other_judgments_are_refused(tmp_path, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    for name, split in (("a", "dev"), ("b", "train")):
        rows = judgments[judgments["split"] == split].assign(score=1.0)
        about = {"judgments": str(tmp_path / "judgments.parquet"), "split": split}
        Evaluation.of(name, rows, **about).save(tmp_path / "eval" / f"{name}.json")
    with pytest.raises(ValueError, match="has other judgments than"):
        load_evaluations([tmp_path / "eval"])
    with pytest.raises(ValueError, match="need distinct names"):
        load_evaluations([tmp_path / "eval" / "a.json"] * 2)
    with pytest.raises(ValueError, match="No json file"):
        load_evaluations([tmp_path])


def test_compare_evaluations_counts_changed_tops(judgments):
    good = Evaluation.of("good", judgments.assign(score=judgments["label"].astype(float)))
    rows = judgments.assign(score=judgments["label"].astype(float))
    rows.loc[rows["query_id"].isin(["q0", "q1", "q2"]), "score"] *= -1
    (one,) = compare_evaluations([Evaluation.of("bad", rows), good])
    assert (one.first, one.second, one.queries) == ("good", "bad", 12)
    assert one.changed[1] == one.changed[10] == pytest.approx(3 / 12)
    assert one.difference == pytest.approx(1 - evaluate(rows, rows["score"].to_numpy())["ndcg@10"])
    with pytest.raises(ValueError, match="has no P@5 by query"):
        compare_evaluations([good, good], "P@5")
