"""The report's figures, as matplotlib Figures that belong to no global state.

Accuracies go in as 0-1 and are drawn in %. Colours are a fixed palette that stays apart under
the common kinds of colour blindness; a series also differs by its marker or its place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlcompress.core.pareto import front
from rlcompress.core.schedule import FULL_PRECISION, MAX_BITS, Measurement, Record, Schedule

INK, MUTED, GRID = "#1b1f24", "#59636e", "#d9dee4"
TIMES = "\N{MULTIPLICATION SIGN}"
#: Okabe & Ito (2008), darkened where white paper needs it.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#b07d00", "#4a9fd8", "#7a5195", "#6b7280")
MARKERS = "osD^vPX*"
#: Points of accuracy below the dense network that the axis of the front shows at most.
_SHOWN_DROP = 0.05

Plain = Mapping[str, Any]


def front_figure(
    records: Sequence[Record], dense: Measurement, tickets: Sequence[Plain] = ()
) -> Figure:
    """What every evaluation kept against its bytes, each searcher's front, dense and tickets:
    accuracy above, below it the KL to the dense network, which still tells apart what accuracy
    on a few hundred images does not.

    records  measured on the score images, as is `dense`
    tickets  contents of ticket.json; drawn at their measurement on their own split

    A front is the best value at or below a size. The accuracy axis is cut to at most 5 points
    below the dense network, if anything lies there; how many points it hides is printed.
    """
    figure = Figure(figsize=(7.2, 7.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    measured = [Measurement.from_dict(ticket["ticket"]) for ticket in tickets]
    _draw_front(above, records, tickets, lambda m: 100 * m.accuracy, smaller_is_better=False)
    _draw_front(below, records, tickets, _shown_kl, smaller_is_better=True)
    above.scatter([dense.bytes], [100 * dense.accuracy], s=150, marker="*", color=INK, zorder=4)
    here = (dense.bytes, 100 * dense.accuracy)
    above.annotate("dense", here, (0, -17), textcoords="offset points", ha="center", **_text())
    low, high = _accuracy_range(
        [r.measurement.accuracy for r in records],
        [dense.accuracy, *(m.accuracy for m in measured)],
    )
    above.set_ylim(100 * low, 100 * high)
    below.set_yscale("log")
    above.set_xscale("log")
    sizes = [dense.bytes, *(r.measurement.bytes for r in records), *(m.bytes for m in measured)]
    above.set_xlim(min(sizes) / 1.5, max(sizes) * 1.35)
    above.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    above.xaxis.set_minor_formatter(NullFormatter())
    _dress(above, "", "accuracy, %")
    _dress(below, "size of the written artifact", "KL to the dense network, nats")
    # Above the axes no label meets a point. The smallest ticket's stands left of its line, the
    # others' right of theirs and lower from left to right, so no line crosses a label.
    named = sorted(zip(tickets, measured, strict=True), key=lambda pair: pair[1].bytes)
    for i, (ticket, m) in enumerate(named):
        above.annotate(
            f"{ticket['searcher']} ticket, {ticket['ratio']:.3g}{TIMES}",
            xy=(m.bytes, 100 * m.accuracy),
            xytext=(m.bytes, 1.03 + 0.07 * (len(named) - 1 - i)),
            textcoords=above.get_xaxis_transform(),
            ha="right" if i == 0 else "left",
            arrowprops={"arrowstyle": "-", "color": MUTED, "relpos": (1.0 if i == 0 else 0.0, 0)},
            **_text(),
        )
    hidden = sum(r.measurement.accuracy < low for r in records)
    if hidden:
        note = f"▾ {hidden} of {len(records)} evaluations lie lower"
        above.annotate(
            note, (1, 0), (-6, 6), "axes fraction", "offset points", ha="right", **_note()
        )
    _legend(figure, len(searchers(records)))
    return figure


def _draw_front(
    ax: Axes,
    records: Sequence[Record],
    tickets: Sequence[Plain],
    value: Callable[[Measurement], float],
    *,
    smaller_is_better: bool,
) -> None:
    sign = 1 if smaller_is_better else -1
    for i, searcher in enumerate(searchers(records)):
        mine = [r.measurement for r in records if r.searcher == searcher]
        colour, marker = _style(i)
        x, y = [m.bytes for m in mine], [value(m) for m in mine]
        ax.scatter(x, y, s=13, color=colour, marker=marker, alpha=0.3, linewidths=0)
        best = front(mine, lambda m: (m.bytes, sign * value(m)))
        x, y = [m.bytes for m in best], [value(m) for m in best]
        ax.step(x, y, where="post", color=colour, linewidth=1.8)
        label = None if smaller_is_better else searcher
        ax.scatter(x, y, s=20, color=colour, marker=marker, label=label, zorder=3)
    for ticket in tickets:
        m = Measurement.from_dict(ticket["ticket"])
        ax.scatter(
            [m.bytes],
            [value(m)],
            s=85,
            marker="D",
            zorder=5,
            color=_style(searchers(records, ticket["searcher"]).index(ticket["searcher"]))[0],
            edgecolors=INK,
            linewidths=1.4,
        )


def _shown_kl(measurement: Measurement) -> float:
    """A logarithmic axis has no zero."""
    return max(measurement.kl, 1e-5)


def schedule_figure(schedule: Schedule, layers: Sequence[Plain]) -> Figure:
    """Keep ratio and weight bits of each layer, in forward order, coloured by kind.

    layers  search/layers.json: name, kind and group of each. A layer left at 32-bit floats
            is drawn at the full height and marked 32.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
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
            "32", (x, MAX_BITS), (0, 2), textcoords="offset points", ha="center", **_note()
        )
    above.set_ylim(0, 1.08)
    below.set_ylim(0, MAX_BITS * 1.15)
    below.set_yticks(range(0, MAX_BITS + 1, 2))
    every = -(-len(layers) // 32)
    names = [layer["name"] for layer in layers]
    below.set_xticks(depth[::every], names[::every], rotation=90)
    _dress(above, "", "channels kept")
    _dress(below, "", "weight bits")
    for ax in (above, below):
        ax.grid(axis="x", visible=False)
        ax.margins(x=0.01)
    below.tick_params(axis="x", labelsize=8)
    if len(kinds) > 1:
        _legend(figure, len(kinds))
    return figure


def learning_figure(curve: Sequence[Plain]) -> Figure:
    """Mean return of an episode and the policy's entropy (nats) by evaluation."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, searcher in enumerate(sorted({point["searcher"] for point in curve})):
        mine = [point for point in curve if point["searcher"] == searcher]
        x = [point["evaluation"] for point in mine]
        for ax, name in zip(panels, ("mean_return", "entropy"), strict=True):
            label = searcher if name == "entropy" else None
            ax.plot(x, [point[name] for point in mine], color=SERIES[i], label=label)
    _dress(panels[0], "evaluation", "mean return of an episode")
    _dress(panels[1], "evaluation", "entropy of the policy, nats")
    _legend(figure, 4)
    return figure


def arms_figure(ticket: Plain) -> Figure:
    """The ticket against its controls: accuracy on the ticket's split, dense as a line."""
    arms = arm_measurements(ticket)
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(arms)), layout="constrained")
    ax = figure.add_subplot()
    dense = 100 * Measurement.from_dict(ticket["dense"]).accuracy
    values = [100 * m.accuracy for m in arms.values()]
    rows = np.arange(len(arms))[::-1]
    ax.axvline(dense, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate(
        f"dense {dense:.2f}",
        (dense, 1),
        (0, 3),
        ("data", "axes fraction"),
        "offset points",
        ha="center",
        **_note(),
    )
    ax.hlines(rows, values, dense, color=GRID, linewidth=3, zorder=1)
    colours = [SERIES[0]] + [SERIES[7]] * (len(arms) - 1)
    ax.scatter(values, rows, s=80, c=colours, zorder=3)
    for value, row in zip(values, rows, strict=True):
        side, align = ((9, 0), "left") if value > dense else ((-9, 0), "right")
        ax.annotate(
            f"{value:.2f}",
            (value, row),
            side,
            textcoords="offset points",
            ha=align,
            va="center",
            color=INK,
            fontsize=9.5,
        )
    span = max(max([*values, dense]) - min([*values, dense]), 0.5)
    ax.set_xlim(min([*values, dense]) - 0.2 * span, max([*values, dense]) + 0.2 * span)
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.set_yticks(rows, list(arms))
    _dress(ax, f"accuracy on {ticket['split']}, %", "")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelsize=10, labelcolor=INK)
    return figure


