"""The rules of an episode, for N of them in lockstep: what both environments share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rlcompress.core.errors import UserError
from rlcompress.core.inputs import require
from rlcompress.core.observation import ACTION_COLUMNS, STATE_COLUMNS, Observer
from rlcompress.core.prefix import Prefix
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement

ERROR_FLOOR = 1e-4
#: Share of the beginnings whose prior is left as it is, where `explore` shakes it; rungs of one
#: that is shaken, which is solved for these episodes alone.
UNSHAKEN, SHAKEN_RUNGS = 0.25, 24


def observation_space(actions: int) -> gym.spaces.Dict:
    """Of every environment here, so that one policy plays them all."""
    return gym.spaces.Dict(
        {
            "actions": gym.spaces.Box(-50.0, 50.0, (actions, len(ACTION_COLUMNS)), np.float32),
            "state": gym.spaces.Box(-50.0, 50.0, (len(STATE_COLUMNS),), np.float32),
            "mask": gym.spaces.Box(0.0, 1.0, (actions,), np.float32),
        }
    )


def draw_target(rng: np.random.Generator, target: tuple[float, float]) -> float:
    """A size ratio, log-uniformly from the range."""
    low, high = np.log(target)
    return float(np.exp(rng.uniform(low, high)))


def require_rules(target: Sequence[float], most: float, **rules: float) -> None:
    """Raises UserError, a line for each argument of an environment that is out of its range.
    `most`: the largest size ratio that the choices allow."""
    found = []
    if len(target) != 2 or not 1 <= target[0] <= target[1] <= most:
        found.append(
            f"target = {list(target)}: two size ratios, the smaller first, "
            f"from 1 to {most:.1f}, the most that the choices allow"
        )
    if not rules["temperature"] > 0:
        found.append(f"temperature = {rules['temperature']}: must be above 0")
    if not 0 <= rules["gamma"] <= 1:
        found.append(f"gamma = {rules['gamma']}: from 0 to 1")
    if not rules.get("explore", 0.0) >= 0:
        found.append(f"explore = {rules['explore']}: 0 or more")
    require(found)


def require_target(target_N: np.ndarray, most: float) -> None:
    """Raises UserError for size ratios (N,) of `reset` that no schedule has."""
    # The range's own end, drawn through a logarithm, may lie a rounding beyond it.
    if not np.all((target_N >= 1) & (target_N <= most * (1 + 1e-9))):
        raise UserError(f"target = {target_N.tolist()}: size ratios are from 1 to {most:.1f} here")


class Episodes:
    """N episodes of one problem. All have a step a layer, so they begin and end together.

    Episodes that have done the same so far share one prefix, which is advanced once for each
    distinct action; keep ratios that leave the same channels are the same. The activations
    of at most 2 N prefixes are held, whatever the evaluator caches.
    The arguments are `CompressionEnv`'s.

    observation  the last step's, (N, ...);  target_N  size ratios
    """

    def __init__(
        self,
        problem: Problem,
        target: tuple[float, float],
        *,
        kl_weight: float = 1.0,
        accuracy_weight: float = 0.1,
        shaping: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        explore: float = 0.0,
    ) -> None:
        self._most = problem.max_ratio()
        require_rules(target, self._most, gamma=gamma, temperature=temperature, explore=explore)
        self.problem, self.target_range = problem, target
        self.observer = Observer(problem.prior, problem.evaluator.estimates, temperature)
        self.kl_weight, self.accuracy_weight = kl_weight, accuracy_weight
        self.shaping, self.gamma, self.explore = shaping, gamma, explore
        actions = len(self.observer.keep_A)
        self.action_space = gym.spaces.Discrete(actions)
        self.observation_space = observation_space(actions)
        self._running = False

    def draw(self, rng: np.random.Generator) -> float:
        return draw_target(rng, self.target_range)

    def begin(self, target_N: np.ndarray, rng: np.random.Generator) -> None:
        """New episodes, one for each target. With `explore`, most begin with a prior on shaken
        losses: its choices differ from the plain one's as a whole, where noise on each action
        mostly undoes what it answered to. Raises UserError for targets that are out of reach."""
        require_target(target_N, self._most)
        if self.explore:
            shaken = rng.random() >= UNSHAKEN
            plain = self.problem.prior
            self.observer.prior = plain.shaken(rng, self.explore, SHAKEN_RUNGS) if shaken else plain
        count = len(target_N)
        self.target_N = target_N
        self._prefixes: list[Prefix] = [self.problem.evaluator.begin()]
        self._which_N = np.zeros(count, dtype=np.int64)
        self.progress = self.observer.start(count)
        self._potential_N = np.zeros(count)
        self._running = True
        self._observe()

    def _observe(self) -> None:
        self.observation = self.observer.observe(self.progress, self.target_N)
        self._legal_NA = self.observation["mask"] > 0

    def step(self, actions_N: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """An action in each episode. Returns the rewards and, after the last layer, each
        episode's schedule, measurement and target. The end has no next layer: the last
        observation stays, as its value is never used.

        Raises ValueError if an action is illegal, ResetNeeded before `begin` and behind the end.
        """
        if not self._running:
            raise gym.error.ResetNeeded("call reset before step, and again behind the end")
        for action, legal_A in zip(actions_N, self._legal_NA, strict=True):
            if not 0 <= action < len(legal_A) or not legal_A[action]:
                raise ValueError(f"action {action} is illegal here (its mask is 0)")
        self._advance(actions_N)
        unexplained_NT = np.array([p.unexplained for p in self._prefixes])[self._which_N]
        self.progress = self.observer.decide(self.progress, actions_N, unexplained_NT)
        before_N, layers = self._potential_N, len(self.observer.layers)
        if self.progress.step < layers:
            self._potential_N = -self.shaping * unexplained_NT.sum(1) / layers
            self._observe()
            return self.gamma * self._potential_N - before_N, []
        self._running, evaluator = False, self.problem.evaluator
        measured = [evaluator.finish(prefix) for prefix in self._prefixes]
        schedules = self.observer.schedules(self.progress)
        infos = [
            {"schedule": schedule.to_json(), "measurement": measured[i].to_dict(), "target": target}
            for schedule, i, target in zip(
                schedules, self._which_N, self.target_N.tolist(), strict=True
            )
        ]
        quality_N = np.array([self.quality(measurement) for measurement in measured])[self._which_N]
        return quality_N - before_N, infos

    def _advance(self, actions_N: np.ndarray) -> None:
        observer, problem = self.observer, self.problem
        effect_N = observer.effect_LA[self.progress.step, actions_N]
        actions = len(observer.keep_A)
        codes, self._which_N = np.unique(self._which_N * actions + effect_N, return_inverse=True)
        self._prefixes = [
            problem.evaluator.advance(
                self._prefixes[prefix],
                problem.keeps[observer.keep_A[action]],
                problem.bits[observer.bits_A[action]],
            )
            for prefix, action in zip(*divmod(codes, actions), strict=True)
        ]

    def quality(self, measurement: Measurement) -> float:
        """The reward of a finished schedule without shaping."""
        points = 100 * (measurement.accuracy - self.problem.dense.accuracy)
        error = max(measurement.error(self.problem.score), ERROR_FLOOR)
        return float(-self.kl_weight * np.log10(error) + self.accuracy_weight * points)
