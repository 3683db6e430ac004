from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.observation import ACTION_COLUMNS, STATE_COLUMNS
from rlcompress.core.problem import Problem, make_bundle
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from tests.toy import toy_bundle

ID = "envs:rlcompress/Compression-v0"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return toy_bundle(epochs=2).problem()


def play(env: gym.Env, target: float, rng: np.random.Generator) -> tuple[float, dict]:
    """A random legal episode: its return and the last info."""
    observation, _ = env.reset(options={"target": target})
    total = 0.0
    while True:
        action = rng.choice(np.flatnonzero(observation["mask"]))
        observation, reward, done, _, info = env.step(action)
        assert env.observation_space.contains(observation)
        total += reward
        if done:
            return total, info


def test_gymnasiums_own_check(problem):
    check_env(gym.make(ID, problem=problem, target=(4.0, 8.0)).unwrapped, skip_render_check=True)


@settings(max_examples=25)
@given(target=st.floats(3.0, 9.0), seed=st.integers(0, 1000))
def test_any_legal_episode_meets_its_target(problem, target, seed):
    env = gym.make(ID, problem=problem, target=(3.0, 9.0))
    _, info = play(env, target, np.random.default_rng(seed))
    assert info["measurement"]["bytes"] <= problem.dense.bytes / target


def test_the_reported_measurement_is_the_evaluators(problem):
    env = gym.make(ID, problem=problem, target=(3.0, 9.0))
    _, info = play(env, 6.0, np.random.default_rng(1))
    again = problem.evaluator.evaluate(Schedule.from_json(info["schedule"]))
    assert again.to_dict() == pytest.approx(info["measurement"])


def test_shaping_leaves_returns_as_they_are(problem):
    plain = gym.make(ID, problem=problem, target=(3.0, 9.0), shaping=0.0)
    shaped = gym.make(ID, problem=problem, target=(3.0, 9.0), shaping=5.0)
    for seed in range(5):
        a, _ = play(plain, 5.0, np.random.default_rng(seed))
        b, _ = play(shaped, 5.0, np.random.default_rng(seed))
        assert a == pytest.approx(b)


def test_only_owners_decide_keep(problem):
    env = gym.make(ID, problem=problem, target=(3.0, 9.0)).unwrapped
    observation, _ = env.reset(options={"target": 3.0})
    for layer in env.observer.layers:
        legal = observation["mask"] > 0
        choices = set(env.observer.keep_A[legal])
        if problem.network.owned_group(layer.name) is None:
            assert choices == {env.observer.full_keep}
        observation, *_ = env.step(int(np.flatnonzero(legal)[0]))


def test_an_illegal_action_is_refused(problem):
    largest = 0.98 * problem.max_ratio()
    env = gym.make(ID, problem=problem, target=(largest, largest)).unwrapped
    observation, _ = env.reset()
    illegal = np.flatnonzero(observation["mask"] == 0)
    with pytest.raises(ValueError, match="illegal"):
        env.step(int(illegal[0]))


@pytest.mark.parametrize("factory", ["Reader", "Free"])
def test_networks_with_protected_and_untraceable_parts_can_be_played(factory):
    ref = ModelRef(f"tests.core.test_whole:{factory}", {}, 10, (1, 16, 16))
    model, data = ref.build(), digits(16)
    network = build_network(model, ref.example())
    fit, score = data.train.sample(64, 0), data.validation.sample(64, 0)
    estimates = estimate(model, network, fit.images())
    problem = make_bundle(model, ref, network, fit, score, estimates).problem()
    target = 0.9 * problem.max_ratio()
    env = gym.make(ID, problem=problem, target=(2.0, target))
    _, info = play(env, target, np.random.default_rng(0))
    assert info["measurement"]["bytes"] <= problem.dense.bytes / target


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"target": (4.0, 4000.0)}, r"target = \[4.0, 4000.0\]: .* from 1 to 1\d\.\d"),
        ({"target": (8.0, 4.0)}, "the smaller first"),
        ({"target": (0.5, 4.0)}, "from 1 to"),
        ({"target": (float("nan"), 4.0)}, "from 1 to"),
        ({"target": (4.0,)}, "two size ratios"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"gamma": 1.5, "explore": -1.0}, "gamma = 1.5: from 0 to 1\nexplore = -1.0: 0 or more"),
    ],
)
def test_rules_out_of_range_are_told(problem, rules, said):
    with pytest.raises(UserError, match=said):
        gym.make(ID, problem=problem, **{"target": (4.0, 8.0), **rules})


@pytest.mark.parametrize("target", [1000.0, 0.5, -1.0, float("nan")])
def test_a_target_that_no_schedule_has_is_refused(problem, target):
    env = gym.make(ID, problem=problem, target=(4.0, 8.0))
    with pytest.raises(UserError, match=r"size ratios are from 1 to 1\d\.\d here"):
        env.reset(options={"target": target})


def test_a_step_outside_an_episode_is_refused(problem):
    env = gym.make(ID, problem=problem, target=(4.0, 8.0)).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.int64(0))
    play(env, 5.0, np.random.default_rng(0))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.int64(0))
    env.reset()
    with pytest.raises(ValueError, match="action 9 is illegal"):
        env.step(np.int64(9))


def test_the_observation_has_its_documented_columns(problem):
    env = gym.make(ID, problem=problem, target=(4.0, 8.0))
    observation, _ = env.reset(seed=0)
    assert observation["actions"].shape == (9, len(ACTION_COLUMNS))
    assert observation["state"].shape == (len(STATE_COLUMNS),)
    legal = observation["mask"] > 0
    prior = observation["actions"][legal, ACTION_COLUMNS.index("prior")]
    assert prior.max() == 0.0


def test_own_seed_beats_repeated_resets(problem):
    env = gym.make(ID, problem=problem, target=(3.0, 9.0), seed=[1, 2])
    goals = {env.reset(seed=7)[1]["target"] for _ in range(20)}
    assert len(goals) == 20
    plain = gym.make(ID, problem=problem, target=(3.0, 9.0))
    assert plain.reset(seed=7)[1]["target"] == plain.reset(seed=7)[1]["target"]
