"""Scores schedules on calibration data.

A candidate is one forward pass in which each layer, as it is reached, is cut, refitted in closed
form to what the dense network puts out there, and quantized; batch norms are re-estimated as the
forward passes them (`recovery`). Layer t's input depends only on choices up to t, so the pass is
given step by step: `begin` -> `advance` once a layer -> `finish`.

This file holds what one layer's step is. `incremental` runs the pass a segment at a time over the
traced network, `whole` runs the model's own code again and again where that cannot be traced.

The batch holds F images that are fitted and, behind them, S images that are only scored; the
two never overlap. N = F + S.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.calls import Call, layer_weights
from rlcompress.core.cost import CostModel
from rlcompress.core.graph import Layer, LayerModule, Network, kept_mask
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import fake_quantize, layer_outputs, scale_of, unexplained
from rlcompress.core.reconstruct import Positions, patches, refit, sample_positions
from rlcompress.core.schedule import FULL_PRECISION, Measurement, Schedule
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.trace import TraceError

RECOVERIES = ("none", "bn", "reconstruct")

#: Nats.
WORST = 1e4


def _known(recovery: str) -> str:
    if recovery not in RECOVERIES:
        raise ValueError(f"recovery {recovery!r}; allowed: {', '.join(RECOVERIES)}")
    return recovery


@dataclass(frozen=True)
class FittedLayer:
    """A layer as the evaluator left it: cut and refitted floats, scales, and the statistics of
    the batch norm that it absorbs."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale_O: torch.Tensor | None
    mean_O: torch.Tensor | None = None
    variance_O: torch.Tensor | None = None


@dataclass
class Prefix:
    """A partly compressed network: the choices so far and what later layers need.

    live         activations (an incremental evaluator's own keys)
    unexplained  one number in [0, 1] a layer done: share of its outputs' variance that the
                 dense outputs keep to themselves (mean over surviving channels)
    fitted       what each layer became, where it was asked for;  norms  statistics (mean,
                 variance) of the batch norms that no layer absorbs
    """

    choices: tuple[tuple[float, int], ...]
    live: dict[Any, torch.Tensor]
    kept: dict[str, np.ndarray]
    unexplained: tuple[float, ...]
    fitted: dict[str, FittedLayer] = field(default_factory=dict)
    norms: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def nbytes(self) -> int:
        tensors = (t for t in self.live.values() if isinstance(t, torch.Tensor))
        storages = {t.untyped_storage().data_ptr(): t for t in tensors}
        return sum(t.untyped_storage().nbytes() for t in storages.values())


@dataclass(frozen=True)
class Step:
    """One layer done: what it puts out, its parameters, and its unexplained share."""

    y: torch.Tensor
    fitted: FittedLayer
    residue: float


