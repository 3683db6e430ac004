"""Figures over a network's depth, and over the minibatches of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rlcompress.core.schedule import FULL_PRECISION, MAX_BITS, Schedule
from rlcompress.report.figures import (
    GRID,
    SERIES,
    WIDTH,
    Plain,
    count,
    dress,
    legend,
    note,
    size,
)


def schedule_figure(schedule: Schedule, layers: Sequence[Plain]) -> Figure:
    """Keep ratio and weight bits of each layer, in forward order, coloured by kind.

    layers  search/layers.json: name, kind and group of each. A layer left at 32-bit floats
            is drawn at the full height and marked 32.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    depth = np.arange(len(layers))
    keep = np.array([schedule.ratio(layer["group"]) for layer in layers])
    bits = np.array([schedule.width(layer["name"]) for layer in layers])
    kinds = list(dict.fromkeys(layer["kind"] for layer in layers))
    for i, kind in enumerate(kinds):
        mine = np.array([layer["kind"] == kind for layer in layers])
        for ax, heights in ((above, keep), (below, np.minimum(bits, MAX_BITS))):
            label = kind if ax is above else None
            ax.bar(depth[mine], heights[mine], width=0.78, color=SERIES[i], label=label)
    for x in depth[bits == FULL_PRECISION]:
        below.annotate(
            "32", (x, MAX_BITS), (0, 2), textcoords="offset points", ha="center", **note()
        )
    above.set_ylim(0, 1.08)
    below.set_ylim(0, MAX_BITS * 1.15)
    below.set_yticks(range(0, MAX_BITS + 1, 2))
    dress(above, "", "channels kept")
    dress(below, "", "weight bits")
    _over_depth([above, below], [layer["name"] for layer in layers])
    if len(kinds) > 1:
        legend(figure, len(kinds))
    return figure


def layers_figure(layers: Sequence[Plain]) -> Figure:
    """Bytes and MACs of each layer, dense and in the ticket, on logarithmic axes.

    layers  the content of a ticket's layers.json
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    depth = np.arange(len(layers))
    for ax, name in zip(panels, ("bytes", "macs"), strict=True):
        before, after = ([layer[side][name] for layer in layers] for side in ("dense", "ticket"))
        ax.vlines(depth, after, before, color=GRID, linewidth=2.5, zorder=1)
        first = ax is panels[0]
        ax.scatter(depth, before, s=22, color=SERIES[7], label="dense" if first else None)
        ax.scatter(
            depth, after, s=22, color=SERIES[0], marker="D", label="ticket" if first else None
        )
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(
            FuncFormatter(
                lambda value, _, name=name: size(value) if name == "bytes" else count(value)
            )
        )
    dress(panels[0], "", "bytes on disk")
    dress(panels[1], "", "MACs of an image")
    _over_depth(list(panels), [layer["name"] for layer in layers])
    legend(figure, 2)
    return figure


def dynamic_figure(decisions: Sequence[Plain]) -> Figure:
    """Compression during training: at each decision the loss, and what is kept by then.

    decisions  those of dynamic/ticket.json, each with step, layer, keep, bits and loss
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    steps = [decision["step"] for decision in decisions]
    now: dict[str, Plain] = {}
    rows = []
    for decision in decisions:
        now[decision["layer"]] = decision
        done = [(float(d.get("keep", 1.0)), int(d["bits"])) for d in now.values()]
        rows.append((decision["loss"], *np.mean(done, axis=0)))
    for ax, values, i in zip(panels, zip(*rows, strict=True), (7, 0, 1), strict=True):
        ax.plot(steps, values, color=SERIES[i], linewidth=1.4)
    dress(panels[0], "", "training loss")
    dress(panels[1], "", "mean keep")
    dress(panels[2], "minibatch", "mean bits")
    return figure


def _over_depth(panels: Sequence[Axes], names: Sequence[str]) -> None:
    """Panels whose x axis is the network's layers in forward order; the last one names them."""
    every = -(-len(names) // 32)
    panels[-1].set_xticks(np.arange(len(names))[::every], names[::every], rotation=90)
    panels[-1].tick_params(axis="x", labelsize=7.5)
    for ax in panels:
        ax.grid(axis="x", visible=False)
        ax.margins(x=0.02)
