"""Token budgets."""

import numpy as np

from hf_disranker.packing import budget_batches


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
