"""The evaluator of traced networks: the forward pass, cut into a segment a layer.

Equal prefixes are computed once: their live activations stay in an LRU cache bounded in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.evaluate import Evaluator, Prefix, Step, touched
from rlcompress.core.graph import Network, kept_mask
from rlcompress.core.reading import NORMS
from rlcompress.core.schedule import FULL_PRECISION, Measurement
from rlcompress.core.trace import trace

Values = dict[fx.Node, Any]


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
        super().__init__(model, network, fit, *data, **options)
        self.cache = PrefixCache(cache_bytes)
        self._modules = dict(self._fx.named_modules())
        self._norms = {norm.name: norm for norm in network.norms}
        self._segments = self._split()
        batch = self._batch
        del self._batch
        with torch.inference_mode():
            start = self._run_nodes(self._segments[0], {}, lambda node: batch)
            self._start = Prefix((), start, {}, ())
            self._dense_done(self._dense_pass())

    def with_recovery(self, recovery: str) -> Self:
        """With a cache of its own, as large as this one's."""
        other = super().with_recovery(recovery)
        other.cache = PrefixCache(self.cache.max_bytes)
        return other

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
                    if norm is not None and isinstance(module, NORMS):
                        values[node] = norm(target, args[0])
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

    def _dense_pass(self) -> torch.Tensor:
        """Runs the dense network once; keeps its pre-activations at the sampled positions."""

        def handle(call: Call) -> torch.Tensor:
            y = call.run()
            self._aim(call, y)
            return y

        live: Mapping[fx.Node, Any] = self._start.live
        for layer, segment in zip(self.layers, self._segments[1:], strict=True):
            live = self._run_nodes(segment, live, self._layer(layer.name, live, handle))
        logits: torch.Tensor = live[self._output]
        return logits

    def begin(self) -> Prefix:
        return self._start

    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
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
        keep, bits = choices[-1]
        kept = prefix.kept | self._kept_by(layer, keep)
        out_mask = kept_mask(layer.outputs, layer.out_channels, kept)
        untouched = bool(out_mask.all()) and bits == FULL_PRECISION and not touched(prefix)
        steps: list[Step] = []

        def handle(call: Call) -> torch.Tensor:
            steps.append(self._step(layer, call, kept, bits, untouched))
            return steps[0].y

        statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def norm(name: str, y: torch.Tensor) -> torch.Tensor:
            module = self._modules[name]
            assert isinstance(module, NORMS)
            if name in self._norms:
                links, channels = self._norms[name].links, self._norms[name].channels
                index = np.flatnonzero(kept_mask(links, channels, kept))
            else:
                index = np.flatnonzero(out_mask)
            at = torch.from_numpy(index)
            mean, variance = self._statistics(module, y, at, untouched)
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
                done = replace(done, mean_O=mean, variance_O=variance)
            fitted, norms = {**fitted, layer.name: done}, {**norms, **statistics}
        return Prefix(choices, live, kept, (*prefix.unexplained, step.residue), fitted, norms)

    def finish(self, prefix: Prefix) -> Measurement:
        logits = prefix.live[self._output][self.fit_count :]
        return self._measure(self.schedule(prefix), logits)
