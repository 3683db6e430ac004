"""Trains the arms of tickets on Ray, one task an arm, as many at a time as there is room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ray
import torch

from rlcompress.core.errors import UserError
from rlcompress.core.process import settle_process
from rlcompress.core.ticket import Lesson, Player, Task
from rlcompress.core.train import Checkpoint


@ray.remote(num_returns="streaming", max_retries=3)
def _train(lesson: Lesson, task: Task, resume: Checkpoint | None) -> Iterator[Checkpoint]:
    torch.set_num_threads(1)
    settle_process()
    yield from task.train(lesson, resume)


def player(*, num_gpus: float = 0.0) -> Player:
    """Checkpoints come back after every epoch, so workers share no disk with the driver and
    what they did is not lost with them. Needs a started Ray."""
    remote = _train.options(num_cpus=1, num_gpus=num_gpus)

    def play(
        tasks: Iterable[tuple[Task, Checkpoint | None]], lesson: Lesson
    ) -> Iterator[tuple[int, Checkpoint]]:
        shared = ray.put(lesson)
        streams: dict[Any, int] = {}
        for number, (task, resume) in enumerate(tasks):
            streams[remote.remote(shared, task, resume)] = number
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1)
            try:
                checkpoint = ray.get(next(ready[0]))
            except StopIteration:
                del streams[ready[0]]
                continue
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            yield streams[ready[0]], checkpoint

    return play
