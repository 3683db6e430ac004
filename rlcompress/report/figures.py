"""The report's figures, as matplotlib Figures that belong to no global state.

Accuracies go in as 0-1 and are drawn in %. Colours are a fixed palette that stays apart under
the common kinds of colour blindness; a series also differs by its marker or its place.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlcompress.core.pareto import front
from rlcompress.core.schedule import Measurement, Record

INK, MUTED, GRID = "#1b1f24", "#59636e", "#d9dee4"
TIMES = "\N{MULTIPLICATION SIGN}"
#: Okabe & Ito (2008), darkened where white paper needs it.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#b07d00", "#4a9fd8", "#7a5195", "#6b7280")
MARKERS = "osD^vPX*"
#: Inches. So narrow that the page shows it on a phone at the size it is drawn.
WIDTH = 4.6
#: Points of accuracy below the dense network that the axis of the front shows at most.
_SHOWN_DROP = 0.05

Plain = Mapping[str, Any]


def front_figure(
    records: Sequence[Record],
    dense: Measurement,
    tickets: Sequence[Plain] = (),
    measure: str = "accuracy",
) -> Figure:
    """What every evaluation kept against its bytes, each searcher's front, dense and tickets:
    accuracy above, below it the KL to the dense network, which still tells apart what accuracy
    on a few hundred images does not.

    records  measured on the score images, as is `dense`
    tickets  contents of ticket.json; drawn at their measurement on their own split
    measure  what the records' accuracy is called

    In SVG the page's script finds each searcher's parts by their ids: "<panel>-<number>-all",
    "-line" and "-front", panel `accuracy` or `kl`, points in the order of the records.

    A front is the best value at or below a size. The accuracy axis is cut to at most 5 points
    below the dense network, if anything lies there; how many points it hides is printed.
    """
    figure = Figure(figsize=(WIDTH, 5.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    measured = [Measurement.from_dict(ticket["ticket"]) for ticket in tickets]
    _draw_front(above, "accuracy", records, tickets)
    _draw_front(below, "kl", records, tickets)
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
    dress(above, "", f"{measure}, %")
    dress(below, "size of the written artifact", "KL to dense, nats")
    # Above the axes no label meets a point. Each stands right of its line and lower from left to
    # right, so no line crosses a label.
    named = sorted(zip(tickets, measured, strict=True), key=lambda pair: pair[1].bytes)
    for i, (ticket, m) in enumerate(named):
        series = searchers(records, ticket["searcher"]).index(ticket["searcher"])
        above.annotate(
            f"{ticket['searcher']} ticket, {ticket['ratio']:.3g}{TIMES}",
            xy=(m.bytes, 100 * m.accuracy),
            xytext=(m.bytes, 1.03 + 0.08 * (len(named) - 1 - i)),
            textcoords=above.get_xaxis_transform(),
            ha="left",
            arrowprops={"arrowstyle": "-", "color": MUTED, "relpos": (0, 0), "shrinkB": 5},
            gid=f"accuracy-{series}-name",
            **_text(),
        )
    hidden = sum(r.measurement.accuracy < low for r in records)
    if hidden:
        lower = f"▾ {hidden} of {len(records)} evaluations lie lower"
        above.annotate(
            lower, (1, 0), (-6, 6), "axes fraction", "offset points", ha="right", **note()
        )
    legend(figure, len(searchers(records))).set_gid("front-legend")
    return figure


def front_places(figure: Figure, records: Sequence[Record]) -> list[list[float | None]]:
    """Where each record stands in the SVG that `to_svg` made of a front: x, y of its accuracy (None
    where the axis ends above it) and y of its KL, in units of the viewBox."""
    above, below = figure.axes
    points, height = 72 / figure.dpi, 72 * figure.get_figheight()
    places: list[list[float | None]] = []
    for m in (record.measurement for record in records):
        x, y = above.transData.transform((m.bytes, _percent(m)))
        _, lower = below.transData.transform((m.bytes, _shown_kl(m)))
        shown = _percent(m) >= above.get_ylim()[0]
        where = (x * points, height - y * points if shown else None, height - lower * points)
        places.append([None if v is None else round(float(v), 1) for v in where])
    return places


def _draw_front(ax: Axes, panel: str, records: Sequence[Record], tickets: Sequence[Plain]) -> None:
    value, sign = (_shown_kl, 1) if panel == "kl" else (_percent, -1)
    for i, searcher in enumerate(searchers(records)):
        mine = [r.measurement for r in records if r.searcher == searcher]
        colour, marker = _style(i)
        look: Plain = {"color": colour, "marker": marker}
        x, y = [m.bytes for m in mine], [value(m) for m in mine]
        ax.scatter(x, y, s=13, alpha=0.3, linewidths=0, gid=f"{panel}-{i}-all", **look)
        best = front(mine, lambda m: (m.bytes, sign * value(m)))
        x, y = [m.bytes for m in best], [value(m) for m in best]
        ax.step(x, y, where="post", color=colour, linewidth=1.6, gid=f"{panel}-{i}-line")
        label = searcher if panel == "accuracy" else None
        ax.scatter(x, y, s=18, label=label, zorder=3, gid=f"{panel}-{i}-front", **look)
    for ticket in tickets:
        m = Measurement.from_dict(ticket["ticket"])
        i = searchers(records, ticket["searcher"]).index(ticket["searcher"])
        ax.scatter(
            [m.bytes],
            [value(m)],
            s=70,
            marker="D",
            zorder=5,
            color=_style(i)[0],
            edgecolors=INK,
            linewidths=1.3,
            gid=f"{panel}-{i}-ticket",
        )


def _percent(measurement: Measurement) -> float:
    return 100 * measurement.accuracy


def _shown_kl(measurement: Measurement) -> float:
    """A logarithmic axis has no zero."""
    return max(measurement.kl, 1e-5)


def learning_figure(curve: Sequence[Plain]) -> Figure:
    """Mean return of an episode and the policy's entropy (nats) by evaluation."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for i, searcher in enumerate(sorted({point["searcher"] for point in curve})):
        mine = [point for point in curve if point["searcher"] == searcher]
        x = [point["evaluation"] for point in mine]
        for ax, name in zip(panels, ("mean_return", "entropy"), strict=True):
            label = searcher if name == "entropy" else None
            ax.plot(x, [point[name] for point in mine], color=SERIES[i], label=label)
    dress(panels[0], "", "mean return")
    dress(panels[1], "evaluation", "entropy, nats")
    legend(figure, 4)
    return figure