def training_figure(dense: Plain, ticket: Plain | None = None) -> Figure:
    """Training loss and validation accuracy by step: the dense network, then each arm.

    dense  the content of dense/metrics.json
    """
    curves = [("dense", {"dense": dense["curve"]})]
    if ticket is not None:
        curves.append(("ticket and controls", ticket["curves"]))
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col")
    offset = 0
    for column, (title, arms) in enumerate(curves):
        for i, (arm, points) in enumerate(arms.items(), start=offset):
            steps = [point["step"] for point in points]
            loss = [point["loss"] for point in points]
            accuracy = [100 * point["validation_accuracy"] for point in points]
            panels[0][column].plot(steps, loss, color=_style(i)[0], label=arm)
            panels[1][column].plot(steps, accuracy, color=_style(i)[0])
        offset += len(arms)
        panels[0][column].set_title(title, color=INK, fontsize=10)
        _dress(panels[0][column], "", "training loss" if column == 0 else "")
        _dress(panels[1][column], "step", "validation accuracy, %" if column == 0 else "")
    if ticket is not None:
        _legend(figure, 5)
    return figure


def searchers(records: Sequence[Record], *more: str) -> list[str]:
    """Names in the order of the archive, so that a searcher keeps its colour; `more` after."""
    return list(dict.fromkeys([*(record.searcher for record in records), *more]))


