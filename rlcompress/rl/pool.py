"""Plays what needs no gradient on Ray: the schedules of open-loop searchers and a policy's own
episodes. In order, a few in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import ray
import torch

from rlcompress.core.errors import UserError
from rlcompress.core.policy import Policy
from rlcompress.core.prior import Losses
from rlcompress.core.problem import Bundle
from rlcompress.core.schedule import Measurement, Schedule
from rlcompress.rl.cluster import problem_of, share
from rlcompress.rl.play import greedy


@dataclass(frozen=True)
class Pool:
    """`workers` tasks at a time on a started Ray."""

    bundle: Bundle
    workers: int
    num_gpus: float = 0.0

    def measure(self, schedules: Iterable[Schedule]) -> Iterator[Measurement]:
        """The measurements of the schedules, in their order."""
        texts = (schedule.to_json() for schedule in schedules)
        return map(Measurement.from_dict, self._map(_measure, ((text,) for text in texts)))

    def play(
        self,
        policy: Policy,
        environment: str,
        options: Mapping[str, Any],
        targets: Iterable[float],
        losses: Losses,
    ) -> Iterator[dict[str, Any]]:
        """`greedy` episodes at the targets with a prior on `losses`; see there."""
        shared = ray.put(policy)
        calls = ((shared, environment, dict(options), target, losses) for target in targets)
        return self._map(_play, calls)

    def _map(
        self, task: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
    ) -> Iterator[dict[str, Any]]:
        reference = share(self.bundle)
        remote = ray.remote(num_cpus=1, num_gpus=self.num_gpus)(task)
        waiting: deque[Any] = deque()
        for arguments in calls:
            # In a list: an object reference of its own would arrive as the object.
            waiting.append(remote.remote([reference], *arguments))
            if len(waiting) > 2 * self.workers:
                yield _got(waiting.popleft())
        while waiting:
            yield _got(waiting.popleft())


def _got(reference: Any) -> dict[str, Any]:
    """Raises a worker's UserError as it is."""
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    return found


def _measure(bundle: list[Any], schedule: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return problem_of(bundle[0]).evaluator.evaluate(Schedule.from_json(schedule)).to_dict()


def _play(
    bundle: list[Any],
    policy: Policy,
    environment: str,
    options: dict[str, Any],
    target: float,
    losses: Losses,
) -> dict[str, Any]:
    torch.set_num_threads(1)
    problem = problem_of(bundle[0]).with_losses(losses)
    return greedy(policy, gym.make(environment, problem=problem, **options), target)
