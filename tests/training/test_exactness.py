"""The same data gives the same gradient and the same weights, however it is batched, split, packed or resumed."""

import os
import signal
import time
from itertools import islice

import pandas as pd
import processes
import pytest
import torch
from two_processes import (
    evaluation_losses,
    gradient,
    make_trainer,
    ragged_groups,
    run_jobs,
    weights,
    whole_and_resumed,
)

from hf_disranker import load_groups
from hf_disranker.recipes.runs import resume_point


@pytest.fixture(scope="module")
def two_processes(student_dir, tmp_path_factory):
    return run_jobs(student_dir, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module", params=["labels", "scores"])
def reference(request, student_dir, tmp_path_factory):
    """The kind of loss and the gradient of sixteen queries of 1 to 30 documents in one batch."""
    out = tmp_path_factory.mktemp("reference")
    return request.param, gradient(request.param, student_dir, out, per_device_train_batch_size=16)


def assert_equal_gradients(found, expected):
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 4), (1, 16), (3, 6)])
def test_accumulation_gives_the_gradient_of_the_one_big_batch(reference, student_dir, tmp_path, batch, accumulation):
    kind, expected = reference
    found = gradient(
        kind, student_dir, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert_equal_gradients(found, expected)


def test_a_token_budget_gives_the_gradient_of_the_one_big_batch(reference, student_dir, tmp_path):
    kind, expected = reference
    # More micro-batches than there are: one step takes the whole epoch.
    for budget in (100, 1500, 10**6):
        found = gradient(kind, student_dir, tmp_path, token_budget=budget, gradient_accumulation_steps=99)
        assert_equal_gradients(found, expected)


def test_two_processes_give_the_gradient_of_the_one_big_batch(reference, two_processes):
    kind, expected = reference
    assert_equal_gradients(two_processes[kind], expected)
    if kind == "scores":
        assert_equal_gradients(two_processes["budget"], expected)


def test_two_processes_give_the_evaluation_losses_of_one(two_processes, student_dir, tmp_path):
    assert two_processes["losses"] == pytest.approx(evaluation_losses(student_dir, tmp_path), rel=1e-6)


@pytest.mark.parametrize("data", ["memory", "stream", "token batches"])
def test_resuming_in_mid_epoch_is_bit_equal_on_two_processes(two_processes, data):
    whole, resumed = two_processes[data]
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("data", ["memory", "stream"])
def test_resuming_in_mid_epoch_is_bit_equal(student_dir, tmp_path, data):
    groups = ragged_groups(16, 7)
    if data == "stream":
        groups = groups.to_iterable_dataset()
    whole, resumed = whole_and_resumed(student_dir, tmp_path, groups, per_device_train_batch_size=6)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("data", ["memory", "stream"])
def test_resuming_a_finished_run_takes_no_further_step(student_dir, tmp_path, data):
    groups = ragged_groups(16, 7) if data == "memory" else ragged_groups(16, 7).to_iterable_dataset()
    whole = weights(student_dir, tmp_path, groups, save_steps=7)
    assert torch.equal(weights(student_dir, tmp_path, groups, str(tmp_path / "checkpoint-7")), whole)


def test_resuming_a_stream_in_token_batches_is_bit_equal(student_dir, tmp_path):
    rows = pd.DataFrame(ragged_groups(16, 7).to_list()).drop(columns="labels")
    columns = {"doc_ids": "doc_id", "titles": "title", "summaries": "summary", "teacher_scores": "teacher_score"}
    rows.explode([*columns]).rename(columns=columns).to_parquet(tmp_path / "scores.parquet")
    groups = load_groups(tmp_path / "scores.parquet", streaming=True)
    options = {"token_budget": 600, "shuffle_buffer": 8, "hinge_weight": 0.0}
    whole, resumed = whole_and_resumed(student_dir, tmp_path, groups, **options)
    assert torch.equal(whole, resumed)


def test_a_stream_is_shuffled_and_every_pass_has_its_own_order(student_dir, tmp_path):
    trainer = make_trainer("scores", student_dir, tmp_path, ragged_groups(16, 7).to_iterable_dataset(), max_steps=1)
    ids = [row["query_id"] for row in islice(trainer.train_dataset, 64)]
    assert set(ids) == set(map(str, range(16))) and ids[:16] != list(map(str, range(16)))
    assert ids[:16] != ids[16:32]


def continued(model_dir, out):
    weights(model_dir, out, ragged_groups(16, 7), resume_point(str(out)), max_steps=60, save_steps=5)


def test_a_killed_run_loses_at_most_the_steps_since_its_last_checkpoint(student_dir, tmp_path):
    def kill_after(step, how):
        process = processes.start(continued, student_dir, tmp_path / "run")
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == -how
        point = resume_point(str(tmp_path / "run"))
        reached = int(point.rsplit("-", 1)[1]) if point else 0
        assert step - 5 <= reached < 60  # the state of `step` may have been cut off in the writing
        return reached

    first = kill_after(5, signal.SIGTERM)
    second = kill_after(first + 20, signal.SIGKILL)
    assert second > first
    options = {"max_steps": 60, "save_steps": 5}
    groups = ragged_groups(16, 7)
    finished = weights(student_dir, tmp_path / "run", groups, resume_point(str(tmp_path / "run")), **options)
    assert torch.equal(finished, weights(student_dir, tmp_path / "whole", groups, **options))
