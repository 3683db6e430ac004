"""Random schedules that meet a size: the control every search must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.searchers.base import Measure, Proposal, Settings, measured

TOLERANCE = 0.95
CHANGES = 20


def draw(problem: Problem, max_bytes: float, rng: np.random.Generator) -> Schedule:
    """A uniform draw, then random single changes towards the size, the last ones only down."""
    costs = problem.evaluator.costs
    options: dict[tuple[str, str], tuple[float, ...]] = {
        ("keep", g.name): problem.keeps for g in problem.network.groups.values() if not g.protected
    }
    options |= {("bits", name): problem.bits for name in problem.network.layers}
    names = list(options)
    drawn = {name: rng.choice(options[name]) for name in names}

    def schedule(values: dict[tuple[str, str], float]) -> Schedule:
        keep = {name: float(v) for (kind, name), v in values.items() if kind == "keep"}
        return Schedule(keep, {n: int(v) for (kind, n), v in values.items() if kind == "bits"})

    size = costs.cost(schedule(drawn)).bytes
    for _ in range(CHANGES * len(names)):
        if TOLERANCE * max_bytes <= size <= max_bytes:
            break
        name = names[rng.integers(len(names))]
        changed = {**drawn, name: rng.choice(options[name])}
        new = costs.cost(schedule(changed)).bytes
        if abs(np.log(new / max_bytes)) <= abs(np.log(size / max_bytes)):
            drawn, size = changed, new
    # Where all are at their least, nothing is smaller: the size was asked for within rounding.
    while size > max_bytes and any(drawn[name] > min(options[name]) for name in names):
        name = names[rng.integers(len(names))]
        drawn[name] = max((v for v in options[name] if v < drawn[name]), default=drawn[name])
        size = costs.cost(schedule(drawn)).bytes
    return schedule(drawn)


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """Targets are drawn log-uniformly, as the policy's goals are."""
    problem.require_reachable(settings.target)

    def proposals() -> Iterator[Proposal]:
        for i in range(settings.evaluations):
            rng = np.random.default_rng([settings.seed, i])
            target = float(np.exp(rng.uniform(*np.log(settings.target))))
            yield draw(problem, problem.dense.bytes / target, rng), target

    return measured("random", settings, history, measure, proposals())
