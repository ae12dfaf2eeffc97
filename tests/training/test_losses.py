"""Losses against numbers worked out by hand, double loops and stock classes."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from hf_disranker.training.losses import hinge, kl, margin_mse, point_mse, ranknet, softmax

STUDENT = torch.tensor([[1.0, 3.0, 0.0], [2.0, 1.0, 9.0]])
TEACHER = torch.tensor([[2.0, 2.0, 2.0], [0.0, 3.0, 7.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_point_mse_matches_hand_example():
    # errors -1, 1, -2 | 2, -2: (1 + 1 + 4 + 4 + 4) / 5
    assert point_mse(STUDENT, TEACHER, MASK).mean.item() == pytest.approx(14 / 5)


def test_margin_mse_matches_hand_example():
    # query 1, errors -1, 1, -2: pairs (2, 1, 3) squared 4 + 1 + 9, mean 14/3, weight 2
    # query 2, errors 2, -2: one pair, 16, weight 1
    assert margin_mse(STUDENT, TEACHER, MASK).mean.item() == pytest.approx((14 / 3 * 2 + 16) / 3)


def test_hinge_matches_hand_example():
    labels = torch.tensor([[2, 1, 0], [1, 1, 5]])
    # query 1: 2 over 1: 1 - (1 - 3) = 3; 2 over 0: 1 - (1 - 0) = 0; 1 over 0: 1 - (3 - 0) < 0 -> 0; mean 1
    # query 2: no pair of different labels, so it counts for nothing
    term = hinge(STUDENT, labels, MASK)
    assert (term.mean.item(), term.weight.item()) == (pytest.approx(1.0), 1.0)
    assert hinge(STUDENT, labels, MASK, margin=3.0).mean.item() == pytest.approx((5 + 2 + 0) / 3)


def test_ranknet_matches_hand_example():
    scores, labels = torch.tensor([[0.0, math.log(3), 0.0], [5.0, 1.0, 0.0]]), torch.tensor([[1, 0, 0], [1, 1, 7]])
    # query 1: 1 over 2: log(1 + 3); 1 over 3: log 2; query 2 has no pair
    term = ranknet(scores, labels, MASK)
    assert (term.mean.item(), term.weight.item()) == (pytest.approx((math.log(4) + math.log(2)) / 2), 1.0)


def test_softmax_matches_hand_example():
    scores = torch.tensor([[math.log(2), 0.0, 0.0], [5.0, 1.0, 0.0]])
    labels = torch.tensor([[2, 1, 0], [1, 1, 7]])
    # query 1: softmax 1/2, 1/4, 1/4 against shares 2/3, 1/3, 0; query 2 has one grade only
    term = softmax(scores, labels, MASK)
    assert (term.mean.item(), term.weight.item()) == (pytest.approx(4 / 3 * math.log(2)), 1.0)


def test_softmax_leaves_out_documents_of_unknown_grade():
    scores, labels = torch.tensor([[math.log(3), 0.0, 9.0]]), torch.tensor([[1.0, 0.0, math.nan]])
    assert softmax(scores, labels, MASK[:1]).mean.item() == pytest.approx(-math.log(3 / 4))


def test_kl_matches_hand_example():
    student, teacher = torch.zeros(3, 2), torch.tensor([[0.0, math.log(3)], [0.0, 2 * math.log(3)], [1.0, 1.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    # p = 1/4, 3/4 against 1/2, 1/2; at temperature 2 the second query is that one, times 4
    value = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl(student[:1], teacher[:1], mask[:1]).mean.item() == pytest.approx(value)
    assert kl(student[1:2], teacher[1:2], mask[1:2], temperature=2.0).mean.item() == pytest.approx(4 * value)
    assert kl(student, teacher, mask).weight == 2
    assert kl(teacher + 7.0, teacher, mask).total.item() == pytest.approx(0.0, abs=1e-6)  # blind to the offset


def test_point_mse_equals_mse_loss():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    everything = torch.ones(4, 7, dtype=torch.bool)
    assert torch.equal(point_mse(student, teacher, everything).mean, nn.MSELoss()(student, teacher))


def test_margin_mse_on_two_documents_equals_the_mse_of_margins():
    student, teacher = torch.randn(9, 2), torch.randn(9, 2)
    ours = margin_mse(student, teacher, torch.ones(9, 2, dtype=torch.bool)).mean
    stock = nn.MSELoss()(student[:, 0] - student[:, 1], teacher[:, 0] - teacher[:, 1])
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_margin_mse_equals_the_double_loop(dtype):
    torch.manual_seed(1)
    student, teacher = (8 * torch.randn(5, 30)).to(dtype), (8 * torch.randn(5, 30)).to(dtype)
    sizes = [30, 1, 2, 17, 9]
    mask = torch.arange(30) < torch.tensor(sizes)[:, None]
    total = 0.0
    for query, size in enumerate(sizes):
        errors = [student[query, i].item() - teacher[query, i].item() for i in range(size)]
        pairs = [(a - b) ** 2 for a, b in combinations(errors, 2)]
        total += sum(pairs) / max(1, len(pairs)) * (size - 1)
    assert margin_mse(student, teacher, mask).mean.item() == pytest.approx(total / sum(n - 1 for n in sizes), rel=1e-5)


def test_margin_mse_is_exact_under_a_large_common_offset():
    torch.manual_seed(2)
    # Whole numbers, so the offset itself rounds nothing in fp32.
    student, teacher = torch.randint(-9, 9, (3, 8)).float(), torch.randint(-9, 9, (3, 8)).float()
    mask = torch.ones(3, 8, dtype=torch.bool)
    near, far = student.requires_grad_(), (student.detach() + 100_000.0).requires_grad_()
    losses = [margin_mse(scores, teacher, mask).mean for scores in (near, far)]
    gradients = [torch.autograd.grad(loss, scores)[0] for loss, scores in zip(losses, (near, far), strict=True)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def losses_with_targets(teacher, labels):
    return [(loss, teacher) for loss in (point_mse, margin_mse, kl)] + [
        (loss, labels) for loss in (hinge, ranknet, softmax)
    ]


def test_losses_add_up_over_any_split_of_the_batch():
    torch.manual_seed(3)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    labels, mask = torch.randint(0, 3, (6, 5)), torch.rand(6, 5) > 0.3
    for loss, target in losses_with_targets(teacher, labels):
        whole = loss(student, target, mask)
        parts = [loss(student[rows], target[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
        assert sum(part.total for part in parts).item() == pytest.approx(whole.total.item(), rel=1e-5)
        assert sum(part.weight for part in parts) == whole.weight


@pytest.mark.parametrize("loss", [point_mse, margin_mse, kl, hinge, ranknet, softmax])
def test_padding_can_be_nan_and_gets_no_gradient(loss):
    student = torch.tensor([[1.0, 2.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    value = loss(student, torch.tensor([[2.0, 0.0, torch.nan]]), mask).mean
    gradient = torch.autograd.grad(value, student)[0]
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert gradient[0, 2] == 0 and gradient[0, :2].abs().sum() > 0


def test_a_query_with_one_document_counts_in_point_mse_only():
    student, teacher, mask = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]])
    assert point_mse(student, teacher, mask).mean == 4.0
    assert margin_mse(student, teacher, mask) == (0.0, 0.0)
    assert margin_mse(student, teacher, mask).mean == 0.0


def test_large_half_precision_scores_do_not_overflow():
    student, teacher = torch.tensor([[300.0, -300.0]]).half(), torch.tensor([[-300.0, 300.0]]).half()
    assert point_mse(student, teacher, torch.tensor([[True, True]])).mean == 360_000.0  # beyond fp16's 65,504
