"""Scores schedules on calibration data.

A candidate is one forward pass in which each layer, as it is reached, is cut, refitted in closed
form to what the dense network puts out there, and quantized; batch norms are re-estimated as the
forward passes them (`recovery`). Layer t's input depends only on choices up to t, so the pass is
given step by step: `begin` -> `advance` once a layer -> `finish`.

This file holds what one layer's step is. `incremental` runs the pass a segment at a time over the
traced network, `whole` runs the model's own code again and again where that cannot be traced.

The batch holds F images that are fitted and, behind them, S images that are only scored; the
two never overlap. N = F + S. The dense network is run once, in float32; candidates in `precision`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import nn

from rlcompress.core.cache import ByteCache
from rlcompress.core.calls import Call, layer_weights
from rlcompress.core.cost import CostModel
from rlcompress.core.fitted import CutNetwork, network_of, trained, trainee
from rlcompress.core.graph import Layer, LayerModule, Network, kept_mask
from rlcompress.core.measure import compare
from rlcompress.core.positions import (
    Positions,
    enough_positions,
    patches,
    sample_positions,
    spread_rows,
)
from rlcompress.core.prefix import FittedLayer, Prefix, Step
from rlcompress.core.process import pick_dtype
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import fake_quantize, scale_of, unexplained
from rlcompress.core.reconstruct import RIDGES, Fit, free_means, refit
from rlcompress.core.schedule import FULL_PRECISION, Measurement, Schedule, parse_recovery
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.train import distill

#: Rows that batch statistics are taken from: they are then known to 1 % of a deviation.
STATISTICS_ROWS = 16384


class Evaluator(ABC):
    """Measures schedules of one network. `build_evaluator` makes the right one.

    model      the trained dense network;  network  its structure
    fit        images (F, C, H, W), unlabelled: batch norms and reconstruction
    score      images (S, C, H, W) that are never fitted;  labels (S,), or None: then accuracy
               and loss are against what the dense network says
    estimates  which channels matter and where to clip
    recovery   "none", "bn" (batch norms re-estimated), "reconstruct" (and layers refitted), or
               "steps:K" ("bn", then K steps of training on the fitted images)
    positions  sampled output positions a layer for the refit
    precision  of candidates: "float32", "bfloat16", or "auto" (`pick_dtype`)

    Batch norms: Li et al., 2020, "EagleEye" (adaptive batch normalization). Refits: `reconstruct`.
    """

    #: Why evaluations run the whole network each time; empty if they need not.
    slow: str = ""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        fit: torch.Tensor,
        score: torch.Tensor,
        labels: torch.Tensor | None,
        estimates: Estimates,
        *,
        recovery: str = "reconstruct",
        positions: int = 2048,
        precision: str = "float32",
        seed: int = 0,
    ) -> None:
        self.recovery, self.steps = parse_recovery(recovery)
        self.dtype = pick_dtype(precision, fit.device)
        self.network, self.estimates = network, estimates
        self.costs = CostModel(network)
        self.layers = list(network.layers.values())
        self.fit_count, self._count = len(fit), len(fit) + len(score)
        self._labels = None if labels is None else labels.long()
        self._model, self._seed = model, seed
        self._dense = dict(model.named_modules())
        self._weights = {n: w for n, w in layer_weights(model).items() if n in network.layers}
        self._free_means = free_means(model, network)
        self._order = {
            name: np.argsort(-estimates.importance[name], kind="stable") for name in network.groups
        }
        images = torch.cat([fit, score])
        # Not `contiguous`: it leaves the strides of one channel as they are, and convolutions of
        # such images answer in the other format.
        self._batch = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        self._positions_wanted = positions
        self._generator = torch.Generator().manual_seed(seed)
        self._targets: dict[str, tuple[Positions, torch.Tensor]] = {}
        #: The layer that puts out the logits, where one is known to.
        self._last: str | None = None
        #: Refits by the choices that led to them; the layer's own choice changes none.
        self._fits: ByteCache[Fit] = ByteCache(0)
        self._ridges: dict[str, tuple[float, ...]] = {}
        self._choosing: dict[str, tuple[float, ...]] | None = None

    def with_recovery(self, recovery: str) -> Self:
        """An evaluator of the same network, images and sampled positions after another recovery.
        Shares the tensors; prefixes of one are not for the other."""
        other = copy.copy(self)
        other.recovery, other.steps = parse_recovery(recovery)
        other._empty()
        other._choose_ridges()
        other._empty()
        return other

    def _low_precision(self) -> torch.autocast:
        """In which all that is not a layer of a candidate is computed."""
        device, low = self._batch.device.type, self.dtype != torch.float32
        return torch.autocast(device, self.dtype, enabled=low)

    def _empty(self) -> None:
        """Caches of its own, as large as they were."""
        self._fits = ByteCache(self._fits.max_bytes)

    # --- the pass ----------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> Prefix:
        """Nothing decided yet."""

    @abstractmethod
    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
        """Decides the next layer: its group's `keep`, where this layer owns the group (else it
        is ignored), and its weight `bits`. Returns a new prefix; `prefix` stays valid.

        `collect` gathers what each layer became in `Prefix.fitted`, for `fitted.network_of`.
        """

    @abstractmethod
    def _outputs(self, prefix: Prefix) -> torch.Tensor:
        """(N, classes) of a prefix in which every layer is decided."""

    def finish(self, prefix: Prefix) -> Measurement:
        """The measurement of a prefix in which every layer is decided."""
        unexplained = float(np.mean(prefix.unexplained)) if prefix.unexplained else 0.0
        if self.steps:
            _, model = self._train(prefix)
            with torch.inference_mode():
                scored = model(self._batch[self.fit_count :].clone())
        else:
            scored = self._outputs(prefix)[self.fit_count - self._count :]
        return self._measure(self.schedule(prefix), scored, unexplained)

    def retrained(self, prefix: Prefix) -> CutNetwork:
        """The network of a prefix in which every layer is decided, after `steps` of training."""
        start, model = self._train(prefix)
        return trained(start, self.network, model)

    def _train(self, prefix: Prefix) -> tuple[CutNetwork, nn.Module]:
        """The network before and after `steps` of quantization-aware distillation."""
        with torch.inference_mode(False), torch.enable_grad():
            start = network_of(self._model, self.network, prefix)
            model = trainee(start, self.network)
            fit, taught = self._batch[: self.fit_count], self._dense_logits[: self.fit_count]
            taught = taught.clone().log_softmax(1)
            distill(model, fit, taught, self.steps, seed=self._seed)
        return start, model

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
        count = enough_positions(call.weight[0].numel(), self._positions_wanted)
        at = sample_positions(call, y.shape, lead, count, self._generator)
        self._targets[call.name] = (at, at.outputs(y).clone())

    def _step(
        self,
        layer: Layer,
        call: Call,
        kept: Mapping[str, np.ndarray],
        bits: int,
        untouched: bool,
        *,
        before: Hashable = None,
        shift_PO: torch.Tensor | None = None,
    ) -> Step:
        """Cuts, refits and quantizes one layer and applies it to its input.

        before    names what led to this input, if it may be met again
        shift_PO  what the layer should put out beside its dense outputs (all channels)
        """
        module = self._dense[layer.name]
        assert isinstance(module, LayerModule)
        in_mask = kept_mask(layer.inputs, layer.in_channels, kept)
        out_mask = kept_mask(layer.outputs, layer.out_channels, kept)
        weight, bias = module.weight.detach(), module.bias
        device = weight.device
        out = torch.from_numpy(np.flatnonzero(out_mask)).to(device)
        at, target_PO = self._targets[layer.name]
        if shift_PO is not None:
            target_PO = target_PO + shift_PO
        conv_groups, rows = layer.conv_groups, out
        if layer.kind == "depthwise":
            # Its channels are its inputs: an earlier choice has cut them.
            weight, target_PO = weight.index_select(0, out), target_PO.index_select(1, out)
            rows, conv_groups = torch.arange(len(out), device=device), len(out)
        elif conv_groups == 1 and not in_mask.all():
            read = torch.from_numpy(np.flatnonzero(in_mask)).to(device)
            weight = weight.index_select(1, read)
        if call.window is None and call.x.dim() == 2:
            call = replace(call, x=call.x.float())  # few products, and the logits among them
        fit = None
        if self.recovery == "reconstruct" and not untouched and len(at.n_P):
            fit = self._fits.get(before) if before is not None else None
            if fit is None:
                ridges = self._ridges.get(layer.name, RIDGES)
                patches_PGD = patches(call, at, conv_groups)
                fit = refit(
                    patches_PGD,
                    target_PO,
                    weight,
                    ridges,
                    centred=layer.name in self._free_means,
                    logits=layer.name == self._last,
                )
                if self._choosing is not None:
                    self._choosing[layer.name] = (float(fit.ridge_G.median()) or RIDGES[0],)
                if before is not None:
                    self._fits.put(before, fit)
            weight = fit.weight
        # Several times faster than indexing; a tenth of an evaluation would be that.
        weight, target_PO = weight.index_select(0, rows), target_PO.index_select(1, rows)
        bias = None if bias is None else bias[out]
        scale = None
        if bits != FULL_PRECISION:
            clip_O = self.estimates.clip_of(layer.name, bits).to(weight)[out]
            if fit is None:
                scale = scale_of(weight, clip_O, bits)
                weight = fake_quantize(weight, scale, bits)
            else:
                scale = fit.scale(rows, clip_O, bits)
                weight = fit.quantize(rows, scale, bits)
        if fit is not None and bias is not None and not layer.batch_norm:
            bias = fit.mean_O.index_select(0, rows) - fit.mean_outputs(weight)
        given, centre = bias, None
        centred = self.recovery != "none" and layer.batch_norm and not untouched
        if centred and call.x.dtype != torch.float32 and len(at.n_P):
            # Low precision keeps three digits: of the deviations, not of the mean.
            plain = torch.zeros_like(target_PO[0]) if bias is None else bias
            centre = target_PO.mean(0) if fit is None else plain + fit.mean_outputs(weight)
            given = plain - centre
        y = call.apply(weight, given, conv_groups)
        residue = 0.0
        if not untouched and len(at.n_P):
            residue = float(unexplained(target_PO, at.outputs(y).float()).mean())
        return Step(y, FittedLayer(weight, bias, scale), residue, centre)

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
        rows = spread_rows(y[:lead], STATISTICS_ROWS).float()
        # Plain means over rows: several times faster than var_mean in channels_last.
        mean = rows.mean(0)
        return mean, (rows - mean).square_().mean(0)

    def _measure(
        self, schedule: Schedule, logits: torch.Tensor, unexplained: float = 0.0
    ) -> Measurement:
        with torch.inference_mode():
            dense = self._dense_logits[self.fit_count :]
            labels = dense.argmax(1) if self._labels is None else self._labels
            accuracy, loss, kl = compare(logits, dense, labels)
        return self.costs.cost(schedule).measurement(accuracy, loss, kl, unexplained)

    def _dense_done(self, logits: torch.Tensor) -> None:
        """Takes the dense network's outputs (N, classes)."""
        self._dense_logits = logits
        self.dense = self._measure(Schedule(), logits[self.fit_count :])

    def _choose_ridges(self) -> None:
        """Settles each layer's ridge on one middling schedule: a candidate tries no others."""
        if self.recovery == "reconstruct":
            self._choosing = {}
            self.run(self.network.uniform(0.5, FULL_PRECISION))
            self._ridges, self._choosing = self._choosing, None