def arms_figure(tickets: Sequence[Plain], measure: str = "accuracy") -> Figure:
    """The ticket against its controls: accuracy on the ticket's split, dense as a line.

    tickets  one, or one of each seed: then means, with their standard deviations as intervals
    """
    ticket = tickets[0]
    rows = arms_over_seeds(tickets)
    dense, *arms = rows.values()
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(arms)), layout="constrained")
    ax = figure.add_subplot()
    ax.axvline(dense[0], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate(
        f"dense {dense[0]:.2f}",
        (dense[0], 1),
        (0, 3),
        ("data", "axes fraction"),
        "offset points",
        ha="center",
        **note(),
    )
    values = [mean for mean, _ in arms]
    depth = np.arange(len(arms))[::-1]
    ax.hlines(depth, values, dense[0], color=GRID, linewidth=3, zorder=1)
    colours = [SERIES[0]] + [SERIES[7]] * (len(arms) - 1)
    ax.scatter(values, depth, s=70, c=colours, zorder=3)
    for (mean, spread), row, colour in zip(arms, depth, colours, strict=True):
        said = f"{mean:.2f}"
        if spread is not None:
            ax.errorbar(mean, row, xerr=spread, color=colour, capsize=4, linewidth=1.6, zorder=2)
            said += f" ± {spread:.2f}"
        ax.annotate(
            said,
            (mean, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
        )
    ends = [m + sign * (s or 0.0) for m, s in (dense, *arms) for sign in (-1, 1)]
    pad = 0.15 * max(max(ends) - min(ends), 0.5)
    ax.set_xlim(min(ends) - pad, max(ends) + pad)
    ax.set_ylim(-0.6, len(arms) - 0.3)
    ax.set_yticks(depth, list(rows)[1:])
    dress(ax, f"{measure} on {ticket['split']}, %", "")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelsize=10, labelcolor=INK)
    return figure


def arms_over_seeds(tickets: Sequence[Plain]) -> dict[str, tuple[float, float | None]]:
    """Accuracy in % of dense, of the first ticket's arm and of its controls: mean over the tickets
    that have the arm, and the sample's standard deviation, None of a single one."""
    names = list(arm_measurements(tickets[0]))
    found = [{"dense": t["dense"], t["arm"]: t["ticket"], **t["controls"]} for t in tickets]
    rows: dict[str, tuple[float, float | None]] = {}
    for name in ("dense", *names):
        mine = [100 * float(arms[name]["accuracy"]) for arms in found if name in arms]
        rows[name] = (float(np.mean(mine)), float(np.std(mine, ddof=1)) if mine[1:] else None)
    return rows


def training_figure(dense: Plain, ticket: Plain | None = None, measure: str = "accuracy") -> Figure:
    """Training loss and validation accuracy by step: the dense network, then each arm.

    dense  the content of dense/metrics.json
    """
    curves = [("dense", {"dense": dense["curve"]})]
    if ticket is not None:
        curves.append(("ticket and controls", ticket["curves"]))
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col")
    said = textwrap.fill(f"validation {measure}, %", 22)  # no longer than its panel is high
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
        dress(panels[0][column], "", "training loss" if column == 0 else "")
        dress(panels[1][column], "step", said if column == 0 else "")
    if ticket is not None:
        legend(figure, 5)
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
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """12345678 -> '12.3 M'."""
    return _scaled(value, ("", "k", "M", "G", "T")).strip()


def _scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and the unit, each a thousand of the one before."""
    step = 0
    # As it will be shown: 999.6 is 1000.
    while step < len(units) - 1 and float(f"{value:.3g}") >= 1000:
        value, step = value / 1000, step + 1
    shown = f"{value:.3g}" if step and value < 999.5 else f"{value:.0f}"
    return f"{shown} {units[step]}"


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


def note() -> dict[str, Any]:
    return {"color": MUTED, "fontsize": 9}


def dress(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=MUTED, fontsize=10)
    ax.set_ylabel(y, color=MUTED, fontsize=10)
    ax.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    ax.grid(visible=True, color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def legend(figure: Figure, columns: int) -> Legend:
    return figure.legend(
        loc="outside lower center",
        ncols=min(columns, 4),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.6,
    )
