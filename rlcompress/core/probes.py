"""Sensitivities that are measured: one choice at a time, everything else dense.

`probes` lists the schedules to measure, `measured_losses` corrects the tables of estimates by
what was measured, however few that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

import numpy as np

from rlcompress.core.graph import Network
from rlcompress.core.prior import Losses
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import Estimates

#: Nats below which a KL on a few hundred images is rounding noise and tells no ratio.
_RESOLUTION = 1e-6


@dataclass(frozen=True)
class Probe:
    """One choice in a dense network, and the entries of `Losses` that it measures: a row of a
    table and the columns that stand for this very network (ratios that keep as many channels)."""

    schedule: Schedule
    table: Literal["prune", "quantize"]
    row: int
    columns: tuple[int, ...]


def halving(count: int) -> list[int]:
    """0 to count - 1, such that the first n lie evenly for every n, the middle first (van der
    Corput, 1935).

    >>> halving(7)
    [3, 1, 5, 0, 4, 2, 6]
    """
    width = (count + 1).bit_length()
    return sorted(range(count), key=lambda i: f"{i + 1:0{width}b}"[::-1])


def probes(network: Network, estimates: Estimates) -> list[Probe]:
    """Every choice alone, so ordered that any first n are the most telling: a middle ratio of
    each group and a low bit-width of each layer (those of most weights first), then a second one
    of each, and so on. Protected groups and ratios that cut nothing are left out."""
    lines: list[tuple[int, list[Probe]]] = []
    for row, group in enumerate(network.groups.values()):
        columns: dict[int, list[int]] = {}
        for k in np.argsort(-np.array(estimates.keeps)):
            columns.setdefault(group.count(estimates.keeps[k]), []).append(int(k))
        columns.pop(group.channels, None)
        cuts = [
            Probe(Schedule({group.name: estimates.keeps[ks[0]]}), "prune", row, tuple(ks))
            for ks in columns.values()
        ]
        weights = sum(network.layers[name].weights for name in group.layers)
        lines.append((weights, [cuts[i] for i in halving(len(cuts))]))
    # Of wide weights hardly anything can be measured: upwards from the second quarter.
    rising = [int(b) for b in np.argsort(estimates.bits)]
    first = len(rising) // 4
    for row, layer in enumerate(network.layers.values()):
        widths = [
            Probe(Schedule(bits={layer.name: estimates.bits[b]}), "quantize", row, (b,))
            for b in [rising[first], *rising[:first], *rising[first + 1 :]]
        ]
        lines.append((layer.weights, widths))
    lines.sort(key=lambda line: -line[0])
    rounds = zip_longest(*(line for _, line in lines))
    return [probe for probes in rounds for probe in probes if probe is not None]


def measured_losses(losses: Losses, probes: Sequence[Probe], kls: Sequence[float]) -> Losses:
    """`losses` corrected by the KL that each of the probes came to.

    A measured entry is its KL, or that of a milder measured choice of the same row if that was
    larger. Another entry is its estimate times the ratio measured / estimated of its row's measured
    entries, interpolated in its logarithm by rank, and lies between its measured neighbours; in a
    row without any it is the geometric mean of the table's ratios. Rows rise, as in `Losses.of`.
    """
    prune = np.full(losses.prune_GK.shape, np.nan)
    quantize = np.full(losses.quantize_LB.shape, np.nan)
    for probe, kl in zip(probes, kls, strict=True):
        table = prune if probe.table == "prune" else quantize
        table[probe.row, list(probe.columns)] = kl
    return replace(
        losses,
        prune_GK=_corrected(losses.prune_GK, prune, losses.keeps),
        quantize_LB=_corrected(losses.quantize_LB, quantize, losses.bits),
    )


def _corrected(
    estimated_RC: np.ndarray, measured_RC: np.ndarray, choices: Sequence[float]
) -> np.ndarray:
    """R rows, C choices; `measured_RC` is NaN where nothing was measured."""
    order = np.argsort(-np.array(choices))
    estimated, measured = estimated_RC[:, order], measured_RC[:, order]
    known = ~np.isnan(measured)
    ratio = np.zeros(measured.shape)
    floored = [np.maximum(table[known], _RESOLUTION) for table in (measured, estimated)]
    ratio[known] = np.log(floored[0] / floored[1])
    everywhere = ratio[known].mean() if known.any() else 0.0
    rank = np.arange(len(order))
    result = np.empty_like(estimated)
    for row in range(len(result)):
        at = np.flatnonzero(known[row])
        scale = np.interp(rank, at, ratio[row, at]) if len(at) else everywhere
        values = np.maximum.accumulate(measured[row, at])
        before = np.searchsorted(at, rank, side="right")
        low, high = np.append(0.0, values)[before], np.append(values, np.inf)[before]
        corrected = np.clip(estimated[row] * np.exp(scale), low, high)
        corrected[at] = values
        result[row] = np.maximum.accumulate(corrected)
    return result[:, np.argsort(order)]
