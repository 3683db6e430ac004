from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlcompress.core.errors import UserError
from rlcompress.core.problem import Member, Problem
from rlcompress.core.schedule import Schedule
from tests.toy import BITS, KEEPS, toy_bundle

ID = "envs:rlcompress/Zoo-v0"
MEMBERS = (
    Member("small", (3.0, 6.0)),
    Member("other", (4.0, 9.0), ratios=(4.0, 9.0), qualities=(2.0, 1.0)),
)


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {
        "small": toy_bundle(epochs=1).problem(),
        "other": toy_bundle(epochs=1, seed=1).problem(),
    }


@pytest.fixture
def env(problems):
    ready = {name: (lambda problem=problem: problem) for name, problem in problems.items()}
    return gym.make(ID, members=MEMBERS, problems=ready, actions=len(KEEPS) * len(BITS))


def play(env: gym.Env, **how) -> tuple[float, dict]:
    observation, begun = env.reset(**how)
    total, done, info = 0.0, False, {}
    while not done:
        row = np.where(observation["mask"] > 0, observation["actions"][:, -1], -np.inf)
        observation, reward, done, _, info = env.step(np.int64(row.argmax()))
        total += reward
    return total, {**begun, **info}


def test_gymnasiums_own_check(env):
    check_env(env.unwrapped, skip_render_check=True)


def test_resets_draw_networks_and_targets_within_their_ranges(env):
    env.reset(seed=0)
    drawn = [env.reset()[1] for _ in range(40)]
    ranges = {member.name: member.target for member in MEMBERS}
    assert {info["network"] for info in drawn} == set(ranges)
    for info in drawn:
        low, high = ranges[info["network"]]
        assert low <= info["target"] <= high
    env.unwrapped.own_stream([7])
    first = [env.reset(seed=i)[1] for i in range(5)]
    env.unwrapped.own_stream([7])
    assert [env.reset(seed=99)[1] for _ in range(5)] == first


@pytest.mark.parametrize("network", ["small", "other"])
def test_an_episode_is_the_networks_own(env, problems, network):
    total, info = play(env, options={"network": network, "target": 5.0})
    problem = problems[network]
    assert info["network"] == network
    measured = problem.evaluator.evaluate(Schedule.from_json(info["schedule"]))
    assert measured.to_dict() == pytest.approx(info["measurement"])
    assert measured.bytes <= problem.dense.bytes / 5.0
    # The return is the quality less what the member expects.
    expected = {"small": 0.0, "other": 2.0 - np.log(5 / 4) / np.log(9 / 4)}[network]
    quality = env.unwrapped.episodes.quality(measured)
    assert total == pytest.approx(quality - expected, rel=1e-4)


def test_a_network_that_is_not_in_the_zoo_is_told(env):
    with pytest.raises(UserError, match=r"network = 'smal': allowed: small, other; did you mean"):
        env.reset(options={"network": "smal"})


def test_a_step_before_a_reset_and_behind_the_end_is_told(env):
    with pytest.raises(gym.error.ResetNeeded, match="call reset before step"):
        env.unwrapped.step(np.int64(0))
    play(env)
    with pytest.raises(gym.error.ResetNeeded):
        env.unwrapped.step(np.int64(0))
