"""Whether a file's network can be built again from what the file says: what is written, and what
its `ModelRef` builds, are one network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rlcompress.core.cost import CostModel
from rlcompress.core.errors import UserError
from rlcompress.core.graph import Network
from rlcompress.core.models import BUILT_IN
from rlcompress.core.schedule import FULL_PRECISION, Schedule

if TYPE_CHECKING:
    from rlcompress.core.artifact import ModelRef
    from rlcompress.core.fitted import CutNetwork


def skeleton(ref: ModelRef) -> nn.Module | None:
    """The network without memory; None if its constructor needs real numbers."""
    try:
        with torch.device("meta"):
            return ref.build()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        if ref.factory in BUILT_IN:
            raise
        return None


def require_rebuilds(ref: ModelRef, network: Network) -> None:
    """Raises UserError unless `ref` builds the network that `network` describes, module by module
    and tensor by tensor: no file of it could be read back."""
    model = skeleton(ref) or ref.build()
    pairs = itertools.zip_longest(
        (name for name, _ in model.named_modules()), network.modules, fillvalue="nothing"
    )
    other = next((f"module {i} is {a or 'the root'}, there it is {b or 'the root'}"
                  for i, (a, b) in enumerate(pairs) if a != b), None)  # fmt: skip
    other = other or next(_other_shapes(model, network), None)
    if other is not None:
        raise UserError(
            f"ModelRef {ref.factory} with {dict(ref.args)}, {ref.num_classes} classes and input "
            f"{tuple(ref.input_shape)}: builds another network than the one to be written: {other}"
        )


def _other_shapes(model: nn.Module, network: Network) -> Iterator[str]:
    modules, state = dict(model.named_modules()), model.state_dict()
    for layer in network.layers.values():
        weight = getattr(modules[layer.name], "weight", None)
        shape = () if weight is None else tuple(weight.shape)
        fan = layer.in_channels // layer.conv_groups
        built = (*shape[:2], int(np.prod(shape[2:])))
        there = (layer.out_channels, fan, layer.kernel)
        if built != there:
            mine, theirs = (" x ".join(map(str, numbers)) for numbers in (built, there))
            yield f"layer {layer.name!r} has {mine} weights, there {theirs}"
    for norm in network.norms:
        channels = getattr(modules[norm.name], "num_features", None)
        if channels != norm.channels:
            yield f"{norm.name!r} has {channels} channels, there {norm.channels}"
    for name, shape in network.rest.items():
        known = tuple(state[name].shape) if name in state else None
        if known != shape:
            yield f"{name!r} is of shape {known}, there {shape}"


def require_one_network(small: CutNetwork, network: Network, schedule: Schedule) -> None:
    """Raises UserError unless `small` is `network`, cut and quantized by `schedule`."""
    network.validate(schedule)
    modules, costs = dict(small.model.named_modules()), CostModel(network)
    ((numbers_L,), (out_L,)) = costs.weights(costs.rows(schedule)[0])
    widths, shapes = [], []
    for (name, layer), numbers, out in zip(network.layers.items(), numbers_L, out_L, strict=True):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise UserError(f"the cut network is of another network: it has no layer {name!r}")
        bits, width = small.bits.get(name, FULL_PRECISION), schedule.width(name)
        if bits != width:
            widths.append(f"layer {name!r} was made for {bits} bits, the schedule has {width}")
        shape, left = tuple(weight.shape[:2]), (int(out), int(numbers // (out * layer.kernel)))
        if shape != left:
            shapes.append(f"layer {name!r} has {shape} channels, the schedule leaves {left}")
    found = [f"the cut network: {lines[0]}{_more(lines)}" for lines in (widths, shapes) if lines]
    if found:
        raise UserError(*found)


def _more(lines: Sequence[str]) -> str:
    return f" ({len(lines) - 1} more layers too)" if len(lines) > 1 else ""


def require_kept(model: nn.Module, network: Network, ref: ModelRef) -> None:
    """Raises UserError if tensors of `model` that are no floats, which no file holds, are others
    than those of the network that `ref` builds."""
    mine = _constants(model, network)
    built = _constants(ref.build(), network) if mine else {}
    lost = [
        f"{name} ({tensor.dtype})"
        for name, tensor in mine.items()
        if name not in built
        or built[name].dtype != tensor.dtype
        or not torch.equal(built[name], tensor.cpu())
    ]
    if lost:
        raise UserError(
            f"{', '.join(lost)}: not what {ref.factory} builds; a file holds floats and leaves all "
            "else to the constructor; allowed: the same values whatever the seed and the training"
        )


def _constants(model: nn.Module, network: Network) -> dict[str, torch.Tensor]:
    """Name in the state dict -> tensor that is no float, of what the output depends on."""
    known, unused = {*network.modules}, tuple(f"{name}." for name in network.unused)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not tensor.is_floating_point()
        # Read in training alone.
        and not name.endswith("num_batches_tracked")
        and name.rpartition(".")[0] in known
        and not name.startswith(unused)
    }
