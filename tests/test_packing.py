"""Token budgets, packing, and what is made ahead."""

import threading

import numpy as np
import pytest

from hf_disranker.packing import budget_batches, made_ahead, pack, runs_within


def test_batches_match_hand_example():
    # Longest first: 12 is over the budget and stands alone; 10 // 5 rows fit, then 10 // 3, of which 2 are left.
    batches = budget_batches(np.array([3, 5, 12, 2, 4]), token_budget=10)
    assert [batch.tolist() for batch in batches] == [[2], [1, 4], [0, 3]]


def test_every_row_comes_once_and_no_batch_is_over_the_budget():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    batches = budget_batches(lengths, token_budget=256)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 256
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.03 * lengths.sum()


def test_no_rows_make_no_batch():
    assert budget_batches(np.array([], dtype=int), token_budget=10) == []


def test_runs_keep_the_order_and_the_budget():
    runs = runs_within(np.array([4, 4, 4, 12, 1, 1]), token_budget=8)
    assert [run.tolist() for run in runs] == [[0, 1], [2, 3], [4, 5]]
    assert runs_within(np.array([], dtype=int), token_budget=8) == []


def test_packed_rows_match_hand_example():
    # The first two rows share 1, 2; of the third, whose key is another, nothing is shared, nor of a row's last token.
    packed = pack([[1, 2, 3, 9], [1, 2, 9], [1, 2, 9], [7, 9], [7, 9]], ["a", "a", "b", "c", "c"])
    assert packed.input_ids.tolist() == [[1, 2, 3, 9, 9, 1, 2, 9, 7, 9, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 0, 1, 1]]
    assert packed.last.tolist() == [3, 4, 7, 9, 10]
    assert packed.groups[0] == (slice(0, 2), [slice(2, 4), slice(4, 5)])
    assert packed.groups[1] == (slice(5, 7), [slice(7, 8)])


def test_the_next_is_made_while_one_is_used():
    begun = [threading.Event() for _ in range(3)]

    def make(number):
        begun[number].set()
        return number * number

    results = made_ahead(make, range(3))
    assert next(results) == 0 and begun[1].wait(5)
    assert list(results) == [1, 4] and list(made_ahead(make, [])) == []


def test_an_error_comes_where_its_result_would():
    results = made_ahead(lambda number: 1 / number, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
