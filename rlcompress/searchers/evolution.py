"""NSGA-II (Deb et al., 2002) on the size and the error.

The first generation holds the prior's schedules over the sizes and random ones. Crowding is
measured on the logarithms of both costs, as fronts span decades.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.pareto import nondominated
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record
from rlcompress.searchers.base import (
    SLACK,
    Batches,
    Measure,
    Settings,
    measured_in_batches,
    spread_order,
    targets,
)
from rlcompress.searchers.genes import Genes
from rlcompress.searchers.random import draw

POPULATION = 24
#: Share of the first generation that the prior proposes.
FROM_PRIOR = 0.5
#: Attempts at a child that is new and whose size is allowed; steps to bring one's size there.
ATTEMPTS, STEPS = 50, 200
FLOOR = 1e-6


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """A generation a batch; no schedule is measured twice, none outside the target range."""
    problem.require_reachable(settings.target)
    return measured_in_batches("evolution", settings, history, measure, _evolve(problem, settings))


def _evolve(problem: Problem, settings: Settings) -> Batches:
    genes, rng = Genes(problem), np.random.default_rng(settings.seed)
    dense, (low, high) = problem.dense.bytes, settings.target
    sizes = (dense / (high * SLACK), dense / low)
    seen: set[bytes] = set()
    people: list[np.ndarray] = []
    costs_P2 = np.empty((0, 2))
    children = _first(problem, settings, genes, sizes, rng)
    while children:
        seen.update(child.tobytes() for child in children)
        found = yield [(genes.schedule(child), None) for child in children]
        people += children
        costs_P2 = np.concatenate([costs_P2, [_costs(m, problem.score) for m in found]])
        rank_P, crowding_P = rank(costs_P2)
        best = np.lexsort((-crowding_P, rank_P))[:POPULATION]
        people, costs_P2 = [people[i] for i in best], costs_P2[best]
        children = _children(people, rank_P[best], crowding_P[best], genes, sizes, seen, rng)


def _costs(measurement: Measurement, score: str) -> tuple[float, float]:
    error = max(measurement.error(score), FLOOR)
    return float(np.log(measurement.bytes)), float(np.log(error))


def _first(
    problem: Problem,
    settings: Settings,
    genes: Genes,
    sizes: tuple[float, float],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """The prior's schedules in spread order, then random ones; all different."""
    count = round(FROM_PRIOR * POPULATION)
    wanted = targets(settings, count)
    limits = [problem.dense.bytes / wanted[i] for i in spread_order(len(wanted))]
    chosen: dict[bytes, np.ndarray] = {}

    def take(row_N: np.ndarray) -> None:
        fitted_N = genes.fit(row_N, sizes, rng, STEPS)
        if fitted_N is not None:
            chosen.setdefault(fitted_N.tobytes(), fitted_N)

    for limit in limits:
        take(genes.of(problem.prior.schedule(limit)))
    for _ in range(ATTEMPTS):
        if len(chosen) == POPULATION:
            break
        target = np.exp(rng.uniform(*np.log(settings.target)))
        take(genes.of(draw(problem, problem.dense.bytes / target, rng)))
    return list(chosen.values())


def _children(
    people: Sequence[np.ndarray],
    rank_P: np.ndarray,
    crowding_P: np.ndarray,
    genes: Genes,
    sizes: tuple[float, float],
    seen: set[bytes],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """A generation of new schedules; fewer, or none, where new ones cannot be found."""
    children: dict[bytes, np.ndarray] = {}

    def parent() -> np.ndarray:
        a, b = rng.integers(len(people), size=2)
        wins = (rank_P[a], -crowding_P[a]) <= (rank_P[b], -crowding_P[b])
        return people[a if wins else b]

    for _ in range(ATTEMPTS * POPULATION):
        if len(children) == POPULATION:
            break
        mother_N, father_N = parent(), parent()
        child_N = np.where(rng.random(len(mother_N)) < 0.5, mother_N, father_N)
        mutated_N = rng.random(len(child_N)) < 1 / len(child_N)
        child_N = child_N + mutated_N * rng.choice((-1, 1), len(child_N))
        fitted_N = genes.fit(np.clip(child_N, 0, genes.top_N), sizes, rng, STEPS)
        if fitted_N is not None and fitted_N.tobytes() not in seen:
            children[fitted_N.tobytes()] = fitted_N
    return list(children.values())


def rank(costs_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Front number (0 the best) and crowding distance of P rows of two costs, minimised."""
    rank_P, crowding_P = np.full(len(costs_P2), -1), np.zeros(len(costs_P2))
    number = 0
    while (left := np.flatnonzero(rank_P < 0)).size:
        members = left[nondominated(costs_P2[left])]
        rank_P[members] = number
        number += 1
        for cost_P in costs_P2.T:
            order = members[np.argsort(cost_P[members], kind="stable")]
            span = max(cost_P[order[-1]] - cost_P[order[0]], 1e-12)
            crowding_P[order[[0, -1]]] = np.inf
            crowding_P[order[1:-1]] += (cost_P[order[2:]] - cost_P[order[:-2]]) / span
    return rank_P, crowding_P