def arm_measurements(ticket: Plain) -> dict[str, Measurement]:
    """The ticket's own arm first, then its controls."""
    arms = {ticket["arm"]: ticket["ticket"], **ticket["controls"]}
    return {name: Measurement.from_dict(m) for name, m in arms.items()}


def size(value: float) -> str:
    """Bytes as people read them, in powers of ten: 143000 -> '143 kB'."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def to_png(figure: Figure) -> bytes:
    """PNG at 200 dpi on white. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An <svg> element to put into a page, whose colours are the page's CSS variables.

    name  tells apart the ids of several figures in one page. Equal figures give equal text.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib's SVG has a viewBox"
    svg = re.sub(r"^<svg[^>]*>", f"<svg {box[0]}>", svg)
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match[0]]})", svg)


_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"}
_VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}


def _style(i: int) -> tuple[str, str]:
    return SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]


def _accuracy_range(points: Sequence[float], anchors: Sequence[float]) -> tuple[float, float]:
    """Where the axis of the front starts and ends: what is near the dense network, `anchors[0]`."""
    near = [a for a in points if a >= anchors[0] - _SHOWN_DROP] or list(points)
    low, high = min([*near, *anchors]), max([*near, *anchors])
    pad = 0.06 * max(high - low, 0.01)
    return low - pad, high + 2 * pad


def _text() -> dict[str, Any]:
    return {"color": INK, "fontsize": 9.5}


def _note() -> dict[str, Any]:
    return {"color": MUTED, "fontsize": 9}


def _dress(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=MUTED, fontsize=10)
    ax.set_ylabel(y, color=MUTED, fontsize=10)
    ax.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    ax.grid(visible=True, color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(
        loc="outside lower center",
        ncols=min(columns, 6),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.6,
    )
