"""Tickets: the surviving subnetwork, retrained per the Lottery Ticket Hypothesis.

Frankle & Carbin (2019); rewinding to an early iteration k: Frankle et al. (2020). The same
schedule, kept channels, data order and steps in every arm:

    rewind         weights of the dense network after k epochs, cut, then trained
    fresh          a new initialisation, cut, then trained: the control
    finetuned      the reconstructed network, then trained
    reconstructed  the evaluator's closed-form fit, no training

Each arm is written as a packed artifact and measured as read back from the disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact, pack, snap, write_artifact
from rlcompress.core.data import Split
from rlcompress.core.evaluate import Evaluator, FittedLayer
from rlcompress.core.graph import Network
from rlcompress.core.prune import cut
from rlcompress.core.quant import (
    attach_fake_quant,
    float_weight,
    learned_scales,
    mse_clip,
    scale_of,
)
from rlcompress.core.schedule import FULL_PRECISION, Schedule
from rlcompress.core.train import Recipe, train

ARMS = ("reconstructed", "finetuned", "rewind", "fresh")


@dataclass
class CutNetwork:
    """A cut network with float weights, and the scale_O of each quantized layer."""

    model: nn.Module
    scales: dict[str, torch.Tensor]


def fitted_network(model: nn.Module, evaluator: Evaluator, schedule: Schedule) -> CutNetwork:
    """What the evaluator scored, as a network: refitted weights and batch statistics."""
    fitted = evaluator.run(schedule, collect=True).fitted
    small = cut(model, evaluator.network, evaluator.kept(schedule))
    modules = dict(small.named_modules())
    scales = {}
    with torch.no_grad():
        for name, layer in evaluator.network.layers.items():
            part: FittedLayer = fitted[name]
            module = modules[name]
            module.weight.copy_(part.weight)  # type: ignore[union-attr, operator]
            if part.bias is not None:
                module.bias.copy_(part.bias)  # type: ignore[union-attr, operator]
            if part.scale_O is not None:
                scales[name] = part.scale_O.clone()
            if layer.batch_norm:
                norm = modules[layer.batch_norm]
                assert isinstance(norm, nn.BatchNorm2d)
                assert norm.running_mean is not None
                assert norm.running_var is not None
                assert part.mean_O is not None
                assert part.variance_O is not None
                norm.running_mean.copy_(part.mean_O)
                norm.running_var.copy_(part.variance_O)
    return CutNetwork(small, scales)


def cut_network(
    model: nn.Module, network: Network, kept: Mapping[str, np.ndarray], schedule: Schedule
) -> CutNetwork:
    """`model` cut, with the scales of least squared weight error."""
    small = cut(model, network, kept)
    modules = dict(small.named_modules())
    scales = {}
    for name in network.layers:
        bits = schedule.width(name)
        if bits != FULL_PRECISION:
            weight = modules[name].weight.detach()
            scales[name] = scale_of(weight, mse_clip(weight, bits), bits)
    return CutNetwork(small, scales)


def retrain(
    start: CutNetwork,
    network: Network,
    schedule: Schedule,
    data: Split,
    recipe: Recipe,
    *,
    seed: int,
    teacher: nn.Module,
    validation: Split,
    checkpoint: Path | None = None,
    key: str = "",
    on_epoch: Callable[[int, dict[str, Any]], None] = lambda epoch, row: None,
) -> tuple[CutNetwork, list[dict[str, Any]]]:
    """Quantization-aware training from `start`, which stays as it was; and the curve."""
    model = copy.deepcopy(start.model)
    bits = {name: schedule.width(name) for name in network.layers}
    attach_fake_quant(model, network, bits, start.scales)
    curve = train(
        model,
        data,
        recipe,
        seed=seed,
        validation=validation,
        teacher=teacher,
        checkpoint=checkpoint,
        key=key,
        on_epoch=on_epoch,
    )
    scales = {**start.scales, **learned_scales(model)}
    plain = copy.deepcopy(start.model)
    trained = dict(model.named_modules())
    with torch.no_grad():
        state = {n: t for n, t in model.state_dict().items() if "parametrizations" not in n}
        plain.load_state_dict(state, strict=False)
        for name, module in plain.named_modules():
            if name in network.layers:
                module.weight.copy_(float_weight(trained[name]))
    return CutNetwork(plain.eval(), scales), curve


def write_network(
    path: Path, small: CutNetwork, network: Network, ref: ModelRef, schedule: Schedule
) -> None:
    """Writes the packed artifact. `small` is rounded to what the file can hold, in place."""
    bits = {name: schedule.width(name) for name in network.layers}
    small.model.to("cpu")
    scales = {name: scale.cpu() for name, scale in small.scales.items()}
    small.scales = snap(small.model, network, bits, scales)
    counts = network.counts(schedule)
    write_artifact(path, pack(small.model, network, ref, counts, bits, small.scales))


@dataclass(frozen=True)
class Arm:
    name: str
    model: nn.Module  # read back from the disk
    curve: list[dict[str, Any]]


def play_arms(
    folder: Path,
    schedule: Schedule,
    evaluator: Evaluator,
    ref: ModelRef,
    dense: nn.Module,
    rewind: nn.Module,
    data: Split,
    validation: Split,
    recipe: Recipe,
    *,
    seed: int,
    key: str = "",
    on_epoch: Callable[[str, int, dict[str, Any]], None] = lambda arm, epoch, row: None,
) -> Iterator[Arm]:
    """Plays every arm of a ticket; `folder/<arm>.safetensors` is its artifact.

    dense, rewind  the trained network and the one after k epochs;  evaluator  fits the
    reconstruction;  seed  data order and, plus one, the fresh initialisation
    """
    network, device = evaluator.network, next(dense.parameters()).device
    kept = evaluator.kept(schedule)
    fresh = ref.build(seed + 1).to(device)
    reconstructed = fitted_network(dense, evaluator, schedule)
    starts = {
        "reconstructed": lambda: reconstructed,
        "finetuned": lambda: reconstructed,
        "rewind": lambda: cut_network(rewind, network, kept, schedule),
        "fresh": lambda: cut_network(fresh, network, kept, schedule),
    }
    for name in ("finetuned", "rewind", "fresh", "reconstructed"):
        small = starts[name]()
        curve: list[dict[str, Any]] = []
        if name != "reconstructed":
            small, curve = retrain(
                small,
                network,
                schedule,
                data,
                recipe,
                seed=seed,
                teacher=dense,
                validation=validation,
                checkpoint=folder / f"{name}.checkpoint",
                key=f"{key}/{name}",
                on_epoch=lambda epoch, row, arm=name: on_epoch(arm, epoch, row),  # type: ignore[misc]
            )
        path = folder / f"{name}.safetensors"
        write_network(path, small, network, ref, schedule)
        yield Arm(name, load_artifact(path, trust=[ref.factory]), curve)
