"""The interface of searchers, and what those that only propose schedules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, tee
from typing import Protocol

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule


@dataclass(frozen=True)
class Settings:
    """evaluations in all (history included); target: size ratios (low, high); seed."""

    evaluations: int
    target: tuple[float, float]
    seed: int


#: Measures schedules lazily, in order: in this process, or by workers elsewhere.
Measure = Callable[[Iterable[Schedule]], Iterator[Measurement]]


class Search(Protocol):
    def __call__(
        self, problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
    ) -> Iterator[Record]: ...


def in_process(problem: Problem) -> Measure:
    return lambda schedules: map(problem.evaluator.evaluate, schedules)


def targets(settings: Settings, count: int) -> list[float]:
    """`count` size ratios over the range, evenly spaced in their logarithm."""
    return [float(x) for x in np.geomspace(*settings.target, count)]


def spread_order(count: int) -> list[int]:
    """0 to count - 1: both ends, then such that the first n lie evenly for every n (van der
    Corput, 1935), so that a search given more evaluations later goes on where it was."""
    inner = sorted(range(1, count - 1), key=lambda i: f"{i:0{count.bit_length()}b}"[::-1])
    return [*range(0, count, max(1, count - 1)), *inner]


def measured(
    name: str,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    proposals: Iterable[tuple[Schedule, float | None]],
) -> Iterator[Record]:
    """Measures proposals (schedule, target) behind those in `history`, up to the budget."""
    done = len(history)
    wanted, measuring = tee(islice(proposals, done, settings.evaluations))
    measurements = measure(schedule for schedule, _ in measuring)
    for i, measurement in enumerate(measurements, start=done + 1):
        schedule, target = next(wanted)
        yield Record(schedule, measurement, name, settings.seed, i, target)
