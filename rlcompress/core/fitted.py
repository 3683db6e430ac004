"""What an evaluator made of the layers, as a network of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlcompress.core.graph import Network
from rlcompress.core.prune import cut
from rlcompress.core.quant import attach_fake_quant, float_weight, learned_scales
from rlcompress.core.reading import NORMS
from rlcompress.core.schedule import Schedule

if TYPE_CHECKING:
    from rlcompress.core.evaluate import Evaluator
    from rlcompress.core.prefix import FittedLayer, Prefix


@dataclass
class CutNetwork:
    """A cut network with float weights, and the scale_O (O,) of each quantized layer: what a
    step of its integer codes is worth, in units of the weights; 0 of a channel that is. `bits` are
    those that the scales are for."""

    model: nn.Module
    scales: dict[str, torch.Tensor]
    bits: Mapping[str, int]

    def cpu(self) -> CutNetwork:
        scales = {name: scale.cpu() for name, scale in self.scales.items()}
        return CutNetwork(self.model.cpu(), scales, self.bits)


def fitted_network(model: nn.Module, evaluator: Evaluator, schedule: Schedule) -> CutNetwork:
    """What the evaluator scored, as a network: `model`, the evaluator's, cut by `schedule`, with
    refitted float weights and batch statistics, in eval mode, trained where `recovery` says so;
    `model` itself stays whole.

    Takes one evaluation. Raises UserError on groups and layers that the network does not have, and
    on a width that was not estimated.
    """
    prefix = evaluator.run(schedule, collect=True)
    if evaluator.steps:
        return evaluator.retrained(prefix)
    return network_of(model, evaluator.network, prefix)


def network_of(model: nn.Module, network: Network, prefix: Prefix) -> CutNetwork:
    """The network of a prefix in which every layer is decided and was collected."""
    fitted = prefix.fitted
    small = cut(model, network, prefix.kept)
    modules = dict(small.named_modules())
    scales, bits = {}, {}
    with torch.no_grad():
        for (name, layer), (_, width) in zip(network.layers.items(), prefix.choices, strict=True):
            part: FittedLayer = fitted[name]
            module = modules[name]
            module.weight.copy_(part.weight)  # type: ignore[union-attr, operator]
            if part.bias is not None:
                module.bias.copy_(part.bias)  # type: ignore[union-attr, operator]
            if part.scale_O is not None:
                scales[name], bits[name] = part.scale_O.clone(), width
            if layer.batch_norm:
                assert part.mean_O is not None
                assert part.variance_O is not None
                _set_statistics(modules[layer.batch_norm], part.mean_O, part.variance_O)
        for name, (mean, variance) in prefix.norms.items():
            _set_statistics(modules[name], mean, variance)
    return CutNetwork(small.eval(), scales, bits)


def trainee(start: CutNetwork, network: Network) -> nn.Module:
    """A copy that is to be trained quantization-aware. A network that comes frozen is a finished
    one: what is compressed is trained all the same, and all of it where nothing else is."""
    model = copy.deepcopy(start.model)
    whole = not any(parameter.requires_grad for parameter in model.parameters())
    norms = {layer.batch_norm for layer in network.layers.values()}
    compressed = {*network.layers, *norms, *(norm.name for norm in network.norms)}
    for name, module in model.named_modules():
        if whole or name in compressed:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())
    attach_fake_quant(model, network, start.bits, start.scales)
    return model


def trained(start: CutNetwork, network: Network, model: nn.Module) -> CutNetwork:
    """What a `trainee` of `start` has become: float weights and learned scales."""
    plain = copy.deepcopy(start.model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        state = {n: t for n, t in model.state_dict().items() if "parametrizations" not in n}
        plain.load_state_dict(state, strict=False)
        for name, module in plain.named_modules():
            if name in network.layers:
                module.weight.copy_(float_weight(modules[name]))  # type: ignore[union-attr, operator]
    return CutNetwork(plain.eval(), {**start.scales, **learned_scales(model)}, start.bits)


def _set_statistics(norm: nn.Module, mean: torch.Tensor, variance: torch.Tensor) -> None:
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
