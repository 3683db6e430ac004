"""PPO over a zoo: every episode compresses a network that its worker draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray
import torch
from ray.tune.registry import register_env

from rlcompress.core.policy import Policy
from rlcompress.core.problem import Bundle, Member
from rlcompress.rl.cluster import problem_of, require_room, start_ray
from rlcompress.rl.config import arrays, config, going_on, learn
from rlcompress.rl.play import environment_options
from rlcompress.schema import PPOSpec

ZOO_ENVIRONMENT = "envs:rlcompress/Zoo-v0"
REGISTERED = "rlcompress-zoo-environment"


def make(context: Mapping[str, Any]) -> gym.vector.VectorEnv[Any, Any, Any]:
    """A runner's environments. `context` is RLlib's `env_config`: `members`; `bundles`, their
    object references; `held`, see `problem_of`; `threads`; `actions`; `options`, the other
    arguments of the environment; `num_envs`."""
    torch.set_num_threads(context["threads"])
    problems = {
        name: functools.partial(problem_of, reference, context["held"])
        for name, reference in context["bundles"].items()
    }

    def one() -> gym.Env[Any, Any]:
        env: gym.Env[Any, Any] = gym.make(
            ZOO_ENVIRONMENT,
            members=context["members"],
            problems=problems,
            actions=context["actions"],
            **context["options"],
        )
        return env

    return gym.vector.SyncVectorEnv([one] * context["num_envs"])


def train(
    members: Sequence[Member],
    bundles: Sequence[Bundle],
    policy: Policy,
    ppo: PPOSpec,
    *,
    episodes: int,
    held: int,
    seed: int,
    folder: Path,
    played: int = 0,
    on_iteration: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Iterator[dict[str, Any]]:
    """Goes on with `policy` for some episodes and yields what each found: network, schedule,
    measurement, target, return. The policy is saved in `folder` after every iteration; cut off
    after `played` episodes, it goes on with that."""
    # Of several a runner, RLlib ends a round with the shortest networks' episodes, and drops the
    # others.
    ppo = ppo.model_copy(update={"num_envs_per_env_runner": 1})
    left = going_on(ppo, policy, folder, episodes, played)
    if left is None:
        return
    lanes, batch, policy = left
    start_ray(ppo)
    require_room(lanes)
    register_env(REGISTERED, make)
    first = bundles[0].estimates
    actions = len(first.keeps) * len(first.bits)
    options = {**environment_options(ppo), "explore": ppo.explore}
    spaces = gym.make(ZOO_ENVIRONMENT, members=[], problems={}, actions=actions, **options)
    references = {m.name: ray.put(b) for m, b in zip(members, bundles, strict=True)}
    layers = [len(bundle.network.layers) for bundle in bundles]
    settings = config(
        lanes,
        policy.shape,
        arrays(policy),
        environment=REGISTERED,
        env_config={
            "members": list(members),
            "bundles": references,
            "held": held,
            "actions": actions,
            "seed": [seed, played],
            "options": options,
        },
        spaces=spaces,
        steps=round(sum(layers) / len(layers)),
        episodes=batch,
        # `played` tells restarts apart.
        seed=seed + 1000 * played,
        whole=True,
    )
    yield from learn(
        settings,
        policy.shape,
        episodes=episodes,
        batch=batch,
        folder=folder,
        about={"seed": seed, **environment_options(ppo)},
        on_iteration=on_iteration,
        played=played,
    )
