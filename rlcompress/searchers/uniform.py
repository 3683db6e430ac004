"""The static rule: one keep ratio and one bit-width for the whole network, the whole grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record
from rlcompress.searchers.base import Measure, Settings, measured


def search(
    problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Iterator[Record]:
    """All bit-widths at as many evenly spaced keep ratios as the evaluations pay for."""
    steps = max(2, settings.evaluations // len(problem.bits))
    ratios = np.linspace(1.0, min(problem.keeps), steps)
    grid = (
        (problem.uniform(float(ratio), bits), None)
        for ratio in ratios
        for bits in sorted(problem.bits, reverse=True)
    )
    return measured("uniform", settings, history, measure, grid)
