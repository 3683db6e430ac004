"""What an evaluator made of the layers, as a network of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlcompress.core.graph import Network
from rlcompress.core.prune import cut
from rlcompress.core.reading import NORMS
from rlcompress.core.schedule import Schedule

if TYPE_CHECKING:
    from rlcompress.core.evaluate import Evaluator
    from rlcompress.core.prefix import FittedLayer, Prefix


@dataclass
class CutNetwork:
    """A cut network with float weights, and the scale_O (O,) of each quantized layer: what a
    step of its integer codes is worth, in units of the weights; 0 of a channel that is."""

    model: nn.Module
    scales: dict[str, torch.Tensor]

    def cpu(self) -> CutNetwork:
        return CutNetwork(self.model.cpu(), {n: scale.cpu() for n, scale in self.scales.items()})


def fitted_network(model: nn.Module, evaluator: Evaluator, schedule: Schedule) -> CutNetwork:
    """What the evaluator scored, as a network: `model`, the evaluator's, cut by `schedule`, with
    refitted float weights and batch statistics, in eval mode; `model` itself stays whole.

    Takes one evaluation. Raises UserError on groups and layers that the network does not have, and
    on a width that was not estimated.
    """
    return network_of(model, evaluator.network, evaluator.run(schedule, collect=True))


def network_of(model: nn.Module, network: Network, prefix: Prefix) -> CutNetwork:
    """The network of a prefix in which every layer is decided and was collected."""
    fitted = prefix.fitted
    small = cut(model, network, prefix.kept)
    modules = dict(small.named_modules())
    scales = {}
    with torch.no_grad():
        for name, layer in network.layers.items():
            part: FittedLayer = fitted[name]
            module = modules[name]
            module.weight.copy_(part.weight)  # type: ignore[union-attr, operator]
            if part.bias is not None:
                module.bias.copy_(part.bias)  # type: ignore[union-attr, operator]
            if part.scale_O is not None:
                scales[name] = part.scale_O.clone()
            if layer.batch_norm:
                assert part.mean_O is not None
                assert part.variance_O is not None
                _set_statistics(modules[layer.batch_norm], part.mean_O, part.variance_O)
        for name, (mean, variance) in prefix.norms.items():
            _set_statistics(modules[name], mean, variance)
    return CutNetwork(small.eval(), scales)


def _set_statistics(norm: nn.Module, mean: torch.Tensor, variance: torch.Tensor) -> None:
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
