"""Closed-form refits against least squares, and patches against convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core import moments
from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.positions import patches, sample_positions, spread_rows
from rlcompress.core.quant import fake_quantize, layer_outputs, scale_of
from rlcompress.core.reconstruct import refit


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


@given(
    images=st.integers(1, 40),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    count=st.integers(1, 400),
)
@settings(max_examples=60)
def test_rows_for_statistics_come_from_all_over_an_image(images, height, width, count):
    positions = height * width
    place = torch.arange(positions).float().view(1, 1, height, width).expand(images, 1, -1, -1)
    rows = spread_rows(place, count)
    assert len({*rows.flatten().tolist()}) == min(len(rows), positions)


def all_positions(monkeypatch) -> None:
    """No position held out: the one ridge given is taken."""
    monkeypatch.setattr(moments, "HELD_OUT", 10**9)


@given(count=st.integers(2, 40), inputs=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_refit_is_the_ridge_regression_whichever_system_is_smaller(
    monkeypatch, count, inputs, seed
):
    all_positions(monkeypatch)
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
    assert torch.allclose(refit(x, y, weight, (0.01,)).weight.double(), wanted, atol=1e-3)


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
    found = refit(patch, targets, torch.zeros_like(truth), (1e-9,))
    assert torch.allclose(found.weight, truth, atol=1e-2)
    assert torch.allclose(found.mean_outputs(truth), (targets - 7).mean(0), atol=1e-3)


def error(patch: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> float:
    residue = targets - layer_outputs(patch, weight)
    return float((residue - residue.mean(0)).square().sum())


def test_refit_never_fits_worse_than_the_weights_it_starts_from():
    patch, weight, targets = torch.randn(50, 2, 6).relu(), torch.randn(4, 6), torch.randn(50, 4)
    assert error(patch, targets, refit(patch, targets, weight).weight) < error(
        patch, targets, weight
    )


def test_weights_that_predict_unseen_positions_best_stay():
    """More inputs than the sample can tell apart, and targets that the old weights explain."""
    patch, weight = torch.randn(40, 1, 30), torch.randn(4, 30)
    targets = layer_outputs(patch, weight) + 0.5 * torch.randn(40, 4)
    assert torch.equal(refit(patch, targets, weight, (1e-6,)).weight, weight)


def test_the_ridge_follows_the_noise():
    patch, truth = torch.randn(400, 1, 30), torch.randn(4, 30)
    clear, old = layer_outputs(patch, truth), torch.zeros(4, 30)
    loud = clear + 30 * torch.randn(400, 4)
    for targets, wanted in ((clear, 0.01), (loud, 1.0)):
        chosen = refit(patch, targets, old, (1.0, 0.01)).weight
        assert torch.allclose(chosen, refit(patch, targets, old, (wanted,)).weight, atol=1e-5)


def test_directions_without_inputs_keep_their_weights():
    patch, weight = torch.randn(100, 1, 6), torch.randn(4, 6)
    patch[..., 2] = 0.0
    targets = layer_outputs(patch, torch.randn(4, 6))
    found = refit(patch, targets, weight).weight
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
@pytest.mark.parametrize("bits", [2, 4])
def test_singular_inputs_give_finite_weights(patch, bits):
    found = refit(patch, torch.randn(len(patch), 4), torch.randn(4, 6))
    assert bool(torch.isfinite(found.weight).all())
    scale = scale_of(found.weight, 1.0, bits)
    assert bool(torch.isfinite(found.quantize(torch.arange(4), scale, bits)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_inputs_leave_the_weights_alone(bad):
    patch, weight = torch.randn(20, 1, 6), torch.randn(4, 6)
    patch[3, 0, 1] = bad
    found = refit(patch, torch.randn(20, 4), weight)
    assert torch.equal(found.weight, weight)
    assert not bool(found.ridge_G.any())


def test_a_broken_group_leaves_the_others_their_refit():
    patch, weight = torch.randn(200, 2, 6), torch.randn(4, 6)
    targets = torch.randn(200, 4)
    whole = refit(patch, targets, weight, (0.1,))
    broken = targets.clone()
    broken[3, 0] = float("nan")  # of the first group
    found = refit(patch, broken, weight, (0.1,))
    assert torch.equal(found.weight[:2], weight[:2])
    assert torch.allclose(found.weight[2:], whole.weight[2:], atol=1e-6)
    assert found.ridge_G.tolist()[0] == 0


def test_refit_keeps_a_convolutions_shape():
    weight = torch.randn(8, 2, 3, 3)
    found = refit(torch.randn(90, 2, 18), torch.randn(90, 8), weight)
    assert found.weight.shape == weight.shape
    out = torch.arange(8)
    assert found.quantize(out, scale_of(weight, 1.0, 4), 4).shape == weight.shape


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(1, 40, 8), (8, 9, 1), (2, 30, 3)])
def test_rounding_with_regard_to_the_inputs_beats_rounding_alone(groups, inputs, outputs, bits):
    """Inputs that go together, as a layer's do: what one weight's rounding adds, others undo."""
    mix = torch.randn(groups, inputs, inputs) * torch.linspace(2, 0.1, inputs)
    patch = torch.einsum("pgd,gde->pge", torch.randn(500, groups, inputs), mix)
    weight = torch.randn(groups * outputs, inputs)
    fit = refit(patch, layer_outputs(patch, weight), weight)
    scale = scale_of(weight, 0.8, bits)
    every = torch.arange(len(weight))
    rounded = fit.quantize(every, scale, bits)
    alone = fake_quantize(weight, scale, bits)
    targets = layer_outputs(patch, weight)
    assert error(patch, targets, rounded) < 0.9 * error(patch, targets, alone)
    # On the grid: writing the weights as codes changes nothing.
    assert torch.allclose(fake_quantize(rounded, scale, bits), rounded, atol=1e-6)


def test_some_outputs_are_rounded_as_all_of_them_are():
    patch, weight = torch.randn(100, 1, 12).relu(), torch.randn(6, 12)
    fit = refit(patch, torch.randn(100, 6), weight)
    scale, some = scale_of(fit.weight, 1.0, 3), torch.tensor([0, 3, 5])
    whole = fit.quantize(torch.arange(6), scale, 3)
    assert torch.allclose(fit.quantize(some, scale[some], 3), whole[some], atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_scales_fit_the_weights_that_the_refit_left(groups, bits):
    """Of few bits, which hang on them: less squared error in outputs of uncorrelated inputs."""
    patch = torch.randn(400, groups, 30 // groups) * torch.linspace(3, 0.3, 30 // groups)
    fit = refit(patch, torch.randn(400, 8), torch.randn(8, 30 // groups))
    every, clip = torch.arange(8), torch.full((8,), 0.9)
    first, ours = scale_of(fit.weight, clip, bits), fit.scale(every, clip, bits)

    def lost(scale: torch.Tensor) -> torch.Tensor:
        left = (fake_quantize(fit.weight, scale, bits) - fit.weight).view(groups, 8 // groups, -1)
        return (left.square() * fit.energy_GD[:, None]).sum(2).flatten()

    assert bool((lost(ours) <= lost(first) * (1 + 1e-5)).all())
    if bits <= 2:
        assert float(lost(ours).sum()) < 0.8 * float(lost(first).sum())
    some = torch.tensor([1, 6])
    if groups == 1:
        assert torch.equal(fit.scale(some, clip[some], bits), ours[some])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
def test_a_group_that_cannot_be_refitted_keeps_no_other_from_it(value):
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    x = torch.randn(8, 6, 6, 6)
    with torch.no_grad():
        call, y = capture(layer, x)
        weight = layer.weight + 0.3 * torch.randn_like(layer.weight)
        at = sample_positions(call, y.shape, len(y), 256, torch.Generator().manual_seed(0))
        patches_PGD = patches(call, at, 6)
        wanted = refit(patches_PGD, at.outputs(y), weight)
        patches_PGD[0, 5, 0] = value
        found = refit(patches_PGD, at.outputs(y), weight)
    assert torch.equal(found.ridge_G[:5], wanted.ridge_G[:5])
    assert torch.allclose(found.weight[:5], wanted.weight[:5])
    assert torch.equal(found.weight[5], weight[5])
    codes = found.quantize(torch.arange(6), torch.full((6,), 0.1), 4)
    assert codes[:5].isfinite().all()
