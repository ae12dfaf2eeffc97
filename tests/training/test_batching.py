"""Batches of whole queries by token budget."""

import threading

import numpy as np
import pytest
from two_processes import ragged_groups

from hf_disranker.data.collators import GroupCollator, budget_batches, prefetch_map, runs_within
from hf_disranker.models.ranker import pair_collator
from hf_disranker.training.batching import BudgetStream, TokenBudgetSampler, group_lengths


@pytest.fixture
def collate(tiny_student):
    return GroupCollator(pair_collator(*tiny_student))


def test_batches_of_groups_match_hand_example():
    sizes, lengths = np.array([2, 1, 3, 1, 9]), np.array([10, 30, 10, 20, 5])
    # 30 x 1; then 20 x (1 + 2) = 60; then 10 x 3 (with 9 x 10 it would be 120); 9 x 5 = 45
    batches = budget_batches(lengths, 60, sizes)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2], [4]]
    assert [batch.tolist() for batch in budget_batches(lengths, 1, sizes)] == [[1], [3], [0], [2], [4]]


def test_every_query_is_seen_once_within_the_budget_and_in_another_order_each_epoch(collate):
    groups = ragged_groups(60, 12)
    sizes, lengths = group_lengths(groups, collate)
    assert sizes.tolist() == [len(row["doc_ids"]) for row in groups]
    epochs = iter([0, 1, 0])
    sampler = TokenBudgetSampler(sizes, lengths, token_budget=400, processes=2, seed=3, epoch=lambda: next(epochs))
    first = list(sampler)
    assert sorted(group for batch in first for group in batch) == list(range(60))
    assert len(first) == len(sampler) and len(sampler) % 2 == 0
    assert max(sizes[batch].sum() * lengths[batch].max() for batch in first) <= 400
    assert max(map(len, first)) > 1
    second = list(sampler)
    assert first != second and sorted(first) == sorted(second)
    assert list(sampler) == first


def test_lengths_are_those_of_the_collated_batch(collate):
    groups = ragged_groups(8, 5)
    sizes, lengths = group_lengths(groups, collate)
    for row, size, length in zip(groups.to_list(), sizes, lengths, strict=True):
        assert collate([row])["input_ids"].shape == (size, length)


def test_a_stream_keeps_the_budget_and_loses_no_query(collate):
    groups = ragged_groups(200, 6).to_list()
    batches = list(BudgetStream(groups, collate, token_budget=300, seed=0))
    for batch in batches:
        assert collate(batch)["input_ids"].numel() <= 300 or len(batch) == 1
    seen = [group["query_id"] for batch in batches for group in batch]
    assert sorted(seen, key=int) == list(map(str, range(200)))
    rows = sum(len(group["doc_ids"]) for group in groups)
    padded = sum(collate(batch)["attention_mask"].numel() for batch in batches)
    real = sum(int(collate(batch)["attention_mask"].sum()) for batch in batches)
    unsorted = sum(collate(groups[at : at + 5])["attention_mask"].numel() for at in range(0, 200, 5))
    assert rows and real / padded > real / unsorted  # queries of like length share a batch


def test_a_query_beyond_the_budget_is_reported(caplog):
    TokenBudgetSampler(np.array([1, 50]), np.array([10, 10]), token_budget=100)
    assert "1 of 2 queries need more than 100 tokens" in caplog.text


def test_batches_match_hand_example():
    # Longest first: 12 is over the budget and stands alone; 10 // 5 rows fit, then 10 // 3, of which 2 are left.
    batches = budget_batches(np.array([3, 5, 12, 2, 4]), token_budget=10)
    assert [batch.tolist() for batch in batches] == [[2], [1, 4], [0, 3]]


def test_every_row_appears_once_and_no_batch_exceeds_the_budget():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    batches = budget_batches(lengths, token_budget=256)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 256
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.03 * lengths.sum()


def test_no_rows_yield_no_batches():
    assert budget_batches(np.array([], dtype=int), token_budget=10) == []


def test_runs_keep_the_order_and_the_budget():
    runs = runs_within(np.array([4, 4, 4, 12, 1, 1]), token_budget=8)
    assert [run.tolist() for run in runs] == [[0, 1], [2, 3], [4, 5]]
    assert runs_within(np.array([], dtype=int), token_budget=8) == []


def test_the_next_result_is_computed_in_the_background():
    begun = [threading.Event() for _ in range(3)]

    def make(number):
        begun[number].set()
        return number * number

    results = prefetch_map(make, range(3))
    assert next(results) == 0 and begun[1].wait(5)
    assert list(results) == [1, 4] and list(prefetch_map(make, [])) == []


def test_an_error_is_raised_in_place_of_its_result():
    results = prefetch_map(lambda number: 1 / number, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
