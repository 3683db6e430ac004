"""What the backward passes of training say is what the definitions say."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from rlcompress.core.average import Average
from rlcompress.core.calls import as_call
from rlcompress.core.signals import Signals
from rlcompress.core.structure import build_network


def test_an_average_is_the_mean_until_it_is_full():
    average = Average()
    for value in (1.0, 2.0, 6.0):
        average.add("x", torch.tensor(value), decay=0.9)
    assert float(average.values["x"]) == pytest.approx(3.0)
    for _ in range(200):
        average.add("x", torch.tensor(5.0), decay=0.9)
    assert float(average.values["x"]) == pytest.approx(5.0, rel=1e-3)


def test_importance_is_the_taylor_term_of_single_images():
    """Against the derivative by a factor on each channel of each image, by autograd."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
    model = nn.Sequential(first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = build_network(model, torch.zeros(1, 1, 8, 8))
    signals = Signals(model, network, (1.0, 0.4), (4,))
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    signals.listening = True
    loss = F.cross_entropy(model.train()(x), labels)
    loss.backward()
    signals.read(loss)

    hidden = torch.tanh(first(x)).detach()
    factor = torch.zeros(6, 5, 1, 1, requires_grad=True)
    moved = hidden + factor * (hidden - hidden.mean((0, 2, 3), keepdim=True))
    losses = F.cross_entropy(model[2:](moved), labels, reduction="sum")
    (derivative,) = torch.autograd.grad(losses, factor)
    wanted = 0.5 * derivative.flatten(1).square().mean(0)
    (group,) = (g for g in network.groups.values() if not g.protected)
    assert torch.allclose(torch.from_numpy(signals.importance()[group.name]).float(), wanted)


def test_live_estimates_rank_as_those_of_a_trained_network_do(trained, data, estimates):
    """Training at a rate of zero: what `estimate` finds with softened predictions and more
    backward passes, the signals find in some ordinary minibatches."""
    model = copy.deepcopy(trained.model).train()
    signals = Signals(model, trained.network, estimates.keeps, estimates.bits)
    signals.listening = True
    for step in range(24):
        if step == 8:
            signals.wanted.update(trained.network.layers)
        index = torch.arange(32 * step, 32 * (step + 1)) % len(data.train)
        model.zero_grad()
        loss = F.cross_entropy(model(data.train.images(index)), data.train.labels_N[index])
        loss.backward()
        signals.read(loss)
        if step == 8:
            signals.settle()
    live = signals.estimates()

    def pooled(table) -> np.ndarray:
        return np.concatenate([table[name] for name in sorted(table)])

    for kind, least in (("quantize", 0.9), ("prune_solved", 0.6)):
        a, b = pooled(getattr(estimates, kind)), pooled(getattr(live, kind))
        both = (a > 0) & (b > 0)
        assert spearmanr(a[both], b[both])[0] > least, kind
    for name, cost_K in live.prune.items():
        assert (live.prune_solved[name] <= cost_K).all()
    signals.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def minibatches(trained, data, change, *, scale: float = 1.0) -> Signals:
    """Some with the loss scaled; `change` gets the model before each is read."""
    model = copy.deepcopy(trained.model).train()
    signals = Signals(model, trained.network, (1.0, 0.4), (4,))
    signals.listening = True
    for step in range(6):
        if step == 3:
            signals.wanted.update(trained.network.layers)
        index = torch.arange(16 * step, 16 * (step + 1))
        model.zero_grad()
        loss = F.cross_entropy(model(data.train.images(index)), data.train.labels_N[index])
        (scale * loss).backward()
        change(model)
        signals.read(loss)
        if step == 3:
            signals.settle()
    return signals


def tables(signals: Signals) -> tuple[np.ndarray, np.ndarray]:
    found = signals.estimates()
    return tuple(np.concatenate([*table.values()]) for table in (found.prune, found.quantize))


def test_a_scaled_loss_is_no_other_loss(trained, data):
    def unscale(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad /= 2.0**16

    plain = tables(minibatches(trained, data, lambda model: None))
    scaled = tables(minibatches(trained, data, unscale, scale=2.0**16))
    for a, b in zip(plain, scaled, strict=True):
        assert np.allclose(a, b, rtol=1e-3)


def test_clipped_gradients_change_cuts_and_bits_alike(trained, data):
    def shrink(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad *= 0.1

    plain = tables(minibatches(trained, data, lambda model: None))
    clipped = tables(minibatches(trained, data, shrink))
    for a, b in zip(plain, clipped, strict=True):
        assert np.allclose(0.01 * a, b, rtol=1e-3)


def test_gradients_that_overflowed_are_passed_over(trained, data):
    seen = []

    def overflow(model: nn.Module) -> None:
        seen.append(model)
        if len(seen) == 2:
            model.features[0].weight.grad.fill_(torch.inf)

    signals = minibatches(trained, data, overflow)
    assert all(bool(value.isfinite().all()) for value in signals.average.values.values())
    assert all(np.isfinite(table).all() for table in tables(signals))


def test_a_minibatch_is_let_go(trained, data):
    """What the backward pass was looked at through must not outlive it."""
    model = copy.deepcopy(trained.model).train()
    signals = Signals(model, trained.network, (1.0, 0.4), (4,))
    signals.listening = True
    seen = []
    hook = model.features[3].register_forward_pre_hook(
        lambda module, args: seen.append(weakref.ref(args[0]))
    )
    for step in range(2):
        images = data.train.images(slice(16 * step, 16 * (step + 1)))
        loss = F.cross_entropy(model(images), data.train.labels_N[16 * step : 16 * (step + 1)])
        loss.backward()
        signals.read(loss)
    hook.remove()
    del loss
    assert seen
    assert all(reference() is None for reference in seen)


@pytest.mark.parametrize("sizes", [(16, 16), (8, 24), (24, 8), (8,) * 4])
def test_gradients_that_are_accumulated_say_what_those_of_a_minibatch_do(sizes):
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
    model = nn.Sequential(first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = build_network(model, torch.zeros(1, 1, 8, 8))
    x, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 3

    def found(parts):
        signals = Signals(model.train(), network, (1.0, 0.4), (4,))
        for step in range(3):
            signals.listening = True
            model.zero_grad()
            signals.wanted.update(network.layers if step == 0 else ())
            for images, wanted in zip(x.split(parts), labels.split(parts), strict=True):
                (F.cross_entropy(model(images), wanted, reduction="sum") / 32).backward()
            signals.read(1.0)
            if step == 0:
                signals.settle()
        signals.close()
        return signals.estimates(), signals.average.values

    (once, values), (parted, theirs) = found([32]), found(list(sizes))
    for name in network.layers:
        assert torch.allclose(values[f"fisher/{name}"], theirs[f"fisher/{name}"], rtol=1e-3)
    tables = "importance", "prune", "prune_solved"
    for said, wanted in ((getattr(parted, t), getattr(once, t)) for t in tables):
        for name, group in network.groups.items():
            if not group.protected:
                assert said[name].sum() == pytest.approx(wanted[name].sum(), rel=0.3)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_call_pads_as_its_module_does(mode):
    torch.manual_seed(0)
    module, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), torch.randn(2, 2, 5, 6)
    assert torch.allclose(as_call("", module, x).run(), module(x), atol=1e-6)
