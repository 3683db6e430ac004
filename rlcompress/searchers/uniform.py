"""The static rule: one keep ratio and one bit-width for the whole network.

Sizes follow from the closed form, so no evaluation is spent outside the target range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.searchers.base import SLACK, Measure, Settings, measured, spread_order

#: Keep ratios that are told apart; neighbours often give the same channels.
RATIOS = 200


def grid(problem: Problem, target: tuple[float, float]) -> list[Schedule]:
    """Every distinct uniform schedule whose size ratio lies in `target`, or little beyond its high
    end, largest first."""
    costs, seen = problem.evaluator.costs, set()
    found: list[tuple[int, Schedule]] = []
    for bits in problem.bits:
        for ratio in np.linspace(1.0, min(problem.keeps), RATIOS):
            schedule = problem.network.uniform(round(float(ratio), 4), bits)
            channels = (bits, *problem.network.counts(schedule).values())
            size = costs.cost(schedule).bytes
            reached = problem.dense.bytes / size
            if channels not in seen and target[0] <= reached <= target[1] * SLACK:
                seen.add(channels)
                found.append((size, schedule))
    return [schedule for _, schedule in sorted(found, key=lambda pair: -pair[0])]


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """The whole grid, or as many evenly spaced schedules of it as the evaluations pay for."""
    schedules = grid(problem, settings.target)
    proposals = ((schedules[i], None) for i in spread_order(len(schedules)))
    return measured("uniform", settings, history, measure, proposals)
