"""The environment of networks in training."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from rlcompress.core.errors import UserError
from rlcompress.core.observation import STATE_COLUMNS
from rlcompress.core.schedule import Measurement, Schedule
from rlcompress.core.squeeze import Pace
from rlcompress.core.training import Images, Trainer, Training
from tests.toy import toy_training

ID = "envs:rlcompress/DynamicCompression-v0"


@pytest.fixture(scope="module")
def training() -> Training:
    return toy_training(Pace(warmup=9, recovery_steps=2, rounds=2, watch=4))


@pytest.fixture
def env(training):
    return gym.make(ID, training=training, target=(4.0, 12.0))


def prior(observation) -> int:
    legal = observation["mask"] > 0
    return int(np.where(legal, observation["actions"][:, -1], -np.inf).argmax())


def play(env, seed: int, **options):
    observation, _ = env.reset(seed=seed, options=options)
    rewards, seen = [], [observation]
    while True:
        observation, reward, done, _, info = env.step(prior(observation))
        rewards.append(reward)
        seen.append(observation)
        if done:
            return rewards, seen, info


@pytest.mark.filterwarnings("ignore")
def test_it_is_a_gymnasium_environment(training):
    check_env(gym.make(ID, training=training, target=(4.0, 12.0)).unwrapped, skip_render_check=True)


def test_an_episode_is_a_training_run_that_meets_its_target(env, training):
    rewards, seen, info = play(env, 0, target=9.0)
    assert len(rewards) == 2 * len(training.network.layers)
    assert env.unwrapped.trainer.step == training.steps
    measurement = Measurement.from_dict(info["measurement"])
    dense = env.unwrapped.trainer.dense
    assert dense.bytes / measurement.bytes >= 9.0
    assert info["target"] == 9.0
    schedule = Schedule.from_json(info["schedule"])
    assert measurement.bytes == env.unwrapped.trainer.compressor.costs.cost(schedule).bytes
    assert sum(rewards) == pytest.approx(env.unwrapped.quality(measurement))
    assert all(env.observation_space.contains(o) for o in seen)
    rounds = {float(o["state"][STATE_COLUMNS.index("round")]) for o in seen}
    assert rounds == {0.0, 0.5}


def test_the_same_seed_plays_the_same_episode_after_any_other(env):
    first = play(env, 3)
    play(env, 4, target=11.0)
    again = play(env, 3)
    assert first[0] == again[0]
    assert first[2] == again[2]


def test_what_dropout_drops_is_the_episodes_own(training):
    """Not a matter of what else in the process draws random numbers."""
    ref = replace(training.ref, args={"dropout": 0.5})
    trainer = Trainer(replace(training, ref=ref))

    def losses(seed: int) -> list[float]:
        trainer.begin(4.0, seed)
        return [trainer.minibatch() for _ in range(4)]

    before = torch.get_rng_state()
    first = losses(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert losses(3) == first
    assert losses(4) != first
    assert len(set(first)) == 4


def test_the_networks_that_branch_share_their_beginning(env):
    a, _ = env.reset(seed=1, options={"target": 6.0})
    b, _ = env.reset(seed=2, options={"target": 6.0})
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_an_illegal_action_is_refused(env):
    observation, _ = env.reset(seed=0, options={"target": 11.0})
    illegal = np.flatnonzero(observation["mask"] == 0)
    while not len(illegal):
        observation, *_ = env.step(prior(observation))
        illegal = np.flatnonzero(observation["mask"] == 0)
    with pytest.raises(ValueError, match="is illegal here"):
        env.step(illegal[0])
    with pytest.raises(ValueError, match="is illegal here"):
        env.unwrapped.step(np.int64(len(observation["mask"])))
    with pytest.raises(UserError, match=r"target = \[4.0, 999.0\]: .* from 1 to"):
        gym.make(ID, training=env.unwrapped.trainer, target=(4.0, 999.0))
    with pytest.raises(UserError, match=r"target = \[999.0\]: size ratios are from 1 to"):
        env.reset(options={"target": 999.0})


def test_data_may_change_midway(training):
    black = Images(np.zeros_like(training.train.raw_NCHW), training.train.labels_N, 0.0, 1.0)
    drifting = Trainer(replace(training, later=black, drift_at=0.5))
    while drifting.step < 0.5 * training.steps:
        before = drifting.minibatch()
    # What tells the classes apart is gone.
    assert drifting.minibatch() > before + 1.0


def test_read_only_arrays_are_used_in_place(training):
    raw = training.train.raw_NCHW.copy()
    raw.setflags(write=False)
    split = Images(raw, training.train.labels_N, 1.0, 2.0).split()
    assert split.raw_NCHW.data_ptr() == raw.ctypes.data
    assert torch.equal(
        split.images(slice(0, 2)), (torch.from_numpy(raw[:2].copy()).float() - 1) / 2
    )
