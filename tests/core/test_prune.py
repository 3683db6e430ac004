"""A mask that pretends and a cut that is real compute the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.data import digits
from rlcompress.core.graph import kept_mask
from rlcompress.core.prune import attach_masks, cut, detach, kept_channels
from rlcompress.core.quant import attach_fake_quant
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network
from rlcompress.core.train import Recipe, train

seeds = st.integers(0, 2**16)


def first_channels(network, counts):
    """Group -> mask of its first `counts` channels."""
    return {n: np.arange(group.channels) < counts[n] for n, group in network.groups.items()}


class Joined(nn.Module):
    """Concatenation, a batch norm no layer absorbs, an activation with f(0) != 0, a flat map."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.three = nn.Conv2d(10, 5, 3, stride=2)
        self.head = nn.Linear(45, 7)

    def forward(self, x):
        x = torch.sigmoid(self.norm(torch.cat([self.one(x), self.two(x)], 1)))
        return self.head(torch.flatten(torch.sigmoid(self.three(x)), 1))


def masked(model, network, kept):
    copied = copy.deepcopy(model)
    attach_masks(copied, network, kept)
    return copied


@given(choice=st.data(), seed=seeds)
@settings(max_examples=10)
def test_masked_is_cut(net, close, choice, seed):
    kept = net.kept(choice.draw(net.schedules()), seed)
    small = cut(net.model, net.network, kept)
    close(net.out(masked(net.model, net.network, kept)), net.out(small))


@given(seed=seeds, counts=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5)))
@settings(max_examples=15)
def test_masked_is_cut_across_concatenation_free_norm_and_flatten(close, seed, counts):
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.train()(x)
    network = build_network(model, x[:1])
    importance = {n: torch.rand(g.channels).numpy() for n, g in network.groups.items()}
    kept = kept_channels(network, importance, dict(zip(network.groups, counts, strict=True)))
    close(masked(model, network, kept)(x), cut(model, network, kept)(x))


def test_the_cut_is_as_wide_as_the_masks_say_and_the_original_stays(net):
    before = copy.deepcopy(net.model.state_dict())
    kept = first_channels(net.network, dict.fromkeys(net.network.groups, 1))
    small = dict(cut(net.model, net.network, kept).named_modules())
    for name, layer in net.network.layers.items():
        assert small[name].weight.shape[0] == (1 if layer.group else layer.out_channels)
    for name, tensor in net.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_keeping_all_channels_changes_nothing(vgg):
    kept = first_channels(vgg.network, {n: g.channels for n, g in vgg.network.groups.items()})
    assert torch.equal(vgg.out(cut(vgg.model, vgg.network, kept)), vgg.out(vgg.model))
    assert torch.equal(vgg.out(masked(vgg.model, vgg.network, kept)), vgg.out(vgg.model))


def test_masked_weights_get_no_gradient_and_stay_behind_the_mask(vgg):
    kept = first_channels(vgg.network, {n: g.channels // 2 for n, g in vgg.network.groups.items()})
    model = masked(vgg.model, vgg.network, kept)
    model(vgg.images).square().sum().backward()
    behind = model.features[3].parametrizations.weight.original
    inside = torch.zeros_like(behind, dtype=torch.bool)
    inside[:2, :2] = True
    assert behind.grad[inside].abs().sum() > 0
    assert behind.grad[~inside].abs().sum() == 0
    assert torch.equal(behind, vgg.model.features[3].weight)


def test_training_under_masks_is_training_of_the_cut(net, close):
    """The same loss and the same network through the one training loop, for a few steps: then
    the rounding of two convolution sizes grows apart."""
    kept = first_channels(net.network, {n: g.channels // 2 for n, g in net.network.groups.items()})
    small, wide = cut(net.model, net.network, kept), masked(net.model, net.network, kept)
    for module in (*small.modules(), *wide.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would drop other channels in the wider network
    images = digits(net.ref.input_shape[-1]).train.sample(64, 0)
    recipe = Recipe(epochs=1, batch_size=16, lr=1e-3)
    before = net.out(small)
    one, two = (train(model, images, recipe, seed=0)[0]["loss"] for model in (small, wide))
    assert one == pytest.approx(two, rel=1e-3)
    moved = float((net.out(small) - before).abs().max())
    assert float((net.out(small) - net.out(wide)).abs().max()) < 0.05 * moved


def test_quantizers_under_masks_give_the_gradients_of_the_cut(vgg, close):
    kept = first_channels(vgg.network, {n: g.channels // 2 for n, g in vgg.network.groups.items()})
    schedule = Schedule({}, dict.fromkeys(vgg.network.layers, 4))
    small = cut(vgg.model, vgg.network, kept)
    bits, scales = vgg.quantized(small, schedule)
    wide, narrow = copy.deepcopy(vgg.model), copy.deepcopy(small)
    wide_scales = {}
    for name, layer in vgg.network.layers.items():
        out = kept_mask(layer.outputs, layer.out_channels, kept)
        wide_scales[name] = torch.ones(layer.out_channels)
        wide_scales[name][torch.from_numpy(out)] = scales[name]
    attach_fake_quant(wide, vgg.network, bits, wide_scales)
    attach_masks(wide, vgg.network, kept)
    attach_fake_quant(narrow, vgg.network, bits, scales)
    outputs = [model(vgg.images) for model in (wide, narrow)]
    close(outputs[0].detach(), outputs[1].detach())
    for output in outputs:
        output.square().sum().backward()
    one, two = (m.features[3].parametrizations.weight.original.grad for m in (wide, narrow))
    close(one[: two.shape[0], : two.shape[1]], two, 1e-2)
    assert two.abs().sum() > 0


def test_detach_leaves_what_the_masks_computed(vgg):
    kept = first_channels(vgg.network, dict.fromkeys(vgg.network.groups, 1))
    model = masked(vgg.model, vgg.network, kept)
    wanted = vgg.out(model)
    detach(model)
    assert set(model.state_dict()) == set(vgg.model.state_dict())
    assert torch.equal(vgg.out(model), wanted)


def test_kept_channels_takes_the_most_important_and_breaks_ties_low():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    network = build_network(model, torch.zeros(1, 1, 4, 4))
    ranked = kept_channels(network, {"0": np.array([1.0, 3.0, 2.0, 0.0])}, {"0": 2})
    assert ranked["0"].tolist() == [False, True, True, False]
    tied = kept_channels(network, {"0": np.ones(4)}, {"0": 3})
    assert tied["0"].tolist() == [True, True, True, False]


@pytest.mark.parametrize("count", [1, 3])
def test_cut_of_a_depthwise_chain_keeps_groups_equal_to_channels(count):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1)
    )
    network = build_network(model, torch.zeros(1, 1, 6, 6))
    small = cut(model, network, first_channels(network, {"0": count}))
    assert small[1].groups == small[1].in_channels == small[1].out_channels == count
