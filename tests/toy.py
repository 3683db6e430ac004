"""A network so small that all of its schedules can be measured: the known optimum."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import digits
from rlcompress.core.problem import Bundle, Problem, make_bundle
from rlcompress.core.schedule import Measurement, Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.squeeze import Pace
from rlcompress.core.structure import build_network
from rlcompress.core.train import Recipe, train
from rlcompress.core.training import Images, Training

KEEPS = (1.0, 0.6, 0.3)
BITS = (2, 4, 8)


def toy_network(num_classes: int = 10, in_channels: int = 1, dropout: float = 0.0) -> nn.Module:
    """Three convolutions and a head."""
    widths = (8, 12, 16)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((in_channels, *widths)):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    flat = nn.Sequential(nn.Flatten(), nn.Dropout(dropout)) if dropout else nn.Flatten()
    layers += [nn.AdaptiveAvgPool2d(1), flat, nn.Linear(widths[-1], num_classes)]
    return nn.Sequential(*layers)


def toy_bundle(recovery: str = "reconstruct", *, epochs: int = 8, seed: int = 0) -> Bundle:
    """The toy trained on real digits, ready to be searched."""
    data = digits(size=16)
    ref = ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
    model = ref.build(seed)
    train(model, data.train, Recipe(epochs, batch_size=32, lr=0.1), seed=seed)
    score, _, _ = data.validation_parts(128, 0, seed)
    fit = data.train.sample(128, seed)
    network = build_network(model, ref.example())
    estimates = estimate(model, network, fit.images(), keeps=KEEPS, bits=BITS, seed=seed)
    return make_bundle(model, ref, network, fit, score, estimates, recovery=recovery, positions=512)


def toy_training(pace: Pace, *, final_steps: int = 5, seed: int = 0) -> Training:
    """Episodes that begin at the toy after two epochs on real digits."""
    data = digits(size=16)
    ref = ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
    model = ref.build(seed)
    train(model, data.train, Recipe(2, batch_size=32, lr=0.1), seed=seed)
    return Training(
        ref,
        build_network(model, ref.example()),
        {n: t.numpy() for n, t in model.state_dict().items()},
        Images.of(data.train),
        Images.of(data.validation),
        pace,
        final_steps=final_steps,
        batch_size=16,
        keeps=KEEPS,
        bits=BITS,
    )


def enumerate_schedules(problem: Problem) -> list[tuple[Schedule, Measurement]]:
    """Every schedule there is, measured."""
    groups, layers = list(problem.network.groups), list(problem.network.layers)
    everything = []
    for keep in itertools.product(problem.keeps, repeat=len(groups)):
        for bits in itertools.product(problem.bits, repeat=len(layers)):
            schedule = Schedule(
                dict(zip(groups, keep, strict=True)), dict(zip(layers, bits, strict=True))
            )
            everything.append((schedule, problem.evaluator.evaluate(schedule)))
    return everything


torch.set_num_threads(1)
