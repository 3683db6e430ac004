"""A network's structure as tables and notes for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from rlcompress.core.cost import CostModel
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.graph import Network
from rlcompress.core.schedule import Schedule
from rlcompress.live import console


def show_structure(network: Network) -> None:
    """Layers, groups, what is protected and why, and the dense cost."""
    table = _table("layer", "kind", "in", "out", "kernel", "params", "MACs", "keep is decided by")
    for layer in network.layers.values():
        if layer.protected:
            decided = f"nothing: {layer.protected}"
        else:
            group = network.groups[layer.group]  # type: ignore[index]
            decided = "this layer" if group.owner == layer.name else group.owner
        numbers = (layer.in_channels, layer.out_channels, layer.kernel, layer.weights, layer.macs)
        table.add_row(layer.name, layer.kind, *(f"{n:,}" for n in numbers), decided)
    console.print(table)
    table = _table("group", "channels", "layers", "read by", "protected because")
    for group in network.groups.values():
        layers, readers = (_few(names) for names in (group.layers, group.consumers))
        table.add_row(group.name, f"{group.channels:,}", layers, readers, group.protected)
    console.print(table)
    whole = sum(bool(group.protected) for group in network.groups.values())
    cost = CostModel(network).cost(Schedule())
    console.print(
        f"dense: {len(network.layers)} layers in {len(network.groups)} groups ({whole} protected), "
        f"{cost.bytes:,} bytes, {cost.params:,} parameters, {cost.macs:,} MACs"
    )


def structure_rows(network: Network) -> dict[str, Any]:
    """The tables of `show_structure` as plain values."""
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel": layer.kernel,
            "params": layer.weights,
            "macs": layer.macs,
            "group": layer.group,
            "protected": layer.protected,
        }
        for layer in network.layers.values()
    ]
    groups = [
        {
            "name": group.name,
            "channels": group.channels,
            "layers": list(group.layers),
            "consumers": list(group.consumers),
            "protected": group.protected,
        }
        for group in network.groups.values()
    ]
    cost = CostModel(network).cost(Schedule())
    dense = {"bytes": cost.bytes, "params": cost.params, "macs": cost.macs}
    return {"layers": layers, "groups": groups, "dense": dense}


def notes(network: Network, evaluator: Evaluator) -> Iterator[str]:
    """What a user of this network should know, a line each."""
    if network.unread:
        part, why = list(network.unread.items())[-1]
        more = f" and {len(network.unread) - 1} parts around it" if len(network.unread) > 1 else ""
        yield (
            f"channels could not be read in {part or 'the network'}{more} ({why}): "
            "what is in no group is quantized and not cut"
        )
    if network.unused:
        yield f"left out of what is written, the output does not use it: {_few(network.unused)}"
    if evaluator.slow:
        yield f"{evaluator.slow}: every evaluation runs the whole network, which is slower"


def _few(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("in", "out", "kernel", "params", "MACs", "channels")
        table.add_column(column, justify="right" if right else "left")
    return table
