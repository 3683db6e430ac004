"""`rlcompress/Zoo-v0`: compression episodes on a network that each reset draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.episodes import Episodes, draw_target, observation_space
from rlcompress.core.errors import UserError, did_you_mean
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.problem import Member, Problem


class ZooEnv(gym.Env[dict[str, np.ndarray], np.int64]):
    """`CompressionEnv` on a network of a zoo, one for each episode: its spaces, its observation and
    its rules. All networks have the same keep ratios and bit-widths to choose from.

    ## Reward
    `CompressionEnv`'s, less what the member expects at the episode's target: a number that is known
    before the first action, so it moves no optimum, and lets one critic value episodes of networks
    that are easy and networks that are hard.

    ## Start and end
    `reset` draws a member and a target from its range; `options` `network` (a name) and `target`
    set them. `info` holds `network` and `target`, at the end also `schedule` and `measurement`.

    ## Arguments
    `members`; `problems`, which gives each one's `Problem` by its name, built anew or found;
    `actions`, the number of keep ratios x bit-widths; `seed` and the rules are
    `CompressionEnv`'s.

    ## Version history
    v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_version = OBSERVATION_VERSION

    def __init__(
        self,
        members: Sequence[Member],
        problems: Mapping[str, Callable[[], Problem]],
        actions: int,
        *,
        seed: Any = None,
        **rules: float,
    ) -> None:
        self.members, self.problems = {m.name: m for m in members}, problems
        self.rules = rules
        self.action_space = gym.spaces.Discrete(actions)
        self.observation_space = observation_space(actions)
        self._own_rng = None if seed is None else np.random.default_rng(seed)
        self.episodes: Episodes | None = None

    def own_stream(self, seed: Any) -> None:
        """The `seed` argument, later: from here on the seeds of `reset` are ignored."""
        self._own_rng = np.random.default_rng(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        rng = self._own_rng if self._own_rng is not None else self.np_random
        names, options = list(self.members), options or {}
        drawn = names[int(rng.integers(len(names)))]
        name = options.get("network", drawn)
        if name not in self.members:
            near = did_you_mean(name, names)
            raise UserError(f"network = {name!r}: allowed: {', '.join(names)}{near}")
        self.member = self.members[name]
        target = float(options.get("target", draw_target(rng, self.member.target)))
        self.episodes = Episodes(
            self.problems[self.member.name](), self.member.target, **self.rules
        )
        self.episodes.begin(np.array([target]), rng)
        return self._observation(), {"network": self.member.name, "target": target}

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self.episodes is None:
            raise gym.error.ResetNeeded("call reset before step")
        reward_N, infos = self.episodes.step(np.array([action]))
        reward = float(reward_N[0])
        if not infos:
            return self._observation(), reward, False, False, {}
        reward -= self.member.expected(infos[0]["target"])
        return self._observation(), reward, True, False, {**infos[0], "network": self.member.name}

    def _observation(self) -> dict[str, np.ndarray]:
        assert self.episodes is not None
        return {name: array[0].copy() for name, array in self.episodes.observation.items()}
