"""Closed-form refits against least squares, and patches against convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.quant import layer_outputs
from rlcompress.core.reconstruct import patches, refit, sample_positions


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def capture(module: nn.Module, x: torch.Tensor) -> tuple[Call, torch.Tensor]:
    """The one call of a layer, and what it puts out."""
    calls: list[Call] = []

    def handle(call: Call) -> torch.Tensor:
        calls.append(call)
        return call.run()

    with LayerCalls({"": module.weight}, handle):
        y = module(x)
    (call,) = calls
    return call, y


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    same = draw(st.booleans())
    ones = st.just((1, 1))
    return nn.Conv2d(
        4,
        8,
        kernel_size=draw(pair),
        stride=draw(ones if same else st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding="same" if same else draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
        bias=False,
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect"])),
    )


@given(conv=convolutions(), count=st.integers(1, 60), seed=st.integers(0, 2**16))
@settings(max_examples=60)
def test_patches_times_weights_are_the_convolution(conv, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 7, 8, generator=generator)
    with torch.no_grad():
        wanted = conv(x)
        call, y = capture(conv, x)
        at = sample_positions(call, y.shape, 2, count, generator)
        ours = layer_outputs(patches(call, at, conv.groups), conv.weight)
    assert torch.allclose(y, wanted, atol=1e-5)
    assert torch.allclose(ours, at.outputs(y), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6)])
def test_patches_of_a_linear_layer(shape):
    linear = nn.Linear(6, 4)
    call, y = capture(linear, torch.randn(shape))
    at = sample_positions(call, y.shape, 3, 100, torch.Generator())
    assert len(at.n_P) == y[:3].numel() // 4
    ours = layer_outputs(patches(call, at, 1), linear.weight) + linear.bias
    assert torch.allclose(ours, at.outputs(y), atol=1e-5)
    assert torch.allclose(at.outputs(y), y[:3].reshape(-1, 4))


def test_positions_are_distinct_and_of_the_first_images_only():
    call, y = capture(nn.Conv2d(1, 2, 1), torch.zeros(9, 1, 4, 5))
    at = sample_positions(call, y.shape, 3, 50, torch.Generator())
    places = set(zip(at.n_P.tolist(), at.row_P.tolist(), at.col_P.tolist(), strict=True))
    assert len(places) == 50
    assert int(at.n_P.max()) < 3


@given(count=st.integers(2, 40), inputs=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_refit_is_the_ridge_regression_whichever_system_is_smaller(count, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, inputs, generator=generator)
    y = torch.randn(count, 3, generator=generator)
    weight = torch.randn(3, inputs, generator=generator)
    a, b = (x[:, 0] - x[:, 0].mean(0)).double(), (y - y.mean(0)).double()
    gram = a.T @ a
    r = 0.01 * gram.diagonal().mean()
    wanted = torch.linalg.solve(
        gram + (r + 1e-8) * torch.eye(inputs, dtype=torch.double), a.T @ b + r * weight.double().T
    ).T
    assert torch.allclose(refit(x, y, weight).double(), wanted, atol=1e-3)


@given(
    groups=st.sampled_from([1, 2, 4]),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_refit_finds_the_weights_behind_the_targets(groups, inputs, outputs, seed):
    """Grouped and (one output, one group a channel) depthwise layers too; means are free."""
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(200, groups, inputs, generator=generator) + 3
    truth = torch.randn(groups * outputs, inputs, generator=generator)
    targets = layer_outputs(patch, truth) + 7
    found = refit(patch, targets, torch.zeros_like(truth), ridge=1e-9)
    assert torch.allclose(found, truth, atol=1e-2)


def test_refit_is_least_squares_where_targets_are_noisy():
    patch, targets = torch.randn(300, 1, 5), torch.randn(300, 4)
    x, y = patch[:, 0] - patch[:, 0].mean(0), targets - targets.mean(0)
    wanted = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(refit(patch, targets, torch.zeros(4, 5), 1e-9), wanted, atol=1e-4)


def test_refit_never_fits_worse_than_the_weights_it_starts_from():
    patch, weight = torch.randn(50, 2, 6).relu(), torch.randn(4, 6)
    targets = torch.randn(50, 4)

    def error(w):
        residue = targets - layer_outputs(patch, w)
        return float((residue - residue.mean(0)).square().sum())

    assert error(refit(patch, targets, weight)) < error(weight)


def test_a_large_ridge_keeps_the_old_weights():
    patch, weight = torch.randn(50, 1, 6), torch.randn(4, 6)
    assert torch.allclose(refit(patch, torch.randn(50, 4), weight, ridge=1e6), weight, atol=1e-3)


def test_directions_without_inputs_keep_their_weights():
    patch, weight = torch.randn(100, 1, 6), torch.randn(4, 6)
    patch[..., 2] = 0.0
    found = refit(patch, torch.randn(100, 4), weight)
    assert torch.allclose(found[:, 2], weight[:, 2], atol=1e-5)
    assert not torch.allclose(found[:, 0], weight[:, 0], atol=1e-2)


@pytest.mark.parametrize(
    "patch",
    [
        torch.zeros(20, 1, 6),
        torch.ones(20, 1, 6),
        torch.randn(2, 1, 6),
        torch.randn(20, 1, 1).expand(20, 1, 6),
    ],
    ids=["dead", "constant", "too few", "all equal"],
)
def test_singular_inputs_give_finite_weights(patch):
    found = refit(patch, torch.randn(len(patch), 4), torch.randn(4, 6))
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_inputs_leave_the_weights_alone(bad):
    patch, weight = torch.randn(20, 1, 6), torch.randn(4, 6)
    patch[3, 0, 1] = bad
    assert torch.equal(refit(patch, torch.randn(20, 4), weight), weight)


def test_refit_keeps_a_convolutions_shape():
    weight = torch.randn(8, 2, 3, 3)
    assert refit(torch.randn(90, 2, 18), torch.randn(90, 8), weight).shape == weight.shape
