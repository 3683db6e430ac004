"""The native vector environment answers what Gymnasium's own of single ones answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AutoresetMode, VectorWrapper
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.evaluate import Prefix
from rlcompress.core.problem import Problem, make_bundle
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from tests.toy import BITS, KEEPS, toy_bundle

ID = "envs:rlcompress/Compression-v0"
NATIVE, SYNC = "vector_entry_point", "sync"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return toy_bundle(epochs=2).problem()


def make(problem: Problem, count: int, mode: str = NATIVE, **options: Any) -> gym.vector.VectorEnv:
    options = {"target": (3.0, 9.0), **options}
    return gym.make_vec(ID, num_envs=count, vectorization_mode=mode, problem=problem, **options)


class LegalActions(VectorWrapper):
    """Takes any action for the legal one at that place: the whole action space can be sampled."""

    def reset(self, **options: Any) -> Any:
        self.last, info = self.env.reset(**options)
        return self.last, info

    def step(self, actions: np.ndarray) -> Any:
        legal = [np.flatnonzero(mask) for mask in self.last["mask"]]
        chosen = [row[a % len(row)] for row, a in zip(legal, actions, strict=True)]
        self.last, *rest = self.env.step(np.array(chosen))
        return (self.last, *rest)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif a.dtype.kind == "f":
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-6)
    else:
        assert a.dtype == b.dtype
        assert (a == b).all()


@settings(max_examples=25)
@given(count=st.integers(1, 5), seed=st.integers(0, 1000), few=st.integers(1, 9))
def test_it_answers_what_single_environments_answer(problem, count, seed, few):
    """Two episodes and their resets; `few` actions to choose from make equal prefixes."""
    native, sync = (LegalActions(make(problem, count, mode)) for mode in (NATIVE, SYNC))
    assert_same(native.reset(seed=seed)[0], sync.reset(seed=seed)[0])
    assert native.np_random_seed == sync.np_random_seed
    rng = np.random.default_rng(seed)
    for _ in range(2 * (len(problem.network.layers) + 1)):
        actions = rng.integers(few, size=count)
        for ours, theirs in zip(native.step(actions), sync.step(actions), strict=True):
            assert_same(ours, theirs)


def test_episodes_explore_from_one_shaken_prior(problem):
    """Another one at every beginning: one a batch is what solving for it costs."""
    env = make(problem, 3, explore=1.0, seed=[1, 2, 3])
    priors = set()
    for _ in range(6):
        seen, _ = env.reset(options={"target": 5.0})
        logits = seen["actions"][..., -1]
        assert (logits == logits[0]).all()
        priors.add(logits[0].tobytes())
        done = False
        while not done:
            actions = seen["actions"][..., -1] - 1e9 * (seen["mask"] == 0)
            seen, _, ended, _, info = env.step(actions.argmax(1))
            done = bool(ended.all())
        assert (info["measurement"]["bytes"] <= problem.dense.bytes / 5.0).all()
    assert len(priors) > 2


def test_gymnasiums_own_comparison(problem):
    native, sync = (LegalActions(make(problem, 1, mode)) for mode in (NATIVE, SYNC))
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert native.metadata == sync.metadata
    check_environments_match(native, sync, num_steps=20)
    three = (LegalActions(make(problem, 3, mode)) for mode in (NATIVE, SYNC))
    check_environments_match(*three, num_steps=0)


@pytest.fixture
def count_advances(monkeypatch) -> Callable[[Problem], list[int]]:
    """Of a problem, a list that grows with every layer that its evaluator computes."""

    def watch(problem: Problem) -> list[int]:
        calls: list[int] = []
        advance = problem.evaluator.advance

        def counted(prefix: Prefix, *choice: Any, **options: Any) -> Prefix:
            calls.append(len(prefix.choices))
            return advance(prefix, *choice, **options)

        monkeypatch.setattr(problem.evaluator, "advance", counted)
        return calls

    return watch


def test_equal_prefixes_are_advanced_once(problem, count_advances):
    calls = count_advances(problem)
    env = LegalActions(make(problem, 6))
    env.reset(seed=0, options={"target": 4.0})
    for first in ([0, 0, 0, 1, 1, 2], *[[0] * 6] * (len(problem.network.layers) - 1)):
        *_, terminated, _, info = env.step(np.array(first))
    assert terminated.all()
    assert len(calls) == 3 * len(problem.network.layers)
    assert len(set(info["schedule"])) == 3
    assert info["_measurement"].all()
    assert (info["measurement"]["bytes"] <= problem.dense.bytes / 4.0).all()


def test_keep_ratios_that_leave_the_same_channels_are_computed_once(count_advances):
    ref = ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
    model, data = ref.build(), digits(16)
    network = build_network(model, ref.example(), round_to=8)
    fit, score = data.train.sample(32, 0), data.validation.sample(32, 0)
    estimates = estimate(model, network, fit.images(), keeps=KEEPS, bits=BITS)
    problem = make_bundle(model, ref, network, fit, score, estimates).problem()
    calls = count_advances(problem)
    env = make(problem, len(KEEPS), target=(1.5, 2.0))
    env.reset(options={"target": 1.5})
    first, same = np.arange(len(KEEPS)) * len(BITS), np.zeros(len(KEEPS), dtype=np.int64)
    for actions in (first, *[same] * (len(network.layers) - 1)):
        *_, info = env.step(actions)
    assert calls == list(range(len(network.layers)))  # the first 8 channels are all there are
    schedules = [Schedule.from_json(text) for text in info["schedule"]]
    assert [s.ratio(next(iter(network.groups))) for s in schedules] == list(KEEPS)
    for schedule, kl in zip(schedules, info["measurement"]["kl"], strict=True):
        assert problem.evaluator.evaluate(schedule).kl == pytest.approx(kl, abs=1e-6)


def test_a_step_after_the_end_begins_anew(problem):
    env = LegalActions(make(problem, 2))
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env.reset(seed=3)
    for _ in problem.network.layers:
        observation, _, terminated, truncated, info = env.step(np.zeros(2, dtype=np.int64))
        assert env.observation_space.contains(observation)
        assert not truncated.any()
    assert terminated.all()
    observation, reward, terminated, _, again = env.step(np.zeros(2, dtype=np.int64))
    assert not terminated.any()
    assert not reward.any()
    assert (again["target"] != info["target"]).all()
    assert (observation["state"][:, 9] == 0).all()  # depth


def test_targets_may_differ_between_episodes(problem):
    env = make(problem, 3)
    _, info = env.reset(options={"target": [3.5, 4.5, 8.0]})
    assert info["target"].tolist() == [3.5, 4.5, 8.0]
    with pytest.raises(ValueError, match="target: 2 values for 3 episodes"):
        env.reset(options={"target": [3.5, 4.5]})


def test_own_seeds_beat_repeated_resets_and_are_the_single_environments(problem):
    seeds = [[1, 2], [1, 3]]
    env = make(problem, 2, seed=seeds)
    drawn = np.array([env.reset(seed=7)[1]["target"] for _ in range(5)])
    for column, seed in zip(drawn.T, seeds, strict=True):
        single = gym.make(ID, problem=problem, target=(3.0, 9.0), seed=seed)
        assert [single.reset()[1]["target"] for _ in range(5)] == column.tolist()
    with pytest.raises(ValueError, match="seeds: 1 values for 2 episodes"):
        make(problem, 2, seed=[3])


def test_misuse_is_refused(problem):
    env = make(problem, 2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="lockstep"):
        env.reset(options={"reset_mask": np.array([True, False])})
    largest = 0.98 * problem.max_ratio()
    observation, _ = env.reset(options={"target": largest})
    illegal = np.flatnonzero(observation["mask"][1] == 0)[0]
    legal = np.flatnonzero(observation["mask"][0])[0]
    for action in (illegal, -1):
        with pytest.raises(ValueError, match="illegal"):
            env.step(np.array([legal, action]))
    with pytest.raises(UserError, match=r"target = \[4.0, 4000.0\]: two size ratios"):
        make(problem, 2, target=(4.0, 4000.0))
