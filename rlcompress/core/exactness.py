"""Whether cutting channels computes what masking their readers does: groups that fail that stay
whole."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from rlcompress.core.errors import UserError, first_line
from rlcompress.core.graph import Link, Network
from rlcompress.core.prune import cut, masked
from rlcompress.core.reading import NORMS

#: Largest difference between a masked and a cut network, relative to the largest output.
TOLERANCE = 1e-4
CHECK_SECONDS = 20.0
#: Factor of the images that one of the check's cuts is tried on: what divides channels by their
#: neighbours, as local response normalization does, shows where values are large.
LARGE = 16.0


def _protect(network: Network, names: Sequence[str], reason: str) -> Network:
    groups = {
        name: replace(group, protected=reason) if name in names else group
        for name, group in network.groups.items()
    }
    layers = {
        name: replace(layer, protected=reason) if layer.group in names else layer
        for name, layer in network.layers.items()
    }
    return replace(network, groups=groups, layers=layers)


def _agrees(model: nn.Module, network: Network, names: Collection[str], x: torch.Tensor) -> bool:
    """Whether cutting channels of these groups computes what masking their readers does: at random
    to a half of one group and a quarter of the next, as some groups need the same number; and to
    the first half of each, which falls on one side of whatever splits them."""
    rng = np.random.default_rng(0)
    for order, shares, scale in (
        (rng.permutation, (2, 4), 1.0),
        (rng.permutation, (2, 4), LARGE),
        (np.arange, (2, 2), 1.0),
    ):
        kept, image = {}, scale * x
        for i, (name, group) in enumerate(network.groups.items()):
            if name in names:
                few = max(1, group.channels // shares[i % 2])
                kept[name] = np.zeros(group.channels, dtype=bool)
                kept[name][order(group.channels)[:few]] = True
        try:
            small = cut(model, network, kept)(image.clone())
        except Exception:
            return False  # whatever a wrongly cut network raises
        # The cut channels still compute: what mixes them with others behind them shows.
        wanted = masked(model, network, kept, filters=False)(image.clone())
        limit = TOLERANCE * wanted.abs().max()
        if small.shape != wanted.shape or not bool((small - wanted).abs().max() <= limit):
            return False
    return True


def by_halves(
    names: Sequence[str], agrees: Callable[[Collection[str]], bool]
) -> tuple[list[str], list[str], list[str]]:
    """Of `names` those that agree, all together; those that do not; and those that could not be
    told within `CHECK_SECONDS`."""
    deadline = time.process_time() + CHECK_SECONDS
    exact: list[str] = []
    wrong: list[str] = []
    unsure: list[str] = []

    def search(names: Sequence[str]) -> None:
        """Adds those to `exact` that agree together with what it has."""
        if not names:
            return
        if agrees({*exact, *names}):
            exact.extend(names)
        elif len(names) == 1:
            wrong.extend(names)
        elif time.process_time() > deadline:
            unsure.extend(names)
        else:
            search(names[: len(names) // 2])
            search(names[len(names) // 2 :])

    search(names)
    return exact, wrong, unsure


@torch.no_grad()
def random_copy(model: nn.Module) -> nn.Module:
    """A copy with random weights: a head or a branch that starts at zero would hide what is cut
    before it. Raises UserError for a network that cannot be copied."""
    try:
        probe = copy.deepcopy(model)
    except Exception as error:  # what the user's own code keeps may have no copy
        raise UserError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.5 + 0.1 * noise)
    for module in probe.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            assert module.running_var is not None
            mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_mean.copy_(mean)
            module.running_var.fill_(1.0)
    return probe


@torch.no_grad()
def checked(model: nn.Module, network: Network) -> Network:
    """The network with every group protected whose cut is not exact, or could not be shown to be
    in time."""
    names = [name for name, group in network.groups.items() if not group.protected]
    device = next(model.parameters()).device
    model = random_copy(model)
    x = torch.randn(2, *network.input_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(device)
    _, wrong, unsure = by_halves(names, lambda some: _agrees(model, network, some, x))
    network = _protect(network, wrong, "a cut there changes what other channels compute")
    network = _protect(network, unsure, "that a cut there is exact could not be checked in time")
    return _without_protected_links(network)


def _without_protected_links(network: Network) -> Network:
    """What is never cut needs no map of its channels, and the map may be wrong."""

    def free(links: tuple[Link, ...]) -> tuple[Link, ...]:
        return tuple(link for link in links if not network.groups[link.group].protected)

    layers = {
        name: replace(
            layer,
            group=None if layer.protected else layer.group,
            inputs=free(layer.inputs),
            outputs=free(layer.outputs),
        )
        for name, layer in network.layers.items()
    }
    norms = tuple(replace(norm, links=free(norm.links)) for norm in network.norms)
    return replace(network, layers=layers, norms=norms)
