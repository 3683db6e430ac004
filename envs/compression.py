"""`rlcompress/Compression-v0`: one episode compresses one network, a layer a step."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.episodes import Episodes
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.problem import Problem


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
    `Dict(actions=Box(A, 10), state=Box(31), mask=Box(A))`, float32, values within [-50, 50]
    (mask: 0 or 1). The columns, their meaning and units: `rlcompress/core/observation.py`;
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
    | argument | default | |
    | --- | --- | --- |
    | `problem` | | `rlcompress.core.problem.Problem` |
    | `target` | (8, 40) | smallest and largest size ratio |
    | `kl_weight` | 1 | reward of a tenth of the KL |
    | `accuracy_weight` | 0.1 | reward of a point |
    | `shaping` | 1 | weight of the shaping term |
    | `gamma` | 1 | the learner's discount |
    | `temperature` | 1 | of the prior |
    | `explore` | 0 | deviation of the log-normal factors that shake the prior's losses |
    | `seed` | none | draws the targets; `reset` ignores later seeds, as RLlib repeats them |

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
        seed: Any = None,
        **rules: float,
    ) -> None:
        self.episodes = Episodes(problem, target, **rules)
        self.observer, self.quality = self.episodes.observer, self.episodes.quality
        self.action_space = self.episodes.action_space
        self.observation_space = self.episodes.observation_space
        self._own_rng = None if seed is None else np.random.default_rng(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        rng = self._own_rng if self._own_rng is not None else self.np_random
        target = self.episodes.draw(rng)
        if options and "target" in options:
            target = float(options["target"])
        self.episodes.begin(np.array([target]), rng)
        return self._observation(), {"target": target}

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        reward_N, infos = self.episodes.step(np.array([action]))
        info = infos[0] if infos else {}
        return self._observation(), float(reward_N[0]), bool(infos), False, info

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: array[0].copy() for name, array in self.episodes.observation.items()}
