"""The global rule: one threshold on the importance of every channel, one bit-width for all layers.

Importance is the squared first-order Taylor term as Molchanov et al. (2019) use it, plain: it is
the loss that a channel's cut costs, in nats, so it compares across layers as it is. Divided by the
bytes that a channel takes it would be half a knapsack, and no longer the rule people use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.searchers.base import SLACK, Measure, Settings, measured, spread_order, targets

#: Sizes a bit-width; neighbours often give the same channels.
SIZES = 64


def grid(problem: Problem, target: tuple[float, float]) -> list[tuple[Schedule, float]]:
    """For each bit-width and `SIZES` size ratios over `target` the lowest threshold that meets
    the size; every distinct schedule, with the size it aims at, largest first."""
    importance = problem.evaluator.estimates.importance
    groups = [g for g in problem.network.groups.values() if not g.protected]
    costs, least = problem.evaluator.costs, min(problem.keeps)
    # From the threshold that cuts nothing to the one that cuts all it may.
    scores = [importance[g.name] for g in groups]
    threshold_S = np.append(np.unique(np.concatenate([np.zeros(1), *scores])), np.inf)
    column = {name: i for i, name in enumerate(problem.network.groups)}
    counts_SG = np.repeat(costs.full_counts_G[None], len(threshold_S), 0)
    for group, score in zip(groups, scores, strict=True):
        kept_S = len(score) - np.searchsorted(np.sort(score), threshold_S)
        counts = [group.count(max(n / group.channels, least)) for n in range(len(score) + 1)]
        counts_SG[:, column[group.name]] = np.array(counts)[kept_S]

    found: dict[Schedule, tuple[int, float]] = {}
    for bits in problem.bits:
        bits_SL = np.full((len(threshold_S), len(problem.network.layers)), bits)
        bytes_S = costs.bytes(counts_SG, bits_SL)
        for ratio in targets(Settings(0, target, 0), SIZES):
            # Sizes fall with the threshold: bisection.
            s = int(np.searchsorted(-bytes_S, -problem.dense.bytes / ratio))
            if s == len(bytes_S) or problem.dense.bytes / bytes_S[s] > target[1] * SLACK:
                continue
            keep = {
                g.name: float(max(counts_SG[s, column[g.name]] / g.channels, least)) for g in groups
            }
            schedule = Schedule(keep, dict.fromkeys(problem.network.layers, bits))
            found[schedule] = (int(bytes_S[s]), ratio)
    rows = sorted(found.items(), key=lambda item: (-item[1][0], item[0].to_json()))
    return [(schedule, ratio) for schedule, (_, ratio) in rows]


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """The whole grid, or as many evenly spaced schedules of it as the evaluations pay for."""
    rows = grid(problem, settings.target)
    proposals = (rows[i] for i in spread_order(len(rows)))
    return measured("taylor", settings, history, measure, proposals)
