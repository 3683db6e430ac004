"""The interface of searchers, and what those that only propose schedules share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule


@dataclass(frozen=True)
class Settings:
    """evaluations in all (history included); target: size ratios (low, high); seed."""

    evaluations: int
    target: tuple[float, float]
    seed: int


class Search(Protocol):
    def __call__(
        self, problem: Problem, settings: Settings, history: Sequence[Record]
    ) -> Iterator[Record]: ...


def targets(settings: Settings, count: int) -> list[float]:
    """`count` size ratios over the range, evenly spaced in their logarithm."""
    return [float(x) for x in np.geomspace(*settings.target, count)]


def measured(
    name: str,
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    proposals: Iterable[tuple[Schedule, float | None]],
) -> Iterator[Record]:
    """Measures proposals (schedule, target) behind those in `history`, up to the budget."""
    done = len(history)
    for i, (schedule, target) in enumerate(
        islice(proposals, done, settings.evaluations), start=done + 1
    ):
        yield Record(schedule, problem.evaluator.evaluate(schedule), name, settings.seed, i, target)
