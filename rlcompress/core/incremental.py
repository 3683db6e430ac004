"""The evaluator of traced networks: the forward pass, cut into a segment a layer.

Equal prefixes are computed once: their live activations stay in an LRU cache bounded in bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from rlcompress.core.cache import ByteCache
from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.graph import Layer, Network, kept_mask
from rlcompress.core.prefix import Prefix, Step, touched
from rlcompress.core.reading import NORMS, estimated, first_input
from rlcompress.core.schedule import FULL_PRECISION, Schedule
from rlcompress.core.trace import TraceError, trace

Values = dict[fx.Node, Any]
_SUMS = (operator.add, operator.iadd, torch.add)
#: Of the cache, for one prefix. The wide ones of the first layers would drive out many narrow ones,
#: each of which saves all that comes before it.
LARGEST_SHARE = 1 / 8
#: Of a batch norm, per unit of its input.
LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class _Segment:
    """The nodes from one layer up to the next, and the values that later nodes still read."""

    nodes: tuple[fx.Node, ...]
    needed: frozenset[fx.Node]


def _norms_behind_their_layers(traced: fx.GraphModule, network: Network) -> None:
    """Puts each batch norm that a layer absorbs right behind that layer, whatever the code does
    first: its statistics are the layer's step's. Raises TraceError where another layer remains
    between them."""
    called = {str(node.target): node for node in traced.graph.nodes if node.op == "call_module"}
    absorbed = {x.batch_norm: x.name for x in network.layers.values() if x.batch_norm}
    for name, layer in absorbed.items():
        if name in called and called[name].args[:1] == (called[layer],):
            called[layer].append(called[name])
    step = ""
    for name in (str(node.target) for node in traced.graph.nodes if node.op == "call_module"):
        step = name if name in network.layers else step
        if absorbed.get(name, step) != step:
            raise TraceError(f"{step} is called between {absorbed[name]} and {name}")
    traced.recompile()


class IncrementalEvaluator(Evaluator):
    """Arguments as `Evaluator`'s, and `cache_bytes`. Holds no state between schedules but its
    cache.

    Raises `trace.TraceError` if the model cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        fit: torch.Tensor,
        *data: Any,
        cache_bytes: int = 256 * 2**20,
        **options: Any,
    ) -> None:
        self._fx = trace(model, fit[:1], network.layers)
        _norms_behind_their_layers(self._fx, network)
        super().__init__(model, network, fit, *data, **options)
        self.cache: ByteCache[Prefix] = ByteCache(cache_bytes - cache_bytes // 4, LARGEST_SHARE)
        self._modules = dict(self._fx.named_modules())
        self._norms = {norm.name: norm for norm in network.norms}
        self._segments = self._split()
        batch = self._batch
        self._sums = self._find_sums()
        heads = (x.name for x in self.layers if x.kind == "linear")
        self._last = next((name for name in heads if name == self._output.target), None)
        self._beside: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            start = self._run_nodes(self._segments[0], {}, lambda node: batch)
            self._dense_done(self._dense_pass(start))
            batch = batch.to(self.dtype)
            with self._low_precision():
                start = self._run_nodes(self._segments[0], {}, lambda node: batch)
            self._start = Prefix((), start, {}, ())
        self._fits = ByteCache(cache_bytes // 4)
        self._choose_ridges()
        self._empty()

    def _empty(self) -> None:
        super()._empty()
        self.cache = ByteCache(self.cache.max_bytes, LARGEST_SHARE)

    # --- structure -------------------------------------------------------------------------

    def _split(self) -> list[_Segment]:
        """Segment 0 is what precedes the first layer; segment t + 1 begins at layer t."""
        names = {layer.name for layer in self.layers}
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

    def _find_sums(self) -> dict[str, fx.Node]:
        """Layer -> the other summand, where a layer's output (behind its batch norm) goes into a
        sum and nowhere else and the other summand is there before it."""
        order = {node: i for i, node in enumerate(self._fx.graph.nodes)}
        sums = {}
        for layer in self.layers:
            nodes = [n for n in order if n.op == "call_module" and n.target == layer.name]
            if len(nodes) != 1:
                continue
            node = last = nodes[0]
            if layer.batch_norm and len(node.users) == 1:
                last = next(iter(node.users))
            if len(last.users) != 1:
                continue
            user = next(iter(last.users))
            if user.target not in _SUMS or len(user.all_input_nodes) != 2 or user.kwargs:
                continue
            (other,) = (n for n in user.all_input_nodes if n is not last)
            if order[other] < order[node]:
                sums[layer.name] = other
        return sums

    # --- running ---------------------------------------------------------------------------

    def _run_nodes(
        self,
        segment: _Segment,
        live: Mapping[fx.Node, Any],
        first: Callable[[fx.Node], torch.Tensor],
        norm: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> Values:
        """Executes a segment. `first` computes its first node; `norm` the batch norms, given
        their names and inputs."""
        values: Values = dict(live)

        def value(node: fx.Node) -> Any:
            return values[node]

        for i, node in enumerate(segment.nodes):
            target = str(node.target)
            if i == 0:
                values[node] = first(node)
            elif node.op == "get_attr":
                values[node] = self._attribute(target)
            else:
                args = fx.node.map_arg(node.args, value)
                kwargs = fx.node.map_arg(node.kwargs, value)
                if node.op == "call_module":
                    module = self._modules[target]
                    if norm is not None and estimated(module):
                        values[node] = norm(target, first_input(args, kwargs))
                    else:
                        values[node] = module(*args, **kwargs)
                elif node.op == "call_function":
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    values[node] = getattr(args[0], target)(*args[1:], **kwargs)
        return {node: values[node] for node in segment.needed}

    def _attribute(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self._fx.get_submodule(owner), name)

    def _layer(
        self,
        name: str,
        live: Mapping[fx.Node, Any],
        handle: Callable[[Call], torch.Tensor],
    ) -> Callable[[fx.Node], torch.Tensor]:
        """Calls a layer's module, its convolution or product computed by `handle`."""

        def first(node: fx.Node) -> torch.Tensor:
            (x,) = node.all_input_nodes
            with LayerCalls({name: self._weights[name]}, handle):
                y: torch.Tensor = self._modules[name](live[x])
            return y

        return first

    def _dense_pass(self, start: Values) -> torch.Tensor:
        """Runs the dense network once; keeps its pre-activations at the sampled positions, and
        what is added to them."""
        live: Mapping[fx.Node, Any] = start

        def handle(call: Call) -> torch.Tensor:
            y = call.run()
            self._aim(call, y)
            other = self._sums.get(call.name)
            # A broadcast summand has no values at the layer's own positions.
            if other is not None and live[other].shape == y.shape:
                self._beside[call.name] = self._targets[call.name][0].outputs(live[other]).clone()
            return y

        for layer, segment in zip(self.layers, self._segments[1:], strict=True):
            live = self._run_nodes(segment, live, self._layer(layer.name, live, handle))
        logits: torch.Tensor = live[self._output]
        return logits

    def _shift(
        self, layer: Layer, live: Mapping[fx.Node, Any], out_mask: np.ndarray
    ) -> torch.Tensor | None:
        """(P, O) what the layer should add to its outputs so that the sum it ends in is the dense
        one: the error of the other summand, in units before its batch norm."""
        dense_PO = self._beside.get(layer.name)
        if dense_PO is None:
            return None
        other = self._sums[layer.name]
        shift_PO = torch.zeros_like(dense_PO)
        out = torch.from_numpy(np.flatnonzero(out_mask)).to(dense_PO.device)
        now_PO = self._targets[layer.name][0].outputs(live[other]).float()
        shift_PO.index_copy_(1, out, dense_PO.index_select(1, out) - now_PO)
        if layer.batch_norm:
            norm = self._modules[layer.batch_norm]
            assert isinstance(norm, NORMS)
            assert norm.running_var is not None
            gain_O = (norm.running_var + norm.eps).rsqrt()
            gain_O = gain_O * norm.weight.detach() if norm.affine else gain_O
            # A channel that the norm nearly silences cannot make up for another.
            shift_PO *= torch.where(gain_O.abs() > LEAST_GAIN, 1 / gain_O, 0 * gain_O)
        return shift_PO

    def begin(self) -> Prefix:
        return self._start

    def run(self, schedule: Schedule, *, collect: bool = False) -> Prefix:
        """From the longest beginning that is cached on."""
        self.network.validate(schedule)
        choices = self.choices(schedule)
        prefix = self._start
        for t in range(0 if collect else len(choices), 0, -1):
            if choices[:t] in self.cache:
                prefix = self.cache.get(choices[:t]) or prefix
                break
        for keep, bits in choices[len(prefix.choices) :]:
            prefix = self.advance(prefix, keep, bits, collect=collect)
        return prefix

    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
        layer = self.layers[len(prefix.choices)]
        group = self.network.owned_group(layer.name)
        choices = (*prefix.choices, (keep if group else 1.0, bits))
        collect = collect or self.steps > 0
        if (not collect or self.steps) and (cached := self.cache.get(choices)) is not None:
            return cached
        with torch.inference_mode(), self._low_precision():
            result = self._advance(prefix, choices, collect)
        if not collect or self.steps:
            self.cache.put(choices, result)
        return result

    def _advance(
        self, prefix: Prefix, choices: tuple[tuple[float, int], ...], collect: bool
    ) -> Prefix:
        t = len(prefix.choices)
        layer, segment = self.layers[t], self._segments[t + 1]
        keep, bits = choices[-1]
        kept = prefix.kept | self._kept_by(layer, keep)
        out_mask = kept_mask(layer.outputs, layer.out_channels, kept)
        untouched = bool(out_mask.all()) and bits == FULL_PRECISION and not touched(prefix)
        steps: list[Step] = []

        def handle(call: Call) -> torch.Tensor:
            shift = None
            if self.recovery == "reconstruct" and not untouched:
                shift = self._shift(layer, prefix.live, out_mask)
            before = prefix.choices
            steps.append(
                self._step(layer, call, kept, bits, untouched, before=before, shift_PO=shift)
            )
            return steps[0].y

        statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def norm(name: str, y: torch.Tensor) -> torch.Tensor:
            module = self._modules[name]
            assert isinstance(module, NORMS)
            free = self._norms.get(name)
            mask = kept_mask(free.links, free.channels, kept) if free else out_mask
            at = torch.from_numpy(np.flatnonzero(mask))
            shared = free is not None and free.uses > 1
            mean, variance = self._statistics(module, y, at, untouched or shared)
            if not shared:
                statistics[name] = (mean, variance)
            gamma = module.weight[at] if module.affine else None
            beta = module.bias[at] if module.affine else None
            return F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, module.eps)

        first = self._layer(layer.name, prefix.live, handle)
        live = self._run_nodes(segment, prefix.live, first, norm)
        step, fitted, norms = steps[0], prefix.fitted, prefix.norms
        if collect:
            done = step.fitted
            if layer.batch_norm:
                mean, variance = statistics.pop(layer.batch_norm)
                mean = mean if step.centre_O is None else mean + step.centre_O
                done = replace(done, mean_O=mean, variance_O=variance)
            fitted, norms = {**fitted, layer.name: done}, {**norms, **statistics}
        return Prefix(choices, live, kept, (*prefix.unexplained, step.residue), fitted, norms)

    def _outputs(self, prefix: Prefix) -> torch.Tensor:
        logits: torch.Tensor = prefix.live[self._output]
        return logits
