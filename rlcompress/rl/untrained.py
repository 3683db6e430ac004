"""The `untrained` searcher: what PPO starts from, which is the prior. The control that training
must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import gymnasium as gym
import numpy as np

from rlcompress.core.policy import PRIOR, Agent, Policy
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy, policy_shape, sampled
from rlcompress.rl.transfer import prepared, tempered
from rlcompress.schema import PPOSpec
from rlcompress.searchers.base import Settings


def search(
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    *,
    ppo: PPOSpec,
    begin: Agent = PRIOR,
) -> Iterator[Record]:
    """By turns the policy's best guess at sizes spread over the range, and actions drawn from it at
    random sizes, as in training. Plays in this process and starts no Ray.

    begin  as `ppo.search` has it"""
    problem.require_reachable(settings.target)
    problem = prepared(problem, begin)
    ppo = tempered(ppo, begin)
    env = gym.make(ENVIRONMENT, problem=problem, target=settings.target, **environment_options(ppo))
    policy = (begin.policy or Policy(policy_shape(env, ppo.hidden))).eval()
    low, high = settings.target
    for i in range(len(history), settings.evaluations):
        if i % 2 == 0:
            info = greedy(policy, env, float(low * (high / low) ** _spread(i // 2)))
        else:
            rng = np.random.default_rng([settings.seed, i])
            info = sampled(policy, env, float(np.exp(rng.uniform(*np.log((low, high))))), rng)
        yield Record(
            Schedule.from_json(info["schedule"]),
            Measurement.from_dict(info["measurement"]),
            "untrained",
            settings.seed,
            i + 1,
            float(info["target"]),
        )


def _spread(number: int) -> float:
    """In [0, 1]: 0, 1, 1/2, 1/4, 3/4, 1/8, ... (van der Corput, 1935)."""
    if number < 2:
        return float(number)
    bits = f"{number - 1:b}"[::-1]
    return int(bits, 2) / 2 ** len(bits)
