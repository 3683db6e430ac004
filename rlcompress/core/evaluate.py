"""Scores schedules on calibration data, layer by layer.

Layer t's activations depend only on choices up to t. So a candidate is one forward pass, cut
into a segment a layer: `begin` -> `advance` once a layer -> `finish`. What the layers see is
physically cut, batch norms are re-estimated as the forward passes them, and each layer is
refitted in closed form to what the dense network puts out there (`recovery`). Equal prefixes
are computed once: their live activations stay in an LRU cache bounded in bytes.

The batch holds F images that are fitted and, behind them, S images that are only scored; the
two never overlap. N = F + S.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from rlcompress.core.cost import CostModel
from rlcompress.core.graph import LayerModule, Network, kept_mask, trace
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import fake_quantize, layer_outputs, scale_of, unexplained
from rlcompress.core.reconstruct import Positions, patches, refit, sample_positions
from rlcompress.core.schedule import FULL_PRECISION, Measurement, Schedule
from rlcompress.core.sensitivity import Estimates

RECOVERIES = ("none", "bn", "reconstruct")

#: Nats.
WORST = 1e4


@dataclass(frozen=True)
class FittedLayer:
    """A layer as the evaluator left it: cut and refitted floats, scales, batch statistics."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale_O: torch.Tensor | None
    mean_O: torch.Tensor | None = None
    variance_O: torch.Tensor | None = None


@dataclass
class Prefix:
    """A partly compressed network: the choices so far and the activations still needed.

    unexplained  one number in [0, 1] a layer done: share of its outputs' variance that the
                 dense outputs keep to themselves (mean over surviving channels)
    """

    choices: tuple[tuple[float, int], ...]
    live: dict[fx.Node, torch.Tensor]
    kept: dict[str, np.ndarray]
    unexplained: tuple[float, ...]
    fitted: dict[str, FittedLayer] = field(default_factory=dict)

    def nbytes(self) -> int:
        storages = {t.untyped_storage().data_ptr(): t for t in self.live.values()}
        return sum(t.untyped_storage().nbytes() for t in storages.values())


