"""What the library is lent, it gives back as it was."""

from __future__ import annotations

import torch
from torch import nn

from rlcompress.core import build_evaluator, build_network, estimate, fitted_network

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def test_a_frozen_network_stays_frozen():
    model = small().requires_grad_(False)
    network = build_network(model, IMAGES[:1])
    estimates = estimate(model, network, IMAGES[:16], keeps=(0.5, 1.0), bits=(4,))
    for recovery in ("reconstruct", "steps:2"):
        parts = (IMAGES[:16], IMAGES[16:], None, estimates)
        evaluator = build_evaluator(model, network, *parts, recovery=recovery)
        schedule = network.uniform(0.5, 4)
        fitted = fitted_network(model, evaluator, schedule).model
        for one in (model, fitted):
            assert not any(parameter.requires_grad for parameter in one.parameters())
