"""How env runners make their environments, and how the results reach the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback

from rlcompress.rl.cluster import problem_of
from rlcompress.rl.play import ENVIRONMENT

RECORDS = "records"


def make(context: Mapping[str, Any]) -> gym.vector.VectorEnv[Any, Any, Any]:
    """A runner's episodes in lockstep. `context` is RLlib's `env_config`:

    bundle    object reference of the problem's `Bundle`;  threads  torch threads
    seed      see `CompressionCallbacks`
    options   the other arguments of the environment;  losses  what its prior goes by
    num_envs  episodes: RLlib adds it where the vectorize mode is `vector_entry_point`
    """
    torch.set_num_threads(context["threads"])
    return gym.make_vec(
        ENVIRONMENT,
        num_envs=context["num_envs"],
        vectorization_mode="vector_entry_point",
        problem=problem_of(context["bundle"]).with_losses(context["losses"]),
        **context["options"],
    )


def _restarted() -> bool:
    """Whether Ray has started this actor before, in a process that is gone."""
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


class CompressionCallbacks(RLlibCallback):
    """Gives every episode's targets, and every runner's actions, a stream of their own, and sends
    every finished episode's schedule and measurement along with the metrics.

    RLlib repeats reset seeds in `complete_episodes` mode and shares them between runners. Here
    `env_config["seed"]`, a list of integers, seeds the streams with the runner's and the
    environment's number. Runner 1 and the driver's own (0) share theirs: the same experiment
    finds the same schedules with 0 and with 1 remote runner.
    """

    def on_environment_created(
        self, *, env_runner: Any, env: Any, env_context: Mapping[str, Any], **kwargs: Any
    ) -> None:
        # Not in `make`: RLlib does not tell a vector environment's maker the runner's number.
        runner = max(1, env_runner.worker_index)
        # An environment made anew goes on with other targets; so does a runner in a process made
        # anew, which knows no more how often that was.
        env_runner.made = getattr(env_runner, "made", 0) + 1
        anew = [time.time_ns()] if _restarted() else []
        about = [*env_context["seed"], runner, env_runner.made, *anew]
        env_runner.action_seed = about
        seeds = [[*about, lane] for lane in range(env.num_envs)]
        if isinstance(env, gym.vector.SyncVectorEnv):
            for one, seed in zip(env.envs, seeds, strict=True):
                one.get_wrapper_attr("own_stream")(seed)
        else:
            env.own_streams(seeds)

    def on_episode_start(self, *, env_runner: Any, **kwargs: Any) -> None:
        # The first moment at which there is a module.
        if env_runner.module.stream is None:
            (seed,) = np.random.SeedSequence(env_runner.action_seed).generate_state(1, np.uint64)
            env_runner.module.stream = torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def on_episode_end(
        self, *, episode: Any, env_runner: Any, metrics_logger: Any, **kwargs: Any
    ) -> None:
        info = episode.get_infos(-1)
        metrics_logger.log_value(
            RECORDS,
            {
                **({"network": info["network"]} if "network" in info else {}),
                "schedule": info["schedule"],
                "measurement": info["measurement"],
                "target": info["target"],
                "return": float(episode.get_return()),
                "runner": env_runner.worker_index,
            },
            reduce="item_series",
        )
