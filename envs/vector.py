"""`rlcompress/Compression-v0`, N episodes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.episodes import Episodes
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.problem import Problem

Observations = dict[str, np.ndarray]
Seeds = int | Sequence[int | None] | None


class CompressionVectorEnv(VectorEnv[Observations, np.ndarray, np.ndarray]):
    """N episodes of `CompressionEnv` in lockstep: what Gymnasium's `SyncVectorEnv` of N of them
    answers, with equal prefixes computed once and observations computed together. With `explore`
    all N begin with one shaken prior, drawn from the first one's stream.

    `gymnasium.make_vec("envs:rlcompress/Compression-v0", num_envs=8, problem=...)` makes it.

    ## Action and observation space
    `CompressionEnv`'s, batched: `MultiDiscrete`, and `Dict(actions=Box(N, A, 10),
    state=Box(N, 31), mask=Box(N, A))`. An illegal action in any episode raises ValueError, and
    no episode has moved.

    ## Reward
    `CompressionEnv`'s, (N,) float64.

    ## Start and end
    All episodes have a step a layer and end together. The autoreset mode is `NEXT_STEP`: the step
    after the last one ignores its actions, pays 0 and returns the first observations of new
    episodes. `reset(options={"target": ...})` sets the target, one size ratio for all episodes
    or a sequence of N. As they go in lockstep, `options["reset_mask"]` can only be all true.
    `info` is in Gymnasium's vector format: an array a key (`measurement` is a dict of arrays)
    beside the mask `_key`; `schedule`, `measurement` and `target` at the end, `target` at the
    beginning.

    ## Arguments
    `num_envs` (N) and `CompressionEnv`'s; `seed` is a sequence of N. Without it `reset(seed=7)`
    seeds the episodes with 7, 8, ...; `reset(seed=[...])` each with its own.

    ## Version history
    v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    observation_version = OBSERVATION_VERSION

    def __init__(
        self,
        num_envs: int,
        problem: Problem,
        target: tuple[float, float] = (8.0, 40.0),
        *,
        seed: Sequence[Any] | None = None,
        **rules: float,
    ) -> None:
        self.num_envs = num_envs
        self.episodes = Episodes(problem, target, **rules)
        self.quality = self.episodes.quality
        self.single_action_space = self.episodes.action_space
        self.single_observation_space = self.episodes.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._streams = [seeding.np_random() for _ in range(num_envs)]
        self._seeded = False
        self._begun = self._ended = False
        if seed is not None:
            self.own_streams(seed)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """The generator that each episode draws its targets from."""
        return tuple(generator for generator, _ in self._streams)

    @property
    def np_random_seed(self) -> tuple[int, ...]:
        """Their seeds; -1 for those of the `seed` argument."""
        return tuple(seed for _, seed in self._streams)

    def own_streams(self, seeds: Sequence[Any]) -> None:
        """The `seed` argument, later: episode i draws from `default_rng(seeds[i])` from here on
        and the seeds of `reset` are ignored."""
        self._check_length("seeds", seeds)
        self._streams = [(np.random.default_rng(seed), -1) for seed in seeds]
        self._seeded = True

    def reset(
        self, *, seed: Seeds = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        if options and not np.all(options.get("reset_mask", True)):
            raise ValueError("reset_mask: the episodes go in lockstep, all or none are reset")
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        if seeds is not None:
            self._check_length("seed", seeds)
            if not self._seeded:
                pairs = zip(self._streams, seeds, strict=True)
                self._streams = [old if s is None else seeding.np_random(s) for old, s in pairs]
        target_N = np.array([self.episodes.draw(rng) for rng in self.np_random])
        if options and "target" in options:
            wanted = np.asarray(options["target"], dtype=np.float64)
            if wanted.ndim:
                self._check_length("target", wanted)
            target_N = np.broadcast_to(wanted, self.num_envs)
        self.episodes.begin(target_N, self.np_random[0])
        self._begun, self._ended = True, False
        return self._observations(), self._infos([{"target": t} for t in target_N.tolist()])

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset before step")
        neither = np.zeros(self.num_envs, dtype=np.bool_)
        if self._ended:
            observations, info = self.reset()
            return observations, np.zeros(self.num_envs), neither, neither.copy(), info
        reward_N, infos = self.episodes.step(np.asarray(actions))
        self._ended = bool(infos)
        terminated_N = np.full(self.num_envs, self._ended)
        return self._observations(), reward_N, terminated_N, neither, self._infos(infos)

    def _observations(self) -> Observations:
        return {name: array.copy() for name, array in self.episodes.observation.items()}

    def _infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        together: dict[str, Any] = {}
        for i, info in enumerate(infos):
            together = self._add_info(together, info, i)
        return together

    def _check_length(self, name: str, values: Sequence[Any] | np.ndarray) -> None:
        if len(values) != self.num_envs:
            raise ValueError(f"{name}: {len(values)} values for {self.num_envs} episodes")
