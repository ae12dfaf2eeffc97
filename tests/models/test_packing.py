"""Batches without padding."""

import torch

from hf_disranker.models.packing import Unpadded, pack


def test_unpadded_rows_match_hand_example():
    # Padded on the left and on the right; the two rows of two tokens are one run behind the longest.
    flat = Unpadded.of(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]))
    assert flat.order.tolist() == [1, 0, 2] and flat.runs == [(1, 3), (2, 2)]
    assert flat.tokens.tolist() == [3, 4, 5, 0, 1, 7, 8]
    assert flat.positions.tolist() == [0, 1, 2, 0, 1, 1, 2]
    assert flat.first.tolist() == [0, 3, 5]


def test_attention_matches_hand_example():
    # One head of size 1. Equal keys weigh equally: each token gets the mean of its row's values.
    flat = Unpadded.of(torch.tensor([[1, 1, 1], [1, 0, 0]]))
    values = torch.tensor([[1.0], [2.0], [6.0], [5.0]])
    mixed = flat.attend(torch.ones(4, 1), torch.zeros(4, 1), values, heads=1)
    torch.testing.assert_close(mixed, torch.tensor([[3.0], [3.0], [3.0], [5.0]]))
    # Keys 0, log 2 and 0 weigh 1 : 2 : 1 for a query of 1; one token of each row asks.
    keys = torch.tensor([[1.0], [2.0], [1.0], [1.0]]).log()
    mixed = flat.attend(torch.ones(2, 1), keys, values, heads=1)
    torch.testing.assert_close(mixed, torch.tensor([[(1 + 2 * 2 + 6) / 4], [5.0]]))


def test_packed_rows_match_hand_example():
    # The first two rows share 1, 2; of the third, whose key is another, nothing is shared, nor of a row's last token.
    packed = pack([[1, 2, 3, 9], [1, 2, 9], [1, 2, 9], [7, 9], [7, 9]], ["a", "a", "b", "c", "c"])
    assert packed.input_ids.tolist() == [[1, 2, 3, 9, 9, 1, 2, 9, 7, 9, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 0, 1, 1]]
    assert packed.last.tolist() == [3, 4, 7, 9, 10]
    assert packed.groups[0] == (slice(0, 2), [slice(2, 4), slice(4, 5)])
    assert packed.groups[1] == (slice(5, 7), [slice(7, 8)])
