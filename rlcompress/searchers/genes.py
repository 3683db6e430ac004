"""Schedules as rows of small integers, for searchers that change a few choices at a time.

Shapes: N genes (a keep of each group that may be cut, then the bits of each layer), S schedules.
"""

from __future__ import annotations

import numpy as np

from rlcompress.core.prior import Losses
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Schedule


class Genes:
    """A gene is an index into its choices, which ascend; ratios that keep as many channels are one.

    top_N  each gene's largest value
    """

    def __init__(self, problem: Problem) -> None:
        self._costs = problem.evaluator.costs
        self._groups = [g for g in problem.network.groups.values() if not g.protected]
        self._layers = list(problem.network.layers)
        column = {name: i for i, name in enumerate(problem.network.groups)}
        self._column = [column[group.name] for group in self._groups]
        #: columns of `Losses` that the values of a gene stand for
        self._keep: list[list[int]] = []
        self._counts: list[np.ndarray] = []
        self._keeps = problem.keeps
        for group in self._groups:
            column_of = {group.count(problem.keeps[k]): int(k) for k in np.argsort(problem.keeps)}
            self._keep.append(list(column_of.values()))
            self._counts.append(np.array(list(column_of)))
        self._bits = np.argsort(problem.bits)
        self._widths = np.array(problem.bits)[self._bits]
        sizes = [len(keep) for keep in self._keep] + [len(self._bits)] * len(self._layers)
        self.top_N = np.array(sizes) - 1

    def of(self, schedule: Schedule) -> np.ndarray:
        """(N,) of a schedule whose ratios and bits are choices of the problem."""
        keep = [
            int(np.searchsorted(counts, group.count(schedule.ratio(group.name))))
            for group, counts in zip(self._groups, self._counts, strict=True)
        ]
        bits = [int(np.searchsorted(self._widths, schedule.width(n))) for n in self._layers]
        return np.array(keep + bits, dtype=np.int64)

    def schedule(self, genes_N: np.ndarray) -> Schedule:
        cut = len(self._groups)
        return Schedule(
            {
                group.name: float(self._keeps[keep[gene]])
                for group, keep, gene in zip(self._groups, self._keep, genes_N[:cut], strict=True)
            },
            {
                name: int(self._widths[gene])
                for name, gene in zip(self._layers, genes_N[cut:], strict=True)
            },
        )

    def bytes(self, genes_N: np.ndarray) -> int:
        """Size of the artifact."""
        cut = len(self._groups)
        counts_G = self._costs.full_counts_G.copy()
        for column, counts, gene in zip(self._column, self._counts, genes_N[:cut], strict=True):
            counts_G[column] = counts[gene]
        bits_L = self._widths[genes_N[cut:]]
        return int(self._costs.bytes(counts_G[None], bits_L[None])[0])

    def loss(self, genes_N: np.ndarray, losses: Losses) -> float:
        """The sum of losses, nats."""
        cut = len(self._groups)
        pruned = sum(
            losses.prune_GK[column, keep[gene]]
            for column, keep, gene in zip(self._column, self._keep, genes_N[:cut], strict=True)
        )
        rows = np.arange(len(self._layers))
        return float(pruned + losses.quantize_LB[rows, self._bits[genes_N[cut:]]].sum())

    def fit(
        self, genes_N: np.ndarray, sizes: tuple[float, float], rng: np.random.Generator, steps: int
    ) -> np.ndarray | None:
        """Random single steps until the size lies within `sizes` (bytes); None if `steps` do not
        suffice. A step up never goes beyond."""
        genes_N, (low, high) = genes_N.copy(), sizes
        size = self.bytes(genes_N)
        for _ in range(steps):
            if low <= size <= high:
                break
            change = -1 if size > high else 1
            movable = np.flatnonzero(genes_N > 0 if change < 0 else genes_N < self.top_N)
            if not len(movable):
                return None
            gene = movable[rng.integers(len(movable))]
            genes_N[gene] += change
            new = self.bytes(genes_N)
            if change > 0 and new > high:
                genes_N[gene] -= change
            else:
                size = new
        return genes_N if low <= size <= high else None
