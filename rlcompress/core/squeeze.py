"""Parts of compression during training: when decisions fall, and how a weight pretends to be cut
and quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from rlcompress.core.errors import UserError
from rlcompress.core.fitted import CutNetwork
from rlcompress.core.graph import Layer, Network, kept_mask
from rlcompress.core.inputs import borrowed
from rlcompress.core.prune import cut, most_important
from rlcompress.core.quant import (
    fake_quantize,
    float_weight,
    layer_outputs,
    max_code,
    scale_of,
    unexplained,
)
from rlcompress.core.schedule import FULL_PRECISION, Schedule


@dataclass(frozen=True)
class Pace:
    """When decisions are taken, in minibatches.

    warmup          before the first;  recovery_steps  from one to the next
    rounds          passes over the layers;  watch  minibatches that a pass is prepared on
    """

    warmup: int = 100
    recovery_steps: int = 10
    rounds: int = 2
    watch: int = 20

    def __post_init__(self) -> None:
        least = {"warmup": 2 * self.watch + 1, "recovery_steps": 1, "rounds": 1, "watch": 2}
        found = [
            f"{name} = {getattr(self, name)}: must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if found:
            raise UserError(*found)

    def steps(self, layers: int) -> int:
        """Until the last decision's recovery is over."""
        return self.warmup + self.rounds * layers * self.recovery_steps


class Squeeze(nn.Module):
    """Parametrization: the weight as it will be when the network is cut and quantized.

    mask   over the inputs, broadcast to the weight;  bits  of the weights
    clip_O share of a channel's largest kept weight that is representable
    """

    mask: torch.Tensor
    clip_O: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.bits = FULL_PRECISION
        ones = torch.ones(1, *weight.shape[1:2], *[1] * (weight.dim() - 2)).to(weight)
        # Not in the model's own state: the compressor's says what they are.
        self.register_buffer("mask", ones, persistent=False)
        self.register_buffer("clip_O", ones.new_ones(weight.shape[0]), persistent=False)

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """scale_O at this moment."""
        return scale_of(weight * self.mask, self.clip_O, self.bits)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.bits == FULL_PRECISION:
            value, through = weight, weight
        else:
            scale_O = self.scale(weight)
            value = fake_quantize(weight.detach(), scale_O, self.bits)
            top = (max_code(self.bits) * scale_O).view(-1, *[1] * (weight.dim() - 1))
            through = torch.maximum(torch.minimum(weight, top), -top)
        return (value * self.mask).detach() + (through - through.detach())


