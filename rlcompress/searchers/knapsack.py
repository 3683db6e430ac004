"""The integer program on sensitivities: least sum of losses within a size, by SciPy's HiGHS.

Binary x[g,k]: group g keeps ratio k. Binary w[l,k,b]: layer l has output ratio k and bits b.
A layer's bytes are a product of its input and output widths; z[link,i,k,b] stands for the
product of x[input group,i] and w[l,k,b] and is exact wherever x and w are integers.

    minimise    sum prune[g,k] x[g,k] + sum quantize[l,b] w[l,k,b]
    subject to  bytes <= target,  sum_k x[g,k] = 1,  sum_b w[l,k,b] = x[g(l),k],
                sum_i z[.,i,k,b] = w[l,k,b],  sum_{k,b} z[.,i,k,b] = x[input group,i]
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from rlcompress.core.cost import FLOAT_BYTES, vector_bytes
from rlcompress.core.graph import Layer, Norm
from rlcompress.core.prior import Losses
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.searchers.base import (
    Measure,
    Proposal,
    Settings,
    measured,
    probed,
    spread_order,
    targets,
)

#: Sizes solved for: more than that differ by a few channels.
MOST_TARGETS = 24
#: Seconds are usual. What the solver has by then depends on the machine: rather late than so.
SECONDS = 60.0
GAP = 0.01
#: SciPy's status of a program whose time was up.
LATE = 1


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """The solver prints a debugging line now and then, past Python and its own options."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


