"""How env runners make the environment, and how its results reach the driver."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback

from rlcompress.rl.cluster import problem_of
from rlcompress.rl.play import ENVIRONMENT

RECORDS = "records"

_instances = itertools.count()


def make(context: Any) -> gym.Env[Any, Any]:
    """One environment. `context` is RLlib's EnvContext over `env_config`:

    bundle    object reference of the problem's `Bundle`;  threads  torch threads
    seed      list of integers: with the runner's and the environment's number it seeds the goals
    options   the other arguments of the environment

    RLlib repeats reset seeds in `complete_episodes` mode and shares them between runners, so
    each instance gets a stream of its own here. Runner 1 and the driver's own (0) share theirs:
    the same experiment finds the same schedules with 0 and with 1 remote runner.
    """
    torch.set_num_threads(context["threads"])
    problem = problem_of(context["bundle"])
    runner = max(1, context.worker_index)
    seed = [*context["seed"], runner, next(_instances)]
    return gym.make(ENVIRONMENT, problem=problem, seed=seed, **context["options"])


class CollectRecords(RLlibCallback):
    """Sends every finished episode's schedule and measurement along with the metrics."""

    def on_episode_end(
        self, *, episode: Any, env_runner: Any, metrics_logger: Any, **kwargs: Any
    ) -> None:
        info = episode.get_infos(-1)
        metrics_logger.log_value(
            RECORDS,
            {
                "schedule": info["schedule"],
                "measurement": info["measurement"],
                "target": info["target"],
                "return": float(episode.get_return()),
                "runner": env_runner.worker_index,
            },
            reduce="item_series",
        )
