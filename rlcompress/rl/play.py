"""Episodes of a policy in the environment, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rlcompress.core.policy import Policy, PolicyShape
from rlcompress.schema import PPOSpec

ENVIRONMENT = "envs:rlcompress/Compression-v0"


def environment_options(ppo: PPOSpec) -> dict[str, Any]:
    """What the environment is told of the settings."""
    names = ("kl_weight", "accuracy_weight", "shaping", "gamma", "temperature")
    return {name: getattr(ppo, name) for name in names}


def policy_shape(env: gym.Env[Any, Any], hidden: int) -> PolicyShape:
    """Of a policy with `hidden` units for this environment."""
    spaces = env.observation_space
    assert isinstance(spaces, gym.spaces.Dict)
    return PolicyShape(
        action_columns=int(spaces["actions"].shape[1]),  # type: ignore[index]
        state_columns=int(spaces["state"].shape[0]),  # type: ignore[index]
        hidden=hidden,
        observation_version=env.get_wrapper_attr("observation_version"),
    )


def greedy(policy: Policy, env: gym.Env[Any, Any], target: float) -> dict[str, Any]:
    """One episode of the policy's most probable actions; the last step's info."""
    return _play(env, target, policy.best_action)


def sampled(
    policy: Policy, env: gym.Env[Any, Any], target: float, rng: np.random.Generator
) -> dict[str, Any]:
    """One episode of actions drawn from the policy; the last step's info."""

    @torch.no_grad()
    def draw(observation: Mapping[str, np.ndarray]) -> int:
        batch = {name: torch.as_tensor(value).unsqueeze(0) for name, value in observation.items()}
        chances = policy(batch)[0][0].double().softmax(0).numpy()
        # Rounding may leave a sum that `choice` does not take for 1.
        return int(rng.choice(len(chances), p=chances / chances.sum()))

    return _play(env, target, draw)


def _play(
    env: gym.Env[Any, Any], target: float, choose: Callable[[Mapping[str, np.ndarray]], int]
) -> dict[str, Any]:
    observation, _ = env.reset(options={"target": target})
    while True:
        observation, _, done, _, info = env.step(choose(observation))
        if done:
            return info
