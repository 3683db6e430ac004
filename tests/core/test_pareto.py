"""The front against brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlcompress.core.pareto import (
    Front,
    archive_front,
    best_at_floor,
    front,
    hypervolume,
    nondominated,
)
from rlcompress.core.schedule import Measurement, Record, Schedule

#: Few different values, so that ties and equal rows are common.
points = arrays(np.int64, st.tuples(st.integers(0, 12), st.just(2)), elements=st.integers(0, 6))


def dominated(row: np.ndarray, costs: np.ndarray) -> bool:
    return bool(((costs <= row).all(1) & (costs < row).any(1)).any())


@given(costs=points)
def test_nondominated_is_what_brute_force_finds(costs):
    wanted = [
        not dominated(row, costs) and not (costs[:i] == row).all(1).any()
        for i, row in enumerate(costs)
    ]
    assert nondominated(costs).tolist() == wanted


@given(costs=points)
def test_a_front_kept_up_one_by_one_is_the_front_of_all(costs):
    kept = Front()
    for end, (first, second) in enumerate(costs.tolist(), start=1):
        before = len(front(costs[: end - 1].tolist(), lambda row: (row[0], row[1])))
        joined = kept.add(first, second)
        now = front(costs[:end].tolist(), lambda row: (row[0], row[1]))
        assert len(kept) == len(now)
        assert joined == (
            [first, second] in now and [first, second] not in costs[: end - 1].tolist()
        )
        assert joined or len(now) == before


@given(costs=points)
def test_hypervolume_counts_the_dominated_unit_squares(costs):
    squares = [(costs <= (x, y)).all(1).any() for x in range(5) for y in range(6)]
    assert hypervolume(costs.astype(float), (5, 6)) == sum(squares)


def test_hypervolume_of_one_point_is_a_rectangle():
    assert hypervolume(np.array([[1.0, 2.0]]), (4.0, 4.0)) == 6.0
    assert hypervolume(np.array([[4.0, 0.0]]), (4.0, 4.0)) == 0.0


@given(costs=points, extra=points)
def test_more_points_never_shrink_the_hypervolume(costs, extra):
    both = np.concatenate([costs, extra])
    assert hypervolume(both, (5, 5)) >= hypervolume(costs, (5, 5))


@given(costs=points)
def test_the_front_rises_in_one_cost_and_falls_in_the_other(costs):
    rows = front([tuple(row) for row in costs.tolist()], lambda row: row)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(rows))
    assert bool(rows) == bool(len(costs))


def record(size: int, kl: float, accuracy: float = 0.9) -> Record:
    measured = Measurement(accuracy, 0.5, kl, size, 1, 1, 1, 100 * accuracy / (size / 1e6))
    return Record(Schedule(), measured, "random", 0, 1)


def test_the_archives_front_is_size_against_kl():
    big, small, bad = record(300, 0.1), record(100, 0.4), record(200, 0.5, accuracy=1.0)
    assert archive_front([big, bad, small]) == [small, big]


@pytest.mark.parametrize(("floor", "size"), [(0.95, 300), (0.9, 200), (0.0, 100), (0.99, None)])
def test_the_densest_at_a_floor(floor, size):
    records = [record(300, 0, 0.96), record(200, 0, 0.9), record(100, 0, 0.5)]
    best = best_at_floor(records, floor)
    assert (best.measurement.bytes if best else None) == size
