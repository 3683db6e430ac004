"""The refit of the logits: KL, not squares."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rlcompress.core.logits import refit_logits
from rlcompress.core.moments import Sample
from rlcompress.core.reconstruct import refit


def problem(count: int, inputs: int = 12, classes: int = 5):
    """What a compressed network hands to its last layer, and what the dense one says: sure of most,
    through features of which half are gone."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 2 * inputs, generator=generator)
    truth = torch.randn(classes, 2 * inputs, generator=generator)
    return features[:, None, :inputs], 2 * features @ truth.T, truth[:, :inputs]


def kl(dense_PO: torch.Tensor, found_PO: torch.Tensor) -> float:
    return float(
        F.kl_div(
            found_PO.log_softmax(1), dense_PO.log_softmax(1), reduction="batchmean", log_target=True
        )
    )


def said(fit, patch_PGD: torch.Tensor) -> torch.Tensor:
    return patch_PGD[:, 0] @ fit.weight.T + fit.mean_O - fit.mean_outputs(fit.weight)


def test_it_says_what_the_dense_network_says_better_than_least_squares_do():
    patch, logits, weight = problem(4000)
    fitted, unseen = slice(0, 2000), slice(2000, None)
    squares = refit(patch[fitted], logits[fitted], weight)
    ours = refit(patch[fitted], logits[fitted], weight, logits=True)
    assert kl(logits[unseen], said(ours, patch[unseen])) < 0.95 * kl(
        logits[unseen], said(squares, patch[unseen])
    )


def test_what_can_be_said_exactly_is_left_alone():
    patch, _, _ = problem(500)
    truth = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    logits = patch[:, 0] @ truth.T + 1
    fit = refit(patch, logits, torch.zeros(5, 12), (1e-6,), logits=True)
    assert kl(logits, said(fit, patch)) < 1e-5
    assert torch.allclose(fit.weight, truth, atol=1e-2)


@pytest.mark.parametrize("count", [3, 12])
def test_fewer_positions_than_inputs_are_left_to_the_regression(count):
    patch, logits, weight = problem(count)
    sample = Sample.of(patch, logits)
    assert refit_logits(sample, logits, weight.T[None], 0.1) is None
    fit = refit(patch, logits, weight, logits=True)
    assert torch.equal(fit.weight, refit(patch, logits, weight).weight)
