"""The evaluator for networks that torch.fx cannot trace: the model's own code runs, on a cut copy,
and each layer takes its step as the code reaches it. Each `advance` runs everything before it
again, so an episode of L steps costs about L / 2 forward passes, a known schedule one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rlcompress.core.calls import Call, LayerCalls, layer_weights
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.graph import kept_mask
from rlcompress.core.prefix import FittedLayer, Prefix, Step
from rlcompress.core.prune import cut
from rlcompress.core.quant import fake_quantize
from rlcompress.core.reading import NORMS, estimated, first_input
from rlcompress.core.schedule import FULL_PRECISION, Schedule

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]


class _ReachedError(Exception):
    """The forward pass has come as far as it has to."""


class WholeEvaluator(Evaluator):
    """Arguments as `Evaluator`'s."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._place = {layer.name: t for t, layer in enumerate(self.layers)}
        self._shared = {norm.name for norm in self.network.norms if norm.uses > 1}

        last: list[tuple[str, torch.Tensor]] = []

        def handle(call: Call) -> torch.Tensor:
            y = call.run()
            if call.name not in self._targets:
                self._aim(call, y)
            last[:] = [(call.name, y)]
            return y

        with torch.inference_mode(), LayerCalls(self._weights, handle):
            logits = self._model(self._batch.clone())  # its code may change it
        ((name, y),) = last
        self._last = name if y is logits and self.network.layers[name].kind == "linear" else None
        self._dense_done(logits)
        self._choose_ridges()

    def begin(self) -> Prefix:
        return Prefix((), {}, {}, ())

    def advance(self, prefix: Prefix, keep: float, bits: int, *, collect: bool = False) -> Prefix:
        layer = self.layers[len(prefix.choices)]
        group = self.network.owned_group(layer.name)
        choices = (*prefix.choices, (keep if group else 1.0, bits))
        return self._forward(choices, collect or self.steps > 0)

    def run(self, schedule: Schedule, *, collect: bool = False) -> Prefix:
        self.network.validate(schedule)
        return self._forward(self.choices(schedule), collect or self.steps > 0)

    def _outputs(self, prefix: Prefix) -> torch.Tensor:
        return prefix.live["logits"]

    def _forward(self, choices: tuple[tuple[float, int], ...], collect: bool) -> Prefix:
        """Runs the network as far as `choices` go."""
        kept: dict[str, Any] = {}
        for layer, (keep, _) in zip(self.layers, choices, strict=False):
            kept |= self._kept_by(layer, keep)
        steps: dict[str, Step] = {}
        statistics: Statistics = {}
        # From the first layer that is changed on, nothing is as it was.
        first = next(
            (
                t
                for t, (layer, (_, bits)) in enumerate(zip(self.layers, choices, strict=False))
                if bits != FULL_PRECISION
                or not kept_mask(layer.outputs, layer.out_channels, kept).all()
            ),
            len(choices),
        )

        def handle(call: Call) -> torch.Tensor:
            t = self._place[call.name]
            if t >= len(choices):
                raise _ReachedError
            layer = self.layers[t]
            if (done := steps.get(call.name)) is not None:
                return self._again(call, done.fitted, choices[t][1])
            steps[call.name] = self._step(layer, call, kept, choices[t][1], t < first)
            return steps[call.name].y

        def estimate(name: str) -> Callable[..., None]:
            def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                assert isinstance(module, NORMS)
                assert module.running_mean is not None
                assert module.running_var is not None
                everything = torch.arange(len(module.running_mean))
                untouched = len(steps) <= first
                x = first_input(args, kwargs)
                found = self._statistics(module, x, everything, untouched)
                statistics[name] = found
                module.running_mean.copy_(found[0])
                module.running_var.copy_(found[1])

            return pre

        live = {}
        with torch.inference_mode(), ExitStack() as stack:
            stack.enter_context(self._low_precision())
            small = cut(self._model, self.network, kept)
            for name, module in small.named_modules():
                if estimated(module) and name not in self._shared:
                    hook = module.register_forward_pre_hook(estimate(name), with_kwargs=True)
                    stack.callback(hook.remove)
            weights = {n: w for n, w in layer_weights(small).items() if n in self._place}
            stack.enter_context(LayerCalls(weights, handle))
            with suppress(_ReachedError):
                live["logits"] = small(self._batch.to(self.dtype, copy=True))
        fitted: dict[str, FittedLayer] = {}
        norms: Statistics = {}
        if collect:
            for layer in self.layers:
                if (step := steps.get(layer.name)) is None:
                    continue
                fitted[layer.name] = step.fitted
                if layer.batch_norm:
                    mean, variance = statistics.pop(layer.batch_norm)
                    mean = mean if step.centre_O is None else mean + step.centre_O
                    fitted[layer.name] = replace(step.fitted, mean_O=mean, variance_O=variance)
            norms = statistics
        residues = tuple(
            steps[layer.name].residue if layer.name in steps else 0.0
            for layer, _ in zip(self.layers, choices, strict=False)
        )
        return Prefix(choices, live, kept, residues, fitted, norms)

    def _again(self, call: Call, fitted: FittedLayer, bits: int) -> torch.Tensor:
        """A layer that is used once more, as its first use left it."""
        weight = fitted.weight
        if fitted.scale_O is not None:
            weight = fake_quantize(weight, fitted.scale_O, bits)
        return call.apply(weight, fitted.bias, call.conv_groups)