class Program:
    """Collects variables and rows of the integer program."""

    def __init__(self, problem: Problem, losses: Losses) -> None:
        self.problem, self.prior, self.losses = problem, problem.prior, losses
        self.cost: list[float] = []
        self.size: list[float] = []
        self.integer: list[int] = []
        self.entries: list[tuple[int, int, float]] = []
        self.right: list[float] = []
        #: Whether the solver ran out of time at the last size.
        self.late = False
        costs = problem.evaluator.costs
        self.constant = float(costs.header + FLOAT_BYTES * costs.rest)
        self.column = {name: i for i, name in enumerate(problem.network.groups)}
        self.x = {name: self._group(name) for name in self.column}
        self.w = [self._layer(i, x) for i, x in enumerate(problem.network.layers.values())]
        for norm in problem.network.norms:
            self._norm(norm)

    def _variable(self, cost: float, size: float, integer: bool) -> int:
        self.cost.append(cost)
        self.size.append(size)
        self.integer.append(int(integer))
        return len(self.cost) - 1

    def _equal(self, terms: dict[int, float], right: float) -> None:
        row = len(self.right)
        self.entries += [(row, v, a) for v, a in terms.items()]
        self.right.append(right)

    def _group(self, name: str) -> np.ndarray:
        losses = self.losses.prune_GK[self.column[name]]
        x = np.array(
            [self._variable(loss, 0.0, True) if np.isfinite(loss) else -1 for loss in losses]
        )
        self._equal({int(v): 1.0 for v in x if v >= 0}, 1.0)
        return x

    def _counts(self, group: str | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Surviving channels of each choice and the variables that stand for it (-1: fixed)."""
        if group is None:
            return np.array([channels]), np.array([-1])
        x = self.x[group]
        return self.prior.counts_GK[self.column[group]][x >= 0], x[x >= 0]

    def _layer(self, index: int, layer: Layer) -> np.ndarray:
        """w[k, b] of a layer; its links' z on the way."""
        bits = self.prior.bits
        counts_K, x_K = self._counts(layer.group, layer.out_channels)
        depthwise = layer.kind == "depthwise"
        biased = layer.has_bias or layer.batch_norm is not None
        linked = sum(len(link.index) for link in layer.inputs)
        fixed = 1 if depthwise else (layer.in_channels - linked) // layer.conv_groups
        w_KB = np.array(
            [
                [
                    self._variable(
                        float(self.losses.quantize_LB[index, b]),
                        count
                        * (float(vector_bytes(width, biased)) + fixed * layer.kernel * width / 8),
                        True,
                    )
                    for b, width in enumerate(bits)
                ]
                for count in counts_K
            ]
        )
        for k, x in enumerate(x_K):
            terms = {int(v): 1.0 for v in w_KB[k]}
            self._equal({**terms, int(x): -1.0} if x >= 0 else terms, 0.0 if x >= 0 else 1.0)
        if depthwise:
            return w_KB
        for link in layer.inputs:
            in_counts_I, x_I = self._counts(link.group, 0)
            spread = len(link.index) / self.problem.network.groups[link.group].channels
            z = np.array(
                [
                    [
                        [
                            self._variable(
                                0.0,
                                n * spread * count * layer.kernel * width / 8 / layer.conv_groups,
                                False,
                            )
                            for width in bits
                        ]
                        for count in counts_K
                    ]
                    for n in in_counts_I
                ]
            )
            for k in range(len(counts_K)):
                for b in range(len(bits)):
                    self._equal({**{int(v): 1.0 for v in z[:, k, b]}, int(w_KB[k, b]): -1.0}, 0.0)
            for i, x in enumerate(x_I):
                self._equal({**{int(v): 1.0 for v in z[i].ravel()}, int(x): -1.0}, 0.0)
        return w_KB

    def _norm(self, norm: Norm) -> None:
        """Its vectors shrink with the groups that they are of."""
        number = FLOAT_BYTES * norm.vectors
        linked = sum(len(link.index) for link in norm.links)
        self.constant += number * (norm.channels - linked)
        for link in norm.links:
            spread = len(link.index) / self.problem.network.groups[link.group].channels
            for count, x in zip(*self._counts(link.group, 0), strict=True):
                self.size[x] += number * spread * count

    def solve(self, max_bytes: float) -> Schedule | None:
        """The best schedule within `max_bytes`; None if there is none that is surely within it, or
        if the solver found none in time (`late`)."""
        rows, columns, values = zip(*self.entries, strict=True)
        shape = (len(self.right), len(self.cost))
        equal = coo_array((values, (rows, columns)), shape=shape).tocsr()
        size = np.array(self.size)[None] / max_bytes
        scale = max(np.abs(self.cost).max(), 1e-12)
        with _stdout_to_stderr():
            result = milp(
                np.array(self.cost) / scale,
                integrality=np.array(self.integer),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(equal, self.right, self.right),
                    # Rounding up to whole bytes can add one byte a layer.
                    LinearConstraint(size, -np.inf, 1 - (self.constant + len(self.w)) / max_bytes),
                ],
                options={"time_limit": SECONDS, "mip_rel_gap": GAP},
            )
        self.late = result.x is None and result.status == LATE
        if result.x is None:
            return None
        keep = {}
        for name, x in self.x.items():
            if not self.problem.network.groups[name].protected:
                chosen = [k for k, v in enumerate(x) if v >= 0 and result.x[v] > 0.5]
                keep[name] = float(self.prior.keeps[chosen[0]])
        bits = {
            name: int(self.prior.bits[int(result.x[w_KB].sum(0).argmax())])
            for name, w_KB in zip(self.problem.network.layers, self.w, strict=True)
        }
        return Schedule(keep, bits)


def answers(problem: Problem, wanted: Sequence[float]) -> Iterator[Schedule]:
    """The program's answer for each size ratio on the losses that the problem's prior goes by, or
    the prior's own where the solver has none."""
    program = Program(problem, problem.prior.losses)
    for target in wanted:
        size = problem.dense.bytes / target
        # Where one size is too much for it, the others are.
        found = None if program.late else program.solve(size)
        yield found or problem.prior.schedule(size)


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """One program for each of at most `MOST_TARGETS` sizes, on estimates, which takes no evaluation
    to propose, or on sensitivities that the first evaluations measure."""
    problem.require_reachable(settings.target)
    losses, spent = yield from probed("knapsack", problem, settings, history, measure)

    def proposals() -> Iterator[Proposal]:
        yield from ((record.schedule, None) for record in spent)
        sizes = targets(settings, MOST_TARGETS)
        wanted = [sizes[i] for i in spread_order(len(sizes))]
        found = zip(answers(problem.with_losses(losses), wanted), wanted, strict=True)
        # Neighbouring sizes may have one answer.
        seen: set[Schedule] = set()
        for schedule, target in found:
            if schedule not in seen:
                seen.add(schedule)
                yield schedule, target

    past = [*spent, *history[len(spent) :]]
    yield from measured("knapsack", settings, past, measure, proposals())