class Evaluator(ABC):
    """Measures schedules of one network. `build_evaluator` makes the right one.

    model      the trained dense network;  network  its structure
    fit        images (F, C, H, W), unlabelled: batch norms and reconstruction
    score      images (S, C, H, W) that are never fitted;  labels (S,)
    estimates  which channels matter and where to clip
    recovery   "none", "bn" (batch norms re-estimated) or "reconstruct" (and layers refitted)
    positions  sampled output positions a layer for the refit
    """

    #: Why evaluations run the whole network each time; empty if they need not.
    slow: str = ""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        fit: torch.Tensor,
        score: torch.Tensor,
        labels: torch.Tensor,
        estimates: Estimates,
        *,
        recovery: str = "reconstruct",
        positions: int = 2048,
        seed: int = 0,
    ) -> None:
        self.network, self.estimates, self.recovery = network, estimates, _known(recovery)
        self.costs = CostModel(network)
        self.layers = list(network.layers.values())
        self.fit_count, self._count = len(fit), len(fit) + len(score)
        self._labels = labels
        self._dense = dict(model.named_modules())
        self._weights = {n: w for n, w in layer_weights(model).items() if n in network.layers}
        self._order = {
            name: np.argsort(-estimates.importance[name], kind="stable") for name in network.groups
        }
        self._batch = torch.cat([fit, score]).contiguous(memory_format=torch.channels_last)
        self._positions_wanted = positions
        self._generator = torch.Generator().manual_seed(seed)
        self._targets: dict[str, tuple[Positions, torch.Tensor]] = {}

    def with_recovery(self, recovery: str) -> Self:
        """An evaluator of the same network, images and sampled positions after another recovery.
        Shares the tensors; prefixes of one are not for the other."""
        other = copy.copy(self)
        other.recovery = _known(recovery)
        return other

    # --- the pass ----------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> Prefix:
        """Nothing decided yet."""

    @abstractmethod
    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
        """Decides the next layer: its group's `keep`, where this layer owns the group (else it
        is ignored), and its weight `bits`. Returns a new prefix; `prefix` stays valid.

        `collect` gathers what each layer became in `Prefix.fitted`, for `ticket.fitted_network`.
        """

    @abstractmethod
    def finish(self, prefix: Prefix) -> Measurement:
        """The measurement of a prefix in which every layer is decided."""

    def run(self, schedule: Schedule, *, collect: bool = False) -> Prefix:
        """Every layer decided as `schedule` says."""
        self.network.validate(schedule)
        prefix = self.begin()
        for keep, bits in self.choices(schedule):
            prefix = self.advance(prefix, keep, bits, collect=collect)
        return prefix

    def evaluate(self, schedule: Schedule) -> Measurement:
        """Measures one schedule: one forward pass of the calibration images at most."""
        return self.finish(self.run(schedule))

    # --- choices -----------------------------------------------------------------------------

    def choices(self, schedule: Schedule) -> tuple[tuple[float, int], ...]:
        """(keep, bits) of each layer, in order."""
        chosen = []
        for layer in self.layers:
            group = self.network.owned_group(layer.name)
            chosen.append(
                (schedule.ratio(group.name) if group else 1.0, schedule.width(layer.name))
            )
        return tuple(chosen)

    def schedule(self, prefix: Prefix) -> Schedule:
        """The schedule that a finished prefix's choices say."""
        keep, bits = {}, {}
        for layer, (ratio, width) in zip(self.layers, prefix.choices, strict=True):
            if group := self.network.owned_group(layer.name):
                keep[group.name] = ratio
            bits[layer.name] = width
        return Schedule(keep, bits)

    def kept(self, schedule: Schedule) -> dict[str, np.ndarray]:
        """Group -> mask of the channels that survive."""
        counts = self.network.counts(schedule)
        return kept_channels(self.network, self.estimates.importance, counts)

    def _kept_by(self, layer: Layer, keep: float) -> dict[str, np.ndarray]:
        """The mask that this layer's choice decides, if it decides one."""
        group = self.network.owned_group(layer.name)
        if group is None:
            return {}
        mask = np.zeros(group.channels, dtype=bool)
        mask[self._order[group.name][: group.count(keep)]] = True
        return {group.name: mask}

    # --- one layer ---------------------------------------------------------------------------

    def _lead(self, entries: int) -> int:
        """How many of a tensor's first `entries` come from images that are fitted (attention
        folds windows of an image into the first dimension); 0 if one cannot tell."""
        return entries * self.fit_count // self._count if entries % self._count == 0 else 0

    def _aim(self, call: Call, y: torch.Tensor) -> None:
        """Remembers what the dense network puts out at sampled positions."""
        lead = self._lead(len(y))
        at = sample_positions(call, y.shape, lead, self._positions_wanted, self._generator)
        self._targets[call.name] = (at, at.outputs(y).clone())

    def _step(
        self, layer: Layer, call: Call, kept: Mapping[str, np.ndarray], bits: int, untouched: bool
    ) -> Step:
        """Cuts, refits and quantizes one layer and applies it to its input."""
        module = self._dense[layer.name]
        assert isinstance(module, LayerModule)
        in_mask = kept_mask(layer.inputs, layer.in_channels, kept)
        out_mask = kept_mask(layer.outputs, layer.out_channels, kept)
        out = torch.from_numpy(np.flatnonzero(out_mask))
        depthwise = layer.kind == "depthwise"
        at, target_PO = self._targets[layer.name]
        weight, bias = module.weight.detach(), module.bias
        if not out_mask.all():
            weight, target_PO = weight[out], target_PO[:, out]
            bias = None if bias is None else bias[out]
        if layer.conv_groups == 1 and not in_mask.all():
            weight = weight[:, torch.from_numpy(np.flatnonzero(in_mask))]
        conv_groups = len(out) if depthwise else layer.conv_groups
        patch = None
        if self.recovery == "reconstruct" and not untouched and len(at.n_P):
            patch = patches(call, at, conv_groups)
            weight = refit(patch, target_PO, weight)
        scale, floats = None, weight
        if bits != FULL_PRECISION:
            clip_O = self.estimates.clip_of(layer.name, bits)[out].to(weight)
            scale = scale_of(weight, clip_O, bits)
            weight = fake_quantize(weight, scale, bits)
        if patch is not None and bias is not None and not layer.batch_norm:
            bias = target_PO.mean(0) - layer_outputs(patch, weight).mean(0)
        y = call.apply(weight, bias, conv_groups)
        residue = 0.0
        if not untouched and len(at.n_P):
            residue = float(unexplained(target_PO, at.outputs(y)).mean())
        return Step(y, FittedLayer(floats, bias, scale), residue)

    def _statistics(
        self, norm: nn.BatchNorm2d, y: torch.Tensor, kept: torch.Tensor, untouched: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over the fitted images; the running ones of the `kept` channels
        without recovery, or where nothing has changed yet."""
        lead = self._lead(len(y))
        if self.recovery == "none" or untouched or not lead:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            return norm.running_mean[kept], norm.running_var[kept]
        # Plain means over rows: several times faster than var_mean in channels_last.
        rows = y[:lead].movedim(1, -1).flatten(0, -2)
        mean = rows.mean(0)
        return mean, (rows - mean).square_().mean(0)

    def _measure(self, schedule: Schedule, logits: torch.Tensor) -> Measurement:
        with torch.inference_mode():
            accuracy, loss, kl = compare(logits, self._dense_logits, self._labels)
        return self.costs.cost(schedule).measurement(accuracy, loss, kl)

    def _dense_done(self, logits: torch.Tensor) -> None:
        """Takes the dense network's outputs (N, classes)."""
        self._dense_logits = logits[self.fit_count :]
        self.dense = self._measure(Schedule(), self._dense_logits)


def touched(prefix: Prefix) -> bool:
    """Whether anything has been cut or quantized yet."""
    return any(bits != FULL_PRECISION for _, bits in prefix.choices) or not all(
        mask.all() for mask in prefix.kept.values()
    )


def build_evaluator(
    model: nn.Module,
    network: Network,
    fit: torch.Tensor,
    score: torch.Tensor,
    labels: torch.Tensor,
    estimates: Estimates,
    *,
    recovery: str = "reconstruct",
    positions: int = 2048,
    cache_bytes: int = 256 * 2**20,
    seed: int = 0,
) -> Evaluator:
    """The incremental evaluator; for a model that torch.fx cannot trace the one that runs the
    whole network each time (`Evaluator.slow` says why)."""
    from rlcompress.core.incremental import IncrementalEvaluator
    from rlcompress.core.whole import WholeEvaluator

    data = (model, network, fit, score, labels, estimates)
    try:
        return IncrementalEvaluator(
            *data, recovery=recovery, positions=positions, cache_bytes=cache_bytes, seed=seed
        )
    except TraceError as error:
        evaluator = WholeEvaluator(*data, recovery=recovery, positions=positions, seed=seed)
        evaluator.slow = str(error)
        return evaluator


def compare(
    logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, float]:
    """Accuracy (0-1), cross-entropy and KL(dense || other) (nats) of logits (S, classes); both
    at most `WORST`, which is what logits that are not finite get."""
    logits, dense_logits = logits.float(), dense_logits.float()
    accuracy = float((logits.argmax(1) == labels).float().mean())
    loss = F.cross_entropy(logits, labels)
    kl = F.kl_div(
        logits.log_softmax(1), dense_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss, kl = (float(value.nan_to_num(nan=WORST).clamp(0, WORST)) for value in (loss, kl))
    return accuracy, loss, kl
