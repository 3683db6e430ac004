"""`rlcompress/Compression-v0`: one episode compresses one network, a layer a step."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS, Observer
from rlcompress.core.prefix import Prefix
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement

ERROR_FLOOR = 1e-4


class CompressionEnv(gym.Env[dict[str, np.ndarray], np.int64]):
    """Choose, layer by layer in forward order, how many channels survive and how many bits
    their weights get, so that the network fits a size and still says what the dense one said.

    ## Action space
    `Discrete(A)`, A = number of keep ratios x number of bit-widths of the problem.
    Action a means keep ratio `keeps[a // B]` for the layer's group and `bits[a % B]` for its
    weights, B the number of bit-widths. Only actions with `mask` 1 are legal:

    | illegal | why |
    | --- | --- |
    | keep < 1 at a layer that does not own its group | it is decided already, or protected |
    | an action that puts the target out of reach | the smallest rest would be too big |

    An illegal action raises ValueError.

    ## Observation space
    `Dict(actions=Box(A, 10), state=Box(23), mask=Box(A))`, float32, values within [-50, 50]
    (mask: 0 or 1). The columns, their meaning and units are listed in `envs/observation.py`;
    the last column of `actions` is the logit of the prior (the Lagrangian knapsack on the
    estimates), at most 0.

    ## Reward
    At the end `kl_weight x -log10(max(error, 1e-4)) + accuracy_weight x (accuracy - dense) in
    points`: absolute, never an improvement over something degraded. The error is the problem's
    score on held-out images, unless it says else the KL of their logits to the dense network's
    (nats). The size is a constraint and pays nothing.
    Each step adds the potential-based shaping term gamma x phi(s') - phi(s) with
    phi = -shaping x sum of unexplained variances so far / layers, phi = 0 at the end, which
    leaves the best policy as it is (Ng, Harada & Russell, 1999).

    ## Start and end
    `reset` draws the target, a size ratio dense bytes / artifact bytes, log-uniformly from
    `target`; `options={"target": 20.0}` sets it. The episode terminates after the last layer; it
    is never truncated. `info` of the last step holds `schedule` (JSON), `measurement` (dict)
    and `target`.

    ## Arguments
    `problem` (`rlcompress.core.problem.Problem`), `target` (low, high), `kl_weight`,
    `accuracy_weight` (per point), `shaping`, `gamma` (of the learner), `temperature` (of the
    prior), `seed` (without one, `reset(seed=...)` decides; with one, later seeds are ignored:
    RLlib repeats them).

    ## Version history
    v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_version = OBSERVATION_VERSION

    def __init__(
        self,
        problem: Problem,
        target: tuple[float, float] = (8.0, 40.0),
        *,
        kl_weight: float = 1.0,
        accuracy_weight: float = 0.1,
        shaping: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        seed: Any = None,
    ) -> None:
        problem.require_reachable(target)
        self.problem = problem
        self.observer = Observer(problem, temperature)
        self.target_range = target
        self.kl_weight, self.accuracy_weight = kl_weight, accuracy_weight
        self.shaping, self.gamma = shaping, gamma
        self._own_rng = None if seed is None else np.random.default_rng(seed)
        actions = len(self.observer.keep_A)
        self.action_space = gym.spaces.Discrete(actions)
        self.observation_space = gym.spaces.Dict(
            {
                "actions": gym.spaces.Box(-50.0, 50.0, (actions, len(ACTION_COLUMNS)), np.float32),
                "state": gym.spaces.Box(-50.0, 50.0, (len(STATE_COLUMNS),), np.float32),
                "mask": gym.spaces.Box(0.0, 1.0, (actions,), np.float32),
            }
        )
        self._prefix: Prefix = problem.evaluator.begin()
        self._progress = self.observer.start()
        self.target = target[0]
        self._observation: dict[str, np.ndarray] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        rng = self._own_rng if self._own_rng is not None else self.np_random
        low, high = np.log(self.target_range)
        self.target = float(np.exp(rng.uniform(low, high)))
        if options and "target" in options:
            self.target = float(options["target"])
        self._prefix = self.problem.evaluator.begin()
        self._progress = self.observer.start()
        self._observation = self.observer.observe(self._progress, self.target)
        return self._observation, {"target": self.target}

    def _potential(self) -> float:
        return -self.shaping * sum(self._progress.unexplained) / len(self.observer.layers)

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if not self._observation["mask"][action]:
            raise ValueError(f"action {action} is illegal here (its mask is 0)")
        observer, progress = self.observer, self._progress
        layer = observer.layers[progress.step]
        keep, bits = int(observer.keep_A[action]), int(observer.bits_A[action])
        before = self._potential()
        self._prefix = self.problem.evaluator.advance(
            self._prefix, self.problem.keeps[keep], self.problem.bits[bits]
        )
        if group := self.problem.network.owned_group(layer.name):
            progress.keep_G[observer.column[group.name]] = keep
        progress.bits_L[progress.step] = bits
        progress.unexplained = self._prefix.unexplained
        if progress.step < len(observer.layers):
            self._observation = observer.observe(progress, self.target)
            return self._observation, self.gamma * self._potential() - before, False, False, {}
        measurement = self.problem.evaluator.finish(self._prefix)
        info = {
            "schedule": self.problem.evaluator.schedule(self._prefix).to_json(),
            "measurement": measurement.to_dict(),
            "target": self.target,
        }
        # The end has no next layer: the last observation stays, as its value is never used.
        return self._observation, self.quality(measurement) - before, True, False, info

    def quality(self, measurement: Measurement) -> float:
        """The reward of a finished schedule without shaping."""
        points = 100 * (measurement.accuracy - self.problem.dense.accuracy)
        error = max(measurement.error(self.problem.score), ERROR_FLOOR)
        return float(-self.kl_weight * np.log10(error) + self.accuracy_weight * points)
