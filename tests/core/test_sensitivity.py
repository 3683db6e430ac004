"""Estimates: what they must be by construction, and that they rank what is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import FISHER_BATCH, Estimates, estimate
from rlcompress.core.structure import build_network

TABLES = (
    *("importance", "prune", "prune_solved"),
    *("quantize", "quantize_solved", "output_kl", "clip"),
)


def test_whole_groups_cost_nothing_and_deeper_cuts_something(estimates):
    for name in estimates.prune:
        assert estimates.prune[name][-1] == estimates.prune_solved[name][-1] == 0.0
    assert sum(estimates.prune.values())[0] > sum(estimates.prune.values())[-2] > 0


def test_refitting_never_costs_more(estimates):
    for name, plain in estimates.prune.items():
        assert (estimates.prune_solved[name] <= plain).all()
    assert sum(estimates.prune_solved.values())[0] < sum(estimates.prune.values())[0]


def test_more_bits_cost_less(estimates):
    for table in (estimates.quantize, estimates.output_kl):
        mean = np.mean([*table.values()], axis=0)
        assert mean.tolist() == sorted(mean, reverse=True)
        assert mean[-1] > 0


def test_shapes_are_the_networks(estimates, trained):
    for name, group in trained.network.groups.items():
        assert estimates.importance[name].shape == (group.channels,)
        assert (estimates.importance[name] >= 0).all()
    for name, layer in trained.network.layers.items():
        assert estimates.clip[name].shape == (len(estimates.bits), layer.out_channels)
        assert estimates.clip[name].min() > 0
        assert estimates.clip[name].max() <= 1
    assert torch.equal(
        estimates.clip_of("classifier", 3), torch.from_numpy(estimates.clip["classifier"][1])
    )


def test_saved_and_loaded_bit_for_bit(estimates, tmp_path):
    estimates.save(tmp_path / "estimates")
    back = Estimates.load(tmp_path / "estimates")
    assert (back.keeps, back.bits) == (estimates.keeps, estimates.bits)
    for table in TABLES:
        ours, theirs = getattr(estimates, table), getattr(back, table)
        assert {*ours} == {*theirs}
        for name, values in ours.items():
            assert theirs[name].dtype == values.dtype
            assert theirs[name].tobytes() == values.tobytes()


def test_same_seed_same_estimates_and_the_model_stays(trained, fit):
    before = {n: t.clone() for n, t in trained.model.state_dict().items()}
    gradients = [parameter.grad for parameter in trained.model.parameters()]
    first, second = (
        estimate(trained.model, trained.network, fit[:32], keeps=(0.5, 1.0), bits=(4,), seed=3)
        for _ in range(2)
    )
    assert all(np.array_equal(first.prune[g], second.prune[g]) for g in first.prune)
    assert all(np.array_equal(first.quantize[n], second.quantize[n]) for n in first.quantize)
    assert all(torch.equal(t, before[n]) for n, t in trained.model.state_dict().items())
    assert all(
        parameter.grad is gradient
        for parameter, gradient in zip(trained.model.parameters(), gradients, strict=True)
    )


def test_images_may_be_of_any_confidence(trained, fit):
    """A network that is sure of everything still has ranks (softened predictions)."""
    sure = estimate(trained.model, trained.network, 5 * fit[:32], keeps=(0.5, 1.0), bits=(2, 4))
    assert all(np.isfinite(v).all() and v[0] > 0 for v in sure.quantize.values())


@pytest.mark.parametrize("net", ["mobilenetv2", "resnet20"], indirect=True)
def test_depthwise_and_residual_networks_have_estimates(net, net_estimates):
    found = net_estimates
    assert all((found.importance[g] >= 0).all() for g in net.network.groups)
    assert all(v[0] > 0 and v[-1] == 0 for v in found.prune.values())
    assert all(v[0] > v[-1] for v in found.quantize.values())


def test_fisher_ranks_measured_quantization_losses(estimates, trained, make_evaluator):
    evaluator = make_evaluator(recovery="none")
    guessed, measured = [], []
    for name in trained.network.layers:
        for column in (0, 1, 2):
            guessed.append(estimates.quantize[name][column])
            measured.append(evaluator.evaluate(Schedule(bits={name: estimates.bits[column]})).kl)
    assert spearmanr(guessed, measured).statistic > 0.6


def test_direction_ranks_measured_cuts(estimates, trained, make_evaluator):
    evaluator = make_evaluator(recovery="bn")
    guessed, measured = [], []
    for name in trained.network.groups:
        for column in (1, 3):
            guessed.append(estimates.prune[name][column])
            measured.append(evaluator.evaluate(Schedule({name: estimates.keeps[column]})).kl)
    assert spearmanr(guessed, measured).statistic > 0.6


def test_no_image_is_looked_at_alone():
    """Channels count by how far they are from their mean: an image alone would not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    images = torch.zeros(FISHER_BATCH + 1, 1, 2, 2)
    images[-1] = 3.0
    network = build_network(model, images[:1])
    found = estimate(model, network, images, keeps=(1.0, 0.5), bits=(4,), batch=FISHER_BATCH)
    for name, group in network.groups.items():
        if not group.protected:
            assert found.importance[name].sum() > 0
            assert found.prune[name][1] > 0
