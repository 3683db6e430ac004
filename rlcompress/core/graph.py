"""What a network is made of: layers, the groups that must be cut together, and how they connect.

`structure.build_network` reads it off a model. A worked example, two residual blocks' ends:

    conv1 (64) ──┐
                 add ── conv3          group "conv1": channels 64, owner conv1
    conv2 (64) ──┘                       outputs: conv1, conv2 (and their batch norms)
                                         inputs:  conv3 (in-channel j reads group channel j)

Cutting channel j of the group cuts output j of conv1 and conv2 and input j of conv3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.schedule import Schedule

LayerModule: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Link:
    """A module's channels that belong to a group: module channel `index[i]` is group channel
    `root[i]`. `root` repeats where one channel spans several features (a flattened map)."""

    group: str
    root: np.ndarray
    index: np.ndarray

    def kept(self, size: int, keep_group: np.ndarray) -> np.ndarray:
        """Mask (size,) of the module's channels that survive this group's mask."""
        mask = np.ones(size, dtype=bool)
        mask[self.index] = keep_group[self.root]
        return mask


@dataclass(frozen=True)
class Layer:
    """One weight-carrying module. `kind`: conv, pointwise, depthwise, grouped or linear.

    `group` is None where its output channels may not be cut; `protected` says why.
    """

    name: str
    kind: str
    group: str | None
    inputs: tuple[Link, ...]
    outputs: tuple[Link, ...]
    in_channels: int
    out_channels: int
    conv_groups: int
    kernel: int  # kernel positions: 9 for 3 x 3
    positions: int  # output positions of one image
    batch_norm: str | None  # the one that alone reads the output: folded into the layer
    has_bias: bool
    protected: str = ""

    @property
    def weights(self) -> int:
        return self.out_channels * (self.in_channels // self.conv_groups) * self.kernel

    @property
    def macs(self) -> int:
        return self.weights * self.positions


@dataclass(frozen=True)
class Group:
    """Coupled output channels. `owner` is the first of its layers in forward order: its step
    decides `keep`. `protected` says why nothing may be cut, or is empty. What is kept is a
    multiple of `round_to`, or everything."""

    name: str
    channels: int
    owner: str
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    protected: str = ""
    round_to: int = 1

    def count(self, ratio: float) -> int:
        """Channels that survive at `ratio`: at least one, at least `round_to` if there are."""
        if self.protected or ratio >= 1.0:
            return self.channels
        count = math.floor(ratio * self.channels / self.round_to + 0.5) * self.round_to
        return min(self.channels, max(self.round_to, count))


@dataclass(frozen=True)
class Norm:
    """A normalisation that no layer can absorb: its vectors are stored beside the weights. One that
    is used more than once keeps its statistics: no two places have the same."""

    name: str
    vectors: int
    channels: int
    links: tuple[Link, ...]
    uses: int = 1


@dataclass(frozen=True)
class Network:
    """The structure of one network, in forward order. Holds no weights.

    rest    name in the state dict -> shape of every other float tensor that the output needs
    unused  modules that the output does not depend on (heads that only training uses)
    unread  parts whose channels could not be read -> why
    modules names of all modules, in the model's own order
    """

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    norms: tuple[Norm, ...]
    input_shape: tuple[int, ...]  # (C, H, W)
    rest: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def owned_group(self, layer: str) -> Group | None:
        """The group whose `keep` is decided at this layer, if any may be cut there."""
        name = self.layers[layer].group
        group = self.groups[name] if name else None
        return group if group and group.owner == layer and not group.protected else None

    def counts(self, schedule: Schedule) -> dict[str, int]:
        """Group -> channels that survive."""
        return {g.name: g.count(schedule.ratio(g.name)) for g in self.groups.values()}

    def uniform(self, keep: float, bits: int) -> Schedule:
        """The same keep ratio and bits everywhere."""
        return Schedule(
            {g.name: keep for g in self.groups.values() if not g.protected},
            dict.fromkeys(self.layers, bits),
        )

    def validate(self, schedule: Schedule) -> None:
        """Raises UserError naming every group and layer the network does not have."""
        if not isinstance(schedule, Schedule):
            raise UserError(f"schedule: a {type(schedule).__name__}; allowed: a Schedule")
        problems = [
            f"schedule {part}: no {part_name} {name!r} in the network"
            for part, part_name, names, known in (
                ("keep", "group", schedule.keep, self.groups),
                ("bits", "layer", schedule.bits, self.layers),
            )
            for name in names
            if name not in known
        ]
        if problems:
            raise UserError(*problems)


def kept_mask(links: Sequence[Link], size: int, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mask (size,) of a module's channels when each group keeps its mask in `kept`."""
    mask = np.ones(size, dtype=bool)
    for link in links:
        if link.group in kept:
            mask &= link.kept(size, kept[link.group])
    return mask