class PrefixCache:
    """Least recently used prefixes, at most `max_bytes` of activations."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[tuple[Any, ...], Prefix] = OrderedDict()

    def get(self, choices: tuple[Any, ...]) -> Prefix | None:
        prefix = self._entries.get(choices)
        if prefix is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(choices)
        return prefix

    def put(self, prefix: Prefix) -> None:
        size = prefix.nbytes()
        if size > self.max_bytes or prefix.choices in self._entries:
            return
        self._entries[prefix.choices] = prefix
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.bytes -= old.nbytes()


@dataclass(frozen=True)
class _Segment:
    """The nodes from one layer up to the next, and the values that later nodes still read."""

    nodes: tuple[fx.Node, ...]
    needed: frozenset[fx.Node]


class Evaluator:
    """Measures schedules of one network. Holds no state between schedules but its cache.

    model      the trained dense network;  network  its structure
    fit        images (F, C, H, W), unlabelled: batch norms and reconstruction
    score      images (S, C, H, W) that are never fitted;  labels (S,)
    estimates  which channels matter and where to clip
    recovery   "none", "bn" (batch norms re-estimated) or "reconstruct" (and layers refitted)
    positions  sampled output positions a layer for the refit
    """

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
        cache_bytes: int = 256 * 2**20,
        seed: int = 0,
    ) -> None:
        if recovery not in RECOVERIES:
            raise ValueError(f"recovery {recovery!r}; allowed: {', '.join(RECOVERIES)}")
        self.network, self.estimates, self.recovery = network, estimates, recovery
        self.costs = CostModel(network)
        self.layers = list(network.layers.values())
        self.cache = PrefixCache(cache_bytes)
        self.fit_count = len(fit)
        self._labels = labels
        self._fx = trace(model, fit[:1])
        self._modules = dict(self._fx.named_modules())
        self._order = {
            name: np.argsort(-estimates.importance[name], kind="stable") for name in network.groups
        }
        self._segments = self._split()
        batch = torch.cat([fit, score]).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            start = self._run_nodes(self._segments[0], {}, batch)
            self._start = Prefix((), start, {}, ())
            self._positions: list[Positions] = []
            self._targets: list[torch.Tensor] = []
            self._dense_logits = self._dense_pass(positions, seed)
        self.dense = self._measure(Schedule(), self._dense_logits)

    # --- structure -------------------------------------------------------------------------

    def _split(self) -> list[_Segment]:
        """Segment 0 is what precedes the first layer; segment t + 1 begins at layer t."""
        names = [layer.name for layer in self.layers]
        pieces: list[list[fx.Node]] = [[]]
        for node in self._fx.graph.nodes:
            if node.op == "call_module" and node.target in names:
                pieces.append([])
            if node.op != "output":
                pieces[-1].append(node)
            else:
                (self._output,) = node.all_input_nodes
        index = {node: i for i, piece in enumerate(pieces) for node in piece}
        segments = []
        for i, piece in enumerate(pieces):
            needed = {
                node
                for node, j in index.items()
                if j <= i
                and (node is self._output or any(index.get(u, -1) > i for u in node.users))
            }
            segments.append(_Segment(tuple(piece), frozenset(needed)))
        return segments

    def _module(self, name: str) -> LayerModule:
        module = self._modules[name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return module

    # --- running ---------------------------------------------------------------------------

    def _run_nodes(
        self,
        segment: _Segment,
        live: Mapping[fx.Node, torch.Tensor],
        batch: torch.Tensor | None = None,
        layer_output: torch.Tensor | None = None,
        norm: tuple[str, torch.Tensor] | None = None,
    ) -> dict[fx.Node, torch.Tensor]:
        """Executes a segment. `layer_output` stands for its first node, `norm` for the result
        of the batch norm behind that."""
        values: dict[fx.Node, Any] = dict(live)

        def value(node: fx.Node) -> Any:
            return values[node]

        for i, node in enumerate(segment.nodes):
            if layer_output is not None and i == 0:
                values[node] = layer_output
            elif norm is not None and node.op == "call_module" and node.target == norm[0]:
                values[node] = norm[1]
            elif node.op == "placeholder":
                values[node] = batch
            elif node.op == "get_attr":
                values[node] = self._attribute(str(node.target))
            else:
                args = fx.node.map_arg(node.args, value)
                kwargs = fx.node.map_arg(node.kwargs, value)
                if node.op == "call_module":
                    values[node] = self._modules[str(node.target)](*args, **kwargs)
                elif node.op == "call_function":
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return {node: values[node] for node in segment.needed}

    def _attribute(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self._fx.get_submodule(owner), name)

    def _dense_pass(self, positions: int, seed: int) -> torch.Tensor:
        """Runs the dense network once; keeps its pre-activations at the sampled positions."""
        generator = torch.Generator().manual_seed(seed)
        live = self._start.live
        for layer, segment in zip(self.layers, self._segments[1:], strict=True):
            x = live[segment.nodes[0].all_input_nodes[0]]
            y = self._module(layer.name)(x)
            at = sample_positions(y.shape, self.fit_count, positions, generator)
            self._positions.append(at)
            self._targets.append(at.outputs(y[: self.fit_count]).clone())
            live = self._run_nodes(segment, live, layer_output=y)
        return live[self._output][self.fit_count :]

    def begin(self) -> Prefix:
        """Nothing decided yet."""
        return self._start

    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
        """Decides the next layer: its group's `keep`, where this layer owns the group (else it
        is ignored), and its weight `bits`. Returns a new prefix; `prefix` stays valid.

        `collect` gathers what each layer became in `Prefix.fitted`, for `ticket.fitted_network`.
        """
        layer = self.layers[len(prefix.choices)]
        group = self.network.owned_group(layer.name)
        choices = (*prefix.choices, (keep if group else 1.0, bits))
        if not collect and (cached := self.cache.get(choices)) is not None:
            return cached
        with torch.inference_mode():
            result = self._advance(prefix, choices, collect)
        if not collect:
            self.cache.put(result)
        return result

    def _advance(
        self, prefix: Prefix, choices: tuple[tuple[float, int], ...], collect: bool
    ) -> Prefix:
        t = len(prefix.choices)
        layer, segment = self.layers[t], self._segments[t + 1]
        module, (keep, bits) = self._module(layer.name), choices[-1]
        kept = dict(prefix.kept)
        if group := self.network.owned_group(layer.name):
            mask = np.zeros(group.channels, dtype=bool)
            mask[self._order[group.name][: group.count(keep)]] = True
            kept[group.name] = mask
        in_mask = kept_mask(layer.inputs, layer.in_channels, kept)
        out_mask = kept_mask(layer.outputs, layer.out_channels, kept)
        out = torch.from_numpy(np.flatnonzero(out_mask))
        depthwise = layer.kind == "depthwise"

        weight = module.weight
        if not out_mask.all():
            weight = weight[out]
        if not depthwise and not in_mask.all():
            weight = weight[:, torch.from_numpy(np.flatnonzero(in_mask))]
        bias = module.bias if module.bias is None or out_mask.all() else module.bias[out]
        x = prefix.live[segment.nodes[0].all_input_nodes[0]]
        conv_groups = len(out) if depthwise else layer.conv_groups
        at, target_PO = self._positions[t], self._targets[t]
        if not out_mask.all():
            target_PO = target_PO[:, out]
        untouched = bool(out_mask.all()) and bits == FULL_PRECISION and not self._touched(prefix)
        patch = None
        if self.recovery == "reconstruct" and not untouched:
            patch = patches(module, x, at, conv_groups)
            weight = refit(patch, target_PO, weight)
        scale = None
        floats = weight
        if bits != FULL_PRECISION:
            clip_O = self.estimates.clip_of(layer.name, bits)[out].to(weight)
            scale = scale_of(weight, clip_O, bits)
            weight = fake_quantize(weight, scale, bits)
        if patch is not None and bias is not None and not layer.batch_norm:
            bias = target_PO.mean(0) - layer_outputs(patch, weight).mean(0)
        y = self._apply(module, x, weight, bias, conv_groups)
        residue = 0.0 if untouched else float(unexplained(target_PO, at.outputs(y)).mean())

        norm = mean = variance = None
        if layer.batch_norm:
            z, mean, variance = self._normalise(layer.batch_norm, y, out, untouched)
            norm = (layer.batch_norm, z)
        live = self._run_nodes(segment, prefix.live, layer_output=y, norm=norm)
        fitted = prefix.fitted
        if collect:
            fitted = {**fitted, layer.name: FittedLayer(floats, bias, scale, mean, variance)}
        return Prefix(choices, live, kept, (*prefix.unexplained, residue), fitted)

    def _touched(self, prefix: Prefix) -> bool:
        return any(bits != FULL_PRECISION for _, bits in prefix.choices) or not all(
            mask.all() for mask in prefix.kept.values()
        )

    def _apply(
        self,
        module: LayerModule,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        conv_groups: int,
    ) -> torch.Tensor:
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(
            x,
            weight.contiguous(memory_format=torch.channels_last),
            bias,
            module.stride,
            module.padding,  # type: ignore[arg-type]
            module.dilation,
            conv_groups,
        )

    def _normalise(
        self, name: str, y: torch.Tensor, out: torch.Tensor, untouched: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Batch norm with statistics of the fitted images; with the running ones without
        recovery, or where nothing has changed yet."""
        norm = self._modules[name]
        assert isinstance(norm, nn.BatchNorm2d)
        if self.recovery == "none" or untouched:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean[out], norm.running_var[out]
        else:
            # Plain means over rows: several times faster than var_mean in channels_last.
            rows = y[: self.fit_count].permute(0, 2, 3, 1).flatten(0, 2)
            mean = rows.mean(0)
            variance = (rows - mean).square_().mean(0)
        gamma = norm.weight[out] if norm.affine else None
        beta = norm.bias[out] if norm.affine else None
        return F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, norm.eps), mean, variance

    # --- results ---------------------------------------------------------------------------

    def schedule(self, prefix: Prefix) -> Schedule:
        """The schedule that a finished prefix's choices say."""
        keep, bits = {}, {}
        for layer, (ratio, width) in zip(self.layers, prefix.choices, strict=True):
            if group := self.network.owned_group(layer.name):
                keep[group.name] = ratio
            bits[layer.name] = width
        return Schedule(keep, bits)

    def finish(self, prefix: Prefix) -> Measurement:
        """The measurement of a prefix in which every layer is decided."""
        logits = prefix.live[self._output][self.fit_count :]
        return self._measure(self.schedule(prefix), logits)

    def _measure(self, schedule: Schedule, logits: torch.Tensor) -> Measurement:
        with torch.inference_mode():
            accuracy, loss, kl = compare(logits, self._dense_logits, self._labels)
        return self.costs.cost(schedule).measurement(accuracy, loss, kl)

    def run(self, schedule: Schedule, *, collect: bool = False) -> Prefix:
        """Every layer decided as `schedule` says."""
        self.network.validate(schedule)
        prefix = self.begin()
        for layer in self.layers:
            group = self.network.owned_group(layer.name)
            ratio = schedule.ratio(group.name) if group else 1.0
            prefix = self.advance(prefix, ratio, schedule.width(layer.name), collect=collect)
        return prefix

    def evaluate(self, schedule: Schedule) -> Measurement:
        """Measures one schedule: one forward pass of the calibration images at most."""
        return self.finish(self.run(schedule))

    def kept(self, schedule: Schedule) -> dict[str, np.ndarray]:
        """Group -> mask of the channels that survive."""
        counts = self.network.counts(schedule)
        return kept_channels(self.network, self.estimates.importance, counts)


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
