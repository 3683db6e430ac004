"""Cutting channels: which ones survive, masks that pretend, and the cut that is real."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from rlcompress.core.graph import Layer, Link, Network, kept_mask
from rlcompress.core.reading import NORMS, leave_out


def most_important(importance_C: np.ndarray, count: int) -> np.ndarray:
    """Mask (C,) of the `count` most important channels. Ties go to the lower channel, so equal
    importance gives equal cuts everywhere."""
    mask = np.zeros(len(importance_C), dtype=bool)
    mask[np.argsort(-np.asarray(importance_C), kind="stable")[:count]] = True
    return mask


def kept_channels(
    network: Network, importance: Mapping[str, np.ndarray], counts: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Group -> mask (channels,) of its `counts` most important channels; see `most_important`."""
    return {name: most_important(importance[name], counts[name]) for name in network.groups}


def _indices(links: Sequence[Link], size: int, kept: Mapping[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(kept_mask(links, size, kept)))


def _take(
    module: nn.Module, name: str, index: torch.Tensor, dim: int, *, whole: bool = False
) -> None:
    """Leaves a tensor these entries along `dim`; `whole`: a new one even if it has no others."""
    tensor = getattr(module, name)
    if tensor is None or (len(index) == tensor.shape[dim] and not whole):
        return
    smaller = tensor.detach().index_select(dim, index.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(module, name, smaller)


def resize(module: nn.Module) -> None:
    """Makes the numbers that a layer or norm keeps beside its tensors say what these say."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        out, fan = module.weight.shape[:2]
        if module.groups == module.in_channels == module.out_channels:
            module.groups = out
        module.out_channels, module.in_channels = out, fan * module.groups
    elif isinstance(module, NORMS):
        assert module.running_mean is not None
        module.num_features = len(module.running_mean)


def cut(model: nn.Module, network: Network, kept: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of `model` with every channel outside `kept` (group -> mask (channels,)) physically
    removed, and without what its output does not depend on: it computes what `masked` does. A group
    that `kept` does not name stays whole."""
    small = copy.deepcopy(model)
    for name in network.unused:
        leave_out(small, name)
    modules = dict(small.named_modules())
    for layer in network.layers.values():
        module = modules[layer.name]
        out = _indices(layer.outputs, layer.out_channels, kept)
        _take(module, "weight", out, 0)
        _take(module, "bias", out, 0)
        if layer.conv_groups == 1:
            _take(module, "weight", _indices(layer.inputs, layer.in_channels, kept), 1)
        resize(module)
        if layer.batch_norm:
            _cut_norm(modules[layer.batch_norm], out)
    for norm in network.norms:
        _cut_norm(modules[norm.name], _indices(norm.links, norm.channels, kept))
    return small


def _cut_norm(module: nn.Module, index: torch.Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        # Its own even if nothing is cut: rounding changes what others may share.
        _take(module, name, index, 0, whole=True)
    resize(module)


class Mask(nn.Module):
    """Parametrization: weight x mask. The weights behind a mask stay, so a cut can be undone."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def _weight_mask(
    layer: Layer, weight: torch.Tensor, kept: Mapping[str, np.ndarray]
) -> torch.Tensor:
    """Zeroing what reads a channel is exact whatever lies between (an activation may map 0 to
    something else); zeroing the channel's own filter keeps its gradients at zero as well."""
    ones = [1] * (weight.dim() - 2)
    out_keep = torch.from_numpy(kept_mask(layer.outputs, layer.out_channels, kept))
    mask = out_keep.to(weight).view(-1, 1, *ones).expand_as(weight).clone()
    if layer.conv_groups == 1:
        in_keep = torch.from_numpy(kept_mask(layer.inputs, layer.in_channels, kept))
        mask *= in_keep.to(weight).view(1, -1, *ones)
    return mask


def attach_masks(model: nn.Module, network: Network, kept: Mapping[str, np.ndarray]) -> None:
    """Masks `model` in place so that it computes what `cut` would."""
    modules = dict(model.named_modules())
    for layer in network.layers.values():
        module = modules[layer.name]
        mask = _weight_mask(layer, module.weight, kept)
        parametrize.register_parametrization(module, "weight", Mask(mask))


@torch.no_grad()
def masked(
    model: nn.Module, network: Network, kept: Mapping[str, np.ndarray], *, filters: bool = True
) -> nn.Module:
    """A copy of `model` with zeros in the weights that `cut` removes. Without `filters` in those
    that read a channel alone: what it computes goes on, as in compression during training."""
    zeroed = copy.deepcopy(model)
    modules = dict(zeroed.named_modules())
    for layer in network.layers.values():
        weight = modules[layer.name].weight
        seen = layer if filters else replace(layer, outputs=())
        weight.mul_(_weight_mask(seen, weight, kept))
    return zeroed


def detach(model: nn.Module) -> None:
    """Removes every parametrization in place; what they computed becomes the weights."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
