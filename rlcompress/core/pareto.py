"""The archive's front: which measured schedules no other one beats."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rlcompress.core.schedule import Record, performance_density

T = TypeVar("T")


def nondominated(costs: np.ndarray) -> np.ndarray:
    """Mask (N,) of the rows of `costs` (N, 2), all minimised, that no other row dominates.

    Of equal rows the first stays. O(N log N): sort by the first cost, sweep the second.
    """
    mask = np.zeros(len(costs), dtype=bool)
    best = np.inf
    for i in np.lexsort((np.arange(len(costs)), costs[:, 1], costs[:, 0])):
        if costs[i, 1] < best:
            mask[i] = True
            best = costs[i, 1]
    return mask


def front(items: Sequence[T], cost: Callable[[T], tuple[float, float]]) -> list[T]:
    """The nondominated items by ascending first cost."""
    if not items:
        return []
    costs = np.array([cost(item) for item in items], dtype=float)
    mask = nondominated(costs)
    kept = [i for i in np.lexsort((costs[:, 1], costs[:, 0])) if mask[i]]
    return [items[i] for i in kept]


def archive_front(records: Iterable[Record], score: str = "kl") -> list[Record]:
    """Front of (bytes, error), both minimised; `score` is one of `schedule.SCORES`.

    By default KL, not accuracy: accuracy on a few hundred images saturates and ties.
    """
    return front(list(records), lambda r: (r.measurement.bytes, r.measurement.error(score)))


class Front:
    """The nondominated pairs of costs (both minimised) of all that were added, kept up one by one
    in O(log N): `archive_front` of an archive that grows would be O(N) a record."""

    def __init__(self) -> None:
        # The first ascending, and so the second descending.
        self._first: list[float] = []
        self._second: list[float] = []

    def __len__(self) -> int:
        return len(self._first)

    def add(self, first: float, second: float) -> bool:
        """Whether no other dominates or equals it."""
        behind = bisect_right(self._first, first)
        if behind and self._second[behind - 1] <= second:
            return False
        begin = end = bisect_left(self._first, first)
        while end < len(self) and self._second[end] >= second:
            end += 1
        self._first[begin:end], self._second[begin:end] = [first], [second]
        return True


def rank_at_floor(accuracy: float, floor: float, density: float) -> tuple[bool, float]:
    """Orders results, the best last: those at the accuracy floor by density, below it by
    accuracy."""
    feasible = accuracy >= floor
    return feasible, density if feasible else accuracy


def ticket_rank(ticket: Mapping[str, Any]) -> tuple[bool, float]:
    """`rank_at_floor` of a ticket.json by the validation split: the test split chooses nothing."""
    accuracy = ticket["validation"][ticket["arm"]]
    floor = ticket["validation"]["dense"] - ticket["floor"] / 100
    return rank_at_floor(accuracy, floor, performance_density(accuracy, ticket["ticket"]["bytes"]))


def best_at_floor(records: Iterable[Record], floor: float) -> Record | None:
    """The densest record whose accuracy (0-1) is at least `floor`; None if none is."""
    feasible = [r for r in records if r.measurement.accuracy >= floor]
    return max(feasible, key=lambda r: r.measurement.density, default=None)


def hypervolume(costs: np.ndarray, reference: tuple[float, float]) -> float:
    """Area that rows of `costs` (N, 2), minimised, dominate below `reference`.

    Zitzler & Thiele (1998), two objectives: a sum of rectangles under the front.
    """
    inside = costs[(costs < np.asarray(reference)).all(axis=1)]
    if not len(inside):
        return 0.0
    rows = inside[nondominated(inside)]
    rows = rows[np.argsort(rows[:, 0])]
    heights = np.concatenate([[reference[1]], rows[:-1, 1]]) - rows[:, 1]
    return float(((reference[0] - rows[:, 0]) * heights).sum())
