"""Early checks: one line for each common failure."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from two_processes import make_trainer, ragged_groups

from hf_disranker import BertDistilledRanker, DistillationConfig, DistillationTrainer, RankingConfig
from hf_disranker.data import collators
from hf_disranker.data.collators import GroupCollator
from hf_disranker.models.ranker import pair_collator
from hf_disranker.training.monitor import (
    LossMonitor,
    sample_groups,
    warn_squashed,
    warn_truncated,
)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_disranker")]


def test_collapsing_scores_warn_once(caplog):
    monitor = LossMonitor(target_spread=2.0)
    for step, spread in enumerate([0.5, 1.8, 0.9, 0.1, 0.0]):
        monitor.check(step, {"loss": 1.0, "score_spread": spread})
    assert len(lines(caplog)) == 1 and "Step 3: The scores within a query collapse" in lines(caplog)[0]
    assert "learning_rate" in lines(caplog)[0]


def test_a_new_student_and_a_small_target_scale_do_not_warn(caplog):
    for target, spreads in ((2.0, [0.01, 0.05, 0.9]), (0.1, [3.0, 0.5, 0.1])):
        monitor = LossMonitor(target)
        for spread in spreads:
            monitor.check(1, {"score_spread": spread})
    assert lines(caplog) == []


def test_a_run_that_ends_on_its_first_plateau_warns(caplog):
    monitor = LossMonitor(0.8)
    monitor.check(25, {"score_spread": 0.008})
    monitor.check_end(250)
    assert "Step 250: training ends on its first plateau" in lines(caplog)[0] and "0.008" in lines(caplog)[0]
    caplog.clear()
    monitor.check(275, {"score_spread": 0.3})
    monitor.check_end(275)
    assert lines(caplog) == []


def test_equal_scores_warn_at_once(caplog):
    LossMonitor(2.0).check(10, {"score_spread": 0.0})
    assert "Step 10: The model scores all documents of a query equally" in lines(caplog)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    with pytest.raises(FloatingPointError, match="Step 7: point_mse not finite. Lower --learning_rate"):
        LossMonitor(1.0).check(7, {"loss": 0.0, "point_mse": value, "score_spread": 1.0})


def test_a_broken_model_stops_its_trainer(student_dir, tmp_path):
    trainer = make_trainer("scores", student_dir, tmp_path, ragged_groups(8, 5), max_steps=3, logging_steps=1)
    trainer.model.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="Step 1: .*point_mse"):
        trainer.train()


def test_squashed_teacher_scores_warn(caplog):
    warn_squashed(np.array([0.2, 1.2]))
    assert lines(caplog) == []
    warn_squashed(np.array([0.2, 0.9]))
    assert "between 0 and 1" in lines(caplog)[0] and "raw logits" in lines(caplog)[0]


def test_truncation_of_more_than_five_percent_warns(tiny_student, caplog, monkeypatch):
    model, tokenizer = tiny_student
    collate = GroupCollator(pair_collator(model, tokenizer))
    groups = ragged_groups(20, 5)
    warn_truncated(groups, collate)
    assert lines(caplog) == []
    monkeypatch.setattr(collators, "_DOCUMENT_ROOM", 0)
    warn_truncated(groups, GroupCollator(replace(collate.pairs, max_length=14, max_query_length=14)))
    assert len(lines(caplog)) == 1
    expected = "% of documents are truncated at max_length 14: raise --max_length, or split documents into passages."
    assert lines(caplog)[0].endswith(expected)
    caplog.clear()
    warn_truncated(groups, GroupCollator(replace(collate.pairs, max_query_length=1)))
    assert lines(caplog)[0].endswith("% of queries are truncated at max_query_length 1: raise --max_query_length.")


def test_streams_are_checked_on_their_first_rows(student_dir, tmp_path):
    stream = ragged_groups(20, 5).to_iterable_dataset()
    assert len(sample_groups(stream)) == 20
    with pytest.raises(ValueError, match="learns from 'labels'"):
        make_trainer("labels", student_dir, tmp_path, stream.remove_columns("labels"), max_steps=1)


def test_a_loss_on_labels_needs_labels(student_dir, tmp_path):
    with pytest.raises(ValueError, match="A loss on labels has a weight, but the rows have no labels"):
        make_trainer("scores", student_dir, tmp_path, ragged_groups(8).remove_columns("labels"), max_steps=1)


def test_loss_weights_are_checked(tmp_path):
    with pytest.raises(ValueError, match="must not be negative"):
        RankingConfig(str(tmp_path), hinge_weight=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        DistillationConfig(str(tmp_path), point_weight=-1.0)


@pytest.mark.parametrize("metric", ["ndcg@10", "pnr"])
def test_the_best_model_is_kept_and_training_stops_when_it_gets_no_better(student_dir, tmp_path, metric):
    trainer = make_trainer(
        "labels",
        student_dir,
        tmp_path,
        ragged_groups(8, 5),
        eval_dataset=ragged_groups(8, 5),
        max_steps=30,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        early_stopping_patience=2,
    )
    trainer.train()
    # Without learning the first evaluation stays the best: two more, and it ends.
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step == 2
    first = next(entry for entry in trainer.state.log_history if f"eval_{metric}" in entry)
    assert trainer.state.best_metric == first[f"eval_{metric}"] and trainer.args.greater_is_better
    trainer.train()  # afresh, as each trial of hyperparameter_search does
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(("tracker", "files"), [("tensorboard", "events.out.tfevents.*"), ("trackio", "*.db")])
def test_trackers_receive_the_terms(student_dir, tmp_path, monkeypatch, tracker, files):
    pytest.importorskip(tracker)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    options = {"report_to": tracker, "max_steps": 2, "logging_steps": 1}
    make_trainer("scores", student_dir, tmp_path, ragged_groups(8, 5), **options).train()
    folder = tmp_path if tracker == "tensorboard" else Path(os.environ["HF_HOME"], "trackio")
    found = list(folder.rglob(files))
    assert found and b"margin_mse" in b"".join(path.read_bytes() for path in found)


@pytest.mark.parametrize(
    ("transform", "bias", "expected"), [("none", 0.0, 7.0), ("affine", 0.0, 0.0), ("none", 1.5, 1.5)]
)
def test_a_new_head_starts_at_the_mean_of_the_targets(transform, bias, expected, student_dir, tmp_path):
    student = BertDistilledRanker.from_pretrained(student_dir)
    student.start_at(bias)
    groups = ragged_groups(8, 5)
    shift = 7.0 - np.concatenate(groups["teacher_scores"]).mean()
    groups = groups.map(lambda row: {"teacher_scores": [score + shift for score in row["teacher_scores"]]})
    args = DistillationConfig(str(tmp_path), score_transform=transform, max_length=64, report_to="none")
    trainer = DistillationTrainer(student, args, groups, processing_class=AutoTokenizer.from_pretrained(student_dir))
    assert trainer.model.classifier.bias.item() == pytest.approx(expected, abs=1e-5)
