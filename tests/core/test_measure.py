"""What logits are worth, also where they are no ordinary numbers."""

from __future__ import annotations

import pytest
import torch

from rlcompress.core.measure import WORST, compare, divergence


def test_a_class_that_is_ruled_out_adds_nothing():
    torch.manual_seed(0)
    dense, other, labels = torch.randn(20, 4), torch.randn(20, 4), torch.arange(20) % 4
    ruled_out = torch.full((20, 1), -torch.inf)
    with_it = (torch.cat([logits, ruled_out], 1) for logits in (other, dense))
    assert compare(*with_it, labels) == pytest.approx(compare(other, dense, labels))


def test_training_passes_over_a_class_that_is_ruled_out():
    logits = torch.tensor([[0.3, -torch.inf, 1.0]], requires_grad=True)
    divergence(logits, torch.tensor([[1.0, -torch.inf, 0.0]]).log_softmax(1)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 2]


def test_logits_that_are_no_numbers_are_wrong():
    dense, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    assert compare(torch.full((8, 3), torch.nan), dense, labels) == (0.0, WORST, WORST)
