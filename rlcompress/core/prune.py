"""Cutting channels: which ones survive, masks that pretend, and the cut that is real."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.utils import parametrize

from rlcompress.core.graph import Network, kept_mask


def kept_channels(
    network: Network, importance: Mapping[str, np.ndarray], counts: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Group -> mask (channels,) of its `counts` most important channels.

    Ties go to the lower channel, so equal importance gives equal cuts everywhere.
    """
    kept = {}
    for name, group in network.groups.items():
        mask = np.zeros(group.channels, dtype=bool)
        order = np.argsort(-np.asarray(importance[name]), kind="stable")
        mask[order[: counts[name]]] = True
        kept[name] = mask
    return kept


def first_channels(network: Network, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Group -> mask of its first `counts` channels: the shape of a cut without its weights."""
    return {
        name: np.arange(group.channels) < counts[name] for name, group in network.groups.items()
    }


def cut(model: nn.Module, network: Network, kept: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of `model` with every channel outside `kept` physically removed."""
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    for layer in network.layers.values():
        module = modules[layer.name]
        gone_out = np.flatnonzero(~kept_mask(layer.outputs, layer.out_channels, kept)).tolist()
        if layer.kind == "depthwise":
            if gone_out:
                tp.prune_depthwise_conv_out_channels(module, gone_out)
        else:
            gone_in = np.flatnonzero(~kept_mask(layer.inputs, layer.in_channels, kept)).tolist()
            linear = isinstance(module, nn.Linear)
            if gone_in:
                prune_in = tp.prune_linear_in_channels if linear else tp.prune_conv_in_channels
                prune_in(module, gone_in)
            if gone_out:
                prune_out = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
                prune_out(module, gone_out)
        if layer.batch_norm and gone_out:
            tp.prune_batchnorm_out_channels(modules[layer.batch_norm], gone_out)
    for norm in network.norms:
        gone = np.flatnonzero(~kept_mask(norm.links, norm.channels, kept)).tolist()
        if gone:
            tp.prune_batchnorm_out_channels(modules[norm.name], gone)
    return small


class Mask(nn.Module):
    """Parametrization: weight x mask. The weights behind a mask stay, so a cut can be undone."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def attach_masks(model: nn.Module, network: Network, kept: Mapping[str, np.ndarray]) -> None:
    """Masks `model` in place so that it computes what `cut` would.

    Zeroing what reads a channel is exact whatever lies between (an activation may map 0 to
    something else); zeroing the channel's own filter keeps its gradients at zero as well.
    """
    modules = dict(model.named_modules())
    for layer in network.layers.values():
        module = modules[layer.name]
        weight = module.weight
        out_keep = torch.from_numpy(kept_mask(layer.outputs, layer.out_channels, kept))
        mask = out_keep.to(weight).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()
        if layer.kind != "depthwise":
            in_keep = torch.from_numpy(kept_mask(layer.inputs, layer.in_channels, kept))
            if layer.conv_groups == 1:
                mask *= in_keep.to(weight).view(1, -1, *[1] * (weight.dim() - 2))
        parametrize.register_parametrization(module, "weight", Mask(mask))


def detach(model: nn.Module) -> None:
    """Removes every parametrization in place; what they computed becomes the weights."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
