"""Episodes that teach: each step with what a teacher would do there."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rlcompress.core.lessons import Lessons
from rlcompress.core.observation import Observer
from rlcompress.core.prior import Losses
from rlcompress.core.problem import Problem
from rlcompress.rl.play import ENVIRONMENT

#: Who plays: the prior on the estimates, the teacher, or each step one of them.
PLAYERS = ("prior", "teacher", "both")


def lesson(
    problem: Problem,
    losses: Losses,
    player: str,
    target: float,
    seed: list[int],
    options: dict[str, Any],
) -> tuple[dict[str, Any], Lessons]:
    """One episode at a size ratio: the last step's info, and its steps as lessons.

    losses   what the teacher knows;  player  one of `PLAYERS`
    options  the environment's other arguments
    """
    env = gym.make(ENVIRONMENT, problem=problem, target=(target, target), **options)
    episodes = env.get_wrapper_attr("episodes")
    prior = problem.with_losses(losses).prior
    teacher = Observer(prior, problem.evaluator.estimates, options["temperature"])
    rng, steps = np.random.default_rng(seed), []
    observation, _ = env.reset(options={"target": target})
    done, info = False, dict[str, Any]()
    while not done:
        taught = teacher.observe(episodes.progress, np.array([target]))["actions"][0, :, -1]
        own = observation["actions"][:, -1]
        wise = {"prior": False, "teacher": True, "both": bool(rng.random() < 0.5)}[player]
        logits_A = np.where(observation["mask"] > 0, taught if wise else own, -np.inf)
        before = observation
        observation, reward, done, _, info = env.step(np.int64(logits_A.argmax()))
        steps.append((before, taught, float(reward)))
    return {**info, "return": sum(reward for _, _, reward in steps)}, Lessons.of(steps)
