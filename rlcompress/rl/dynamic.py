"""PPO in the dynamic environment: the same policy, going on where the compression of trained
networks left it, learns what training shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray
import torch
from ray.tune.registry import register_env

from rlcompress.core.policy import LEARNED, Policy
from rlcompress.core.process import settle_process
from rlcompress.core.schedule import Record
from rlcompress.core.training import Training
from rlcompress.rl.cluster import require_room, start_ray
from rlcompress.rl.config import arrays, config, going_on, learn, record_of
from rlcompress.rl.play import environment_options, policy_shape
from rlcompress.rl.transfer import tempered
from rlcompress.schema import PPOSpec

DYNAMIC_ENVIRONMENT = "envs:rlcompress/DynamicCompression-v0"
REGISTERED = "rlcompress-dynamic-environment"


def make(context: Mapping[str, Any]) -> gym.vector.VectorEnv[Any, Any, Any]:
    """A runner's episodes, one after the other, each environment with a network of its own.
    `context` is RLlib's `env_config`: `training`, an object reference; `threads`; `options`, the
    other arguments of the environment; `num_envs`."""
    torch.set_num_threads(context["threads"])
    settle_process()
    training = ray.get(context["training"])

    def one() -> gym.Env[Any, Any]:
        env: gym.Env[Any, Any] = gym.make(
            DYNAMIC_ENVIRONMENT, training=training, **context["options"]
        )
        return env

    return gym.vector.SyncVectorEnv([one] * context["num_envs"])


def train(
    training: Training,
    ppo: PPOSpec,
    *,
    target: tuple[float, float],
    episodes: int,
    seed: int,
    folder: Path,
    played: int = 0,
    on_iteration: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Iterator[Record]:
    """Trains a policy for some episodes and yields the training runs that it played. It starts
    from `training.agent`'s, of `Compression-v0` or of here, if that was trained, and is saved in
    `folder` after every iteration. Cut off after `played` episodes, it goes on from there.
    """
    ppo = tempered(ppo, training.agent)
    options = {"target": target, **environment_options(ppo)}
    env = gym.make(DYNAMIC_ENVIRONMENT, training=training, **options)
    policy = training.agent.policy or Policy(policy_shape(env, ppo.hidden))
    left = going_on(ppo, policy, folder, episodes, played)
    if left is None:
        return
    lanes, batch, policy = left
    start_ray(ppo)
    require_room(lanes)
    register_env(REGISTERED, make)
    shape = policy.shape
    if training.agent.learned is not None:
        folder.mkdir(parents=True, exist_ok=True)
        training.agent.learned.save(folder / LEARNED)
    algorithm_config = config(
        lanes,
        shape,
        arrays(policy),
        environment=REGISTERED,
        env_config={"training": ray.put(training), "seed": [seed, played], "options": options},
        spaces=env,
        steps=training.pace.rounds * len(training.network.layers),
        episodes=batch,
        # `played` tells restarts apart.
        seed=seed + 1000 * played,
    )
    rows = learn(
        algorithm_config,
        shape,
        episodes=episodes,
        batch=batch,
        folder=folder,
        about={"seed": seed, **environment_options(ppo)},
        on_iteration=on_iteration,
        played=played,
    )
    for count, info in enumerate(rows, start=played + 1):
        yield record_of(info, seed, count)
