"""`rlcompress/DynamicCompression-v0`: one episode is one training run of one network."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.episodes import draw_target, observation_space, require_rules, require_target
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.schedule import Measurement
from rlcompress.core.training import Trainer, Training

LOSS_FLOOR = 1e-4


class DynamicCompressionEnv(gym.Env[dict[str, np.ndarray], np.int64]):
    """Choose channels and bits layer by layer while the network trains, and again in the next
    pass over the layers: what was cut may come back, what was kept may go.

    ## Action space and observation space
    Those of `Compression-v0`, so that one policy plays both: `Discrete(A)` and
    `Dict(actions=Box(A, 10), state=Box(31), mask=Box(A))`. The estimates come from the gradients
    and activations of the last minibatches, the prior is solved on them before every step, and the
    last eight columns of the state tell of the training (`rlcompress/core/observation.py`).

    ## Step
    An action decides one layer; `pace.recovery_steps` minibatches under masks and fake
    quantization follow it. Round r of `pace.rounds` aims at target^((r + 1) / rounds).
    An illegal action raises ValueError.

    ## Reward
    At the end `kl_weight x -log10(max(loss, 1e-4)) + accuracy_weight x (accuracy - dense) in
    points`, on held-out images after `final_steps` more minibatches; dense is the same training
    without compression. Each step adds gamma x phi(s') - phi(s), phi = -shaping x sum of the
    layers' unexplained variances / layers, phi = 0 at the end.

    ## Start and end
    Every episode branches from the same trained state, just before the first decision, with an
    order of minibatches of its own. `reset` draws the target as `Compression-v0` does;
    `options={"target": 20.0}` sets it. The episode terminates after rounds x layers steps. `info`
    of the last step holds `schedule` (JSON), `measurement` (dict) and `target`.

    ## Arguments
    | argument | default | |
    | --- | --- | --- |
    | `training` | | `rlcompress.core.training.Training`, or a `Trainer` of one |
    | `target`, `kl_weight`, `accuracy_weight`, `shaping`, `gamma`, `temperature`, `seed` | | as in `Compression-v0` |

    ## Version history
    v0: initial version.
    """  # noqa: E501

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_version = OBSERVATION_VERSION

    def __init__(
        self,
        training: Training | Trainer,
        target: tuple[float, float] = (8.0, 40.0),
        *,
        kl_weight: float = 1.0,
        accuracy_weight: float = 0.1,
        shaping: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        seed: Any = None,
    ) -> None:
        self.trainer = training if isinstance(training, Trainer) else Trainer(training)
        self.target_range = target
        self.kl_weight, self.accuracy_weight = kl_weight, accuracy_weight
        self.shaping, self.gamma = shaping, gamma
        compressor = self.trainer.compressor
        compressor.temperature = temperature
        self._most = compressor.most_ratio()
        require_rules(target, self._most, gamma=gamma, temperature=temperature)
        actions = len(compressor.keeps) * len(compressor.bits)
        self.action_space = gym.spaces.Discrete(actions)
        self.observation_space = observation_space(actions)
        self._own_rng = None if seed is None else np.random.default_rng(seed)
        self._observed: dict[str, np.ndarray] | None = None

    def own_stream(self, seed: Any) -> None:
        """The `seed` argument, later: the seeds of `reset` are ignored from here on."""
        self._own_rng = np.random.default_rng(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        rng = self._own_rng if self._own_rng is not None else self.np_random
        target = draw_target(rng, self.target_range)
        if options and "target" in options:
            target = float(options["target"])
        require_target(np.array([target]), self._most)
        self.trainer.begin(target, int(rng.integers(2**31)))
        self._potential = 0.0
        return self._observe(), {"target": target}

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._observed is None:
            raise gym.error.ResetNeeded("call reset before step")
        mask = self._observed["mask"]
        if not 0 <= action < len(mask) or not mask[action] > 0:
            raise ValueError(f"action {action} is illegal here (its mask is 0)")
        compressor, before = self.trainer.compressor, self._potential
        compressor.decide(int(action))
        if self.trainer.advance():
            shares = list(compressor.unexplained.values())
            self._potential = -self.shaping * sum(shares) / len(shares)
            return self._observe(), self.gamma * self._potential - before, False, False, {}
        measurement = self.trainer.measure()
        info = {
            "schedule": compressor.schedule.to_json(),
            "measurement": measurement.to_dict(),
            "target": compressor.target,
        }
        # The end has no next layer: its value is never used.
        last, self._observed = self._observed, None
        return last, self.quality(measurement) - before, True, False, info

    def quality(self, measurement: Measurement) -> float:
        """The reward of a finished training without shaping."""
        points = 100 * (measurement.accuracy - self.trainer.dense.accuracy)
        loss = max(measurement.loss, LOSS_FLOOR)
        return float(-self.kl_weight * np.log10(loss) + self.accuracy_weight * points)

    def _observe(self) -> dict[str, np.ndarray]:
        self._observed = self.trainer.compressor.observation()
        return {name: array.copy() for name, array in self._observed.items()}
