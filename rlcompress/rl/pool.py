"""Measures the schedules of open-loop searchers on Ray, in order, a few in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import torch

from rlcompress.core.problem import Bundle
from rlcompress.core.schedule import Measurement, Schedule
from rlcompress.rl.cluster import share
from rlcompress.rl.environment import problem_of


@ray.remote
def _measure(bundle: Bundle, key: str, schedule: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    problem = problem_of(key, lambda: bundle)
    return problem.evaluator.evaluate(Schedule.from_json(schedule)).to_dict()


def measurer(
    bundle: Bundle, *, workers: int, num_gpus: float = 0.0
) -> Callable[[Iterable[Schedule]], Iterator[Measurement]]:
    """A function that measures schedules on `workers` Ray tasks at a time and gives their
    measurements in the order of the schedules. Needs a started Ray."""
    reference = share(bundle)
    remote = _measure.options(num_cpus=1, num_gpus=num_gpus)

    def measure(schedules: Iterable[Schedule]) -> Iterator[Measurement]:
        waiting: deque[Any] = deque()
        for schedule in schedules:
            waiting.append(remote.remote(reference, reference.hex(), schedule.to_json()))
            if len(waiting) > 2 * workers:
                yield Measurement.from_dict(ray.get(waiting.popleft()))
        while waiting:
            yield Measurement.from_dict(ray.get(waiting.popleft()))

    return measure
