"""Random schedules that meet a size: the control every search must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.searchers.base import Measure, Settings, measured

TOLERANCE = 0.95


def _draw(problem: Problem, max_bytes: float, rng: np.random.Generator) -> Schedule:
    """A uniform draw, then random single changes towards the size until it is met."""
    costs, groups = problem.evaluator.costs, list(problem.network.groups.values())
    names = [g.name for g in groups if not g.protected]
    layers = list(problem.network.layers)
    keep = {name: float(rng.choice(problem.keeps)) for name in names}
    bits = {name: int(rng.choice(problem.bits)) for name in layers}
    size = costs.cost(Schedule(keep, bits)).bytes
    for _ in range(200 * (len(names) + len(layers))):
        if TOLERANCE * max_bytes <= size <= max_bytes:
            break
        k, b = dict(keep), dict(bits)
        at = int(rng.integers(len(names) + len(layers)))
        if at < len(names):
            k[names[at]] = float(rng.choice(problem.keeps))
        else:
            b[layers[at - len(names)]] = int(rng.choice(problem.bits))
        new = costs.cost(Schedule(k, b)).bytes
        if abs(np.log(new / max_bytes)) <= abs(np.log(size / max_bytes)):
            keep, bits, size = k, b, new
    return Schedule(keep, bits)


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """Targets are drawn log-uniformly, as the policy's goals are."""
    problem.require_reachable(settings.target)

    def proposals() -> Iterator[tuple[Schedule, float]]:
        for i in range(settings.evaluations):
            rng = np.random.default_rng([settings.seed, i])
            target = float(np.exp(rng.uniform(*np.log(settings.target))))
            yield _draw(problem, problem.dense.bytes / target, rng), target

    return measured("random", settings, history, measure, proposals())
