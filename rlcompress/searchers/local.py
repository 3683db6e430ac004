"""Simulated annealing from the knapsack's answers (Kirkpatrick et al., 1983), cold.

A chain for each of a few sizes starts at the integer program's answer on the sensitivities. A move
changes one choice by one step and, where that leaves the size, gives bytes back elsewhere. Of a few
random moves the one is measured that the sensitivities think best; of what a round has measured for
all chains, a chain takes the best that fits it, if Metropolis' rule on the error's logarithm
lets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.prior import Losses
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.searchers.base import (
    Batches,
    Measure,
    Settings,
    measured_in_batches,
    probed,
    spread_order,
    targets,
)
from rlcompress.searchers.genes import Genes
from rlcompress.searchers.knapsack import answers

CHAINS = 8
#: Decades of KL: the noise of a few hundred images, so that a chain is not held by it.
TEMPERATURE = 0.02
#: A chain's schedules use at least this share of its bytes.
FULLNESS = 0.95
#: Random moves that one is chosen from, draws to find them in, and steps to give bytes back in.
MOVES, DRAWS, STEPS = 8, 64, 12
FLOOR = 1e-6


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """Every chain proposes one schedule a round; none is measured twice."""
    problem.require_reachable(settings.target)
    losses, spent = yield from probed("local", problem, settings, history, measure)
    past = [*spent, *history[len(spent) :]]
    batches = _anneal(problem, settings, losses)
    yield from measured_in_batches("local", settings, past, measure, batches, before=len(spent))


def refine(
    name: str,
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    known: int,
) -> Iterator[Record]:
    """The same for the searcher `name`, from the best of the first `known` records instead of the
    knapsack's answers; moves go by the estimates."""
    begun = [(r.schedule, r.measurement) for r in history[:known]]

    def batches() -> Batches:
        starts = []
        for target in _sizes(settings):
            limit = problem.dense.bytes / target
            fitting = [pair for pair in begun if pair[1].bytes <= limit]
            # A chain that nothing fits begins at what is nearest.
            starts.append(
                min(fitting, key=lambda pair: pair[1].error(problem.score))
                if fitting
                else min(begun, key=lambda pair: pair[1].bytes)
            )
        known_already = [schedule for schedule, _ in begun]
        yield from _chains(problem, settings, problem.prior.losses, starts, known_already)

    yield from measured_in_batches(name, settings, history, measure, batches(), before=known)


def _sizes(settings: Settings) -> list[float]:
    """The chains' size ratios, in the order that they propose in."""
    sizes = targets(settings, CHAINS)
    return [sizes[i % len(sizes)] for i in spread_order(CHAINS)]


def _anneal(problem: Problem, settings: Settings, losses: Losses) -> Batches:
    wanted = _sizes(settings)
    starts = list(answers(problem.with_losses(losses), wanted))
    # Neighbouring sizes may have one answer.
    first: dict[Schedule, float] = {}
    for schedule, target in zip(starts, wanted, strict=True):
        first[schedule] = max(target, first.get(schedule, target))
    found = yield list(first.items())
    measured_of = dict(zip(first, found, strict=True))
    begun = [(schedule, measured_of[schedule]) for schedule in starts]
    yield from _chains(problem, settings, losses, begun, starts)


def _chains(
    problem: Problem,
    settings: Settings,
    losses: Losses,
    starts: Sequence[tuple[Schedule, Measurement]],
    known: Sequence[Schedule],
) -> Batches:
    """A chain from each start, one for each of `_sizes`; none proposes what is `known`."""

    def score(measurement: Measurement) -> float:
        return float(np.log10(max(measurement.error(problem.score), FLOOR)))

    genes, rng = Genes(problem), np.random.default_rng(settings.seed)
    wanted = _sizes(settings)
    limits = [problem.dense.bytes / target for target in wanted]
    chains = [genes.of(schedule) for schedule, _ in starts]
    scores = [score(measurement) for _, measurement in starts]
    seen = {genes.of(schedule).tobytes() for schedule in known}
    while True:
        proposals: dict[int, np.ndarray] = {}
        for chain, limit in enumerate(limits):
            move = _move(genes, chains[chain], limit, losses, seen, rng)
            if move is not None:
                proposals[chain] = move
                seen.add(move.tobytes())
        if not proposals:
            return
        found = yield [(genes.schedule(move), wanted[c]) for c, move in proposals.items()]
        moves = list(proposals.values())
        for chain, limit in enumerate(limits):
            fitting = [i for i, m in enumerate(found) if m.bytes <= limit]
            if not fitting:
                continue
            best = min(fitting, key=lambda i: score(found[i]))
            worse = score(found[best]) - scores[chain]
            if worse <= 0 or rng.random() < np.exp(-worse / TEMPERATURE):
                chains[chain], scores[chain] = moves[best], score(found[best])


def _move(
    genes: Genes,
    start_N: np.ndarray,
    limit: float,
    losses: Losses,
    seen: set[bytes],
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Of `MOVES` unseen neighbours within `limit` bytes the one of least losses; None if
    `DRAWS` found none."""
    found: list[np.ndarray] = []
    for _ in range(DRAWS):
        moved_N = start_N.copy()
        gene = rng.integers(len(moved_N))
        moved_N[gene] += rng.choice((-1, 1))
        if not 0 <= moved_N[gene] <= genes.top_N[gene]:
            continue
        fitted_N = genes.fit(moved_N, (FULLNESS * limit, limit), rng, STEPS)
        if fitted_N is not None and fitted_N.tobytes() not in seen:
            found.append(fitted_N)
        if len(found) == MOVES:
            break
    return min(found, key=lambda row: genes.loss(row, losses), default=None)