class Squeezed:
    """A network that computes what it would compute cut and quantized, its weights kept.

    kept         group -> mask of the channels that are alive;  ratios  group -> keep ratio
    unexplained  layer -> share of its outputs' variance that its last choice left unexplained

    Puts a parametrization on every layer of `model`, until `release`.
    """

    def __init__(self, model: nn.Module, network: Network) -> None:
        self.model, self.network = model, network
        self.kept = {g: np.ones(x.channels, dtype=bool) for g, x in network.groups.items()}
        self.ratios = dict.fromkeys(network.groups, 1.0)
        self.unexplained = dict.fromkeys(network.layers, 0.0)
        modules = dict(model.named_modules())
        self._modules = {name: modules[name] for name in network.layers}
        self._squeezes: dict[str, Squeeze] = {}
        for name, module in self._modules.items():
            self._squeezes[name] = Squeeze(module.weight)  # type: ignore[arg-type]
            parametrize.register_parametrization(module, "weight", self._squeezes[name])

    @property
    def schedule(self) -> Schedule:
        keep = {g: k for g, k in self.ratios.items() if not self.network.groups[g].protected}
        return Schedule(keep, {name: s.bits for name, s in self._squeezes.items()})

    def bits(self, layer: str) -> int:
        return self._squeezes[layer].bits

    def cut(self, group: str, ratio: float, importance_C: np.ndarray) -> None:
        """Leaves a group its most important channels; of equal ones the first."""
        count = self.network.groups[group].count(ratio)
        self.keep_channels(group, ratio, most_important(importance_C, count))

    def keep_channels(self, group: str, ratio: float, alive_C: np.ndarray) -> None:
        """Leaves a group these channels: masks what reads it."""
        self.kept[group], self.ratios[group] = alive_C.copy(), ratio
        for layer in self.network.layers.values():
            if any(link.group == group for link in layer.inputs):
                self._mask(layer)

    def _mask(self, layer: Layer) -> None:
        if layer.conv_groups != 1:  # depthwise: its readers are masked
            return
        mask = self._squeezes[layer.name].mask
        alive = kept_mask(layer.inputs, layer.in_channels, self.kept)
        mask.copy_(torch.from_numpy(alive).view_as(mask))

    @torch.no_grad()
    def quantize(
        self,
        layer: Layer,
        bits: int,
        clip_O: torch.Tensor | None,
        patches_PGD: torch.Tensor | None = None,
    ) -> None:
        """Gives a layer its bits. `patches_PGD`: what it reads, to see what that costs."""
        squeeze, module = self._squeezes[layer.name], self._modules[layer.name]
        squeeze.bits = bits
        if clip_O is not None:
            squeeze.clip_O.copy_(clip_O.to(squeeze.clip_O))
        if patches_PGD is None:
            return
        out = kept_mask(layer.outputs, layer.out_channels, self.kept)
        alive = torch.from_numpy(out).to(patches_PGD.device)
        full = layer_outputs(patches_PGD, float_weight(module))[:, alive]
        now = layer_outputs(patches_PGD, module.weight)[:, alive]  # type: ignore[arg-type]
        self.unexplained[layer.name] = float(unexplained(full, now).mean())

    @torch.no_grad()
    def release(self) -> CutNetwork:
        """The cut network, in eval mode, its weights on their quantizers' grids. `model` is plain
        again, with the weights that it learned."""
        for module in self._modules.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        small = cut(self.model, self.network, self.kept).eval()
        modules, scales = dict(small.named_modules()), {}
        for name, layer in self.network.layers.items():
            squeeze, weight = self._squeezes[name], modules[name].weight
            assert isinstance(weight, torch.Tensor)
            if squeeze.bits != FULL_PRECISION:
                out = kept_mask(layer.outputs, layer.out_channels, self.kept)
                clip_O = squeeze.clip_O[torch.from_numpy(out).to(weight.device)]
                scales[name] = scale_of(weight, clip_O, squeeze.bits)
                weight.copy_(fake_quantize(weight, scales[name], squeeze.bits))
        return CutNetwork(small, scales, {name: self._squeezes[name].bits for name in scales})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the weights are in the model's own."""
        return {
            "ratios": dict(self.ratios),
            "kept": {name: torch.from_numpy(mask.copy()) for name, mask in self.kept.items()},
            "bits": {name: squeeze.bits for name, squeeze in self._squeezes.items()},
            "clip": {name: squeeze.clip_O.clone() for name, squeeze in self._squeezes.items()},
            "unexplained": dict(self.unexplained),
        }

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the state is of these layers and groups."""
        return all(
            state[kind].keys() == own.keys()
            and all(state[kind][name].shape == tensor.shape for name, tensor in own.items())
            for kind, own in self.state_dict().items()
            if kind in ("kept", "clip")
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ratios, self.unexplained = dict(state["ratios"]), dict(state["unexplained"])
        self.kept = {name: mask.cpu().numpy().copy() for name, mask in state["kept"].items()}
        for name, squeeze in self._squeezes.items():
            squeeze.bits = state["bits"][name]
            squeeze.clip_O.copy_(state["clip"][name])
            self._mask(self.network.layers[name])


@torch.no_grad()
def require_called(model: nn.Module, network: Network, example: torch.Tensor) -> None:
    """Raises UserError for layers whose weight is used by other code than their module's call."""
    modules = dict(model.named_modules())
    called: set[str] = set()
    hooks = [
        modules[name].register_forward_hook(lambda *_, name=name: called.add(name))
        for name in network.layers
    ]
    with borrowed(model):
        model(example.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    missing = [name for name in network.layers if name not in called]
    if missing:
        raise UserError(
            *(f"{name}: its weight is read by other code than its module" for name in missing)
        )
