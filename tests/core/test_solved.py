"""Costs of choices whose neighbours are refitted: right where they are known, and telling of what
is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from rlcompress.core import solved
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network


def twins() -> nn.Module:
    """Each channel of the first two layers is there twice; what reads it hardly uses the copy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[4:] = layer.weight[:4]
            layer.bias[4:] = layer.bias[:4]
        model[3].weight[:, 4:] *= 0.1
        model[8].weight[:, 16:] *= 0.1
    return model.eval()


def test_a_twin_costs_nothing_once_its_reader_is_refitted():
    model, images = twins(), torch.randn(96, 1, 8, 8)
    network = build_network(model, images[:1], round_to=1)
    found = estimate(model, network, images, keeps=(0.25, 0.5, 1.0), bits=(2, 8))
    assert len(found.prune) == 2
    for name, plain_K in found.prune.items():
        assert {*np.argsort(-found.importance[name])[:4]} == {0, 1, 2, 3}
        assert found.prune_solved[name][1] < 0.01 * plain_K[1]
        assert found.prune_solved[name][0] > 0.05 * plain_K[0]
        assert found.prune_solved[name][2] == 0


@pytest.mark.parametrize("net", ["mobilenetv2", "resnet20"], indirect=True)
def test_held_in_parts_it_is_the_same(net, monkeypatch):
    images = net.images[:32]

    def found() -> tuple[np.ndarray, np.ndarray]:
        e = estimate(net.model, net.network, images, keeps=(0.5, 1.0), bits=(2, 4), positions=256)
        return tuple(
            np.concatenate([table[name] for name in sorted(table)])
            for table in (e.prune_solved, e.quantize_solved)
        )

    whole = found()
    monkeypatch.setattr(solved, "MOST_BYTES", 100_000)
    monkeypatch.setattr(solved, "UNFOLDED_BYTES", 100_000)
    for one, other in zip(whole, found(), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-9)
        assert (one > 0).any()


def test_it_tells_what_refitting_leaves(estimates, trained, make_evaluator):
    """What is measured of single choices, better than estimates that know of no refit: their sizes,
    and how cuts rank."""
    evaluator = make_evaluator(recovery="reconstruct")
    told: dict[str, list[float]] = {"solved": [], "plain": []}
    measured = []
    for name in trained.network.groups:
        for column in (1, 3):
            told["solved"].append(estimates.prune_solved[name][column])
            told["plain"].append(estimates.prune[name][column])
            measured.append(evaluator.evaluate(Schedule({name: estimates.keeps[column]})).kl)
    cuts = len(measured)
    for name in trained.network.layers:
        told["solved"].append(estimates.quantize_solved[name][0])
        told["plain"].append(estimates.quantize[name][0])
        measured.append(evaluator.evaluate(Schedule(bits={name: estimates.bits[0]})).kl)

    def wrong_by(kind: str) -> float:
        """Decades."""
        floored = [np.maximum(values, 1e-5) for values in (told[kind], measured)]
        return float(np.abs(np.log10(floored[0] / floored[1])).mean())

    ranks = {kind: spearmanr(v[:cuts], measured[:cuts]).statistic for kind, v in told.items()}
    assert wrong_by("solved") < wrong_by("plain") / 2
    assert ranks["solved"] > max(0.6, ranks["plain"])
