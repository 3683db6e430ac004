"""The policy of trained networks goes on in networks that train: real Ray, the toy network."""

from __future__ import annotations

from dataclasses import asdict, replace

import gymnasium as gym
import pytest
import torch

from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.policy import Agent, load_policy
from rlcompress.core.squeeze import Pace
from rlcompress.core.training import Training
from rlcompress.schema import PPOSpec
from rlcompress.searchers import Settings
from tests.toy import toy_training

pytestmark = pytest.mark.ray
dynamic = pytest.importorskip("rlcompress.rl.dynamic")
ppo = pytest.importorskip("rlcompress.rl.ppo")


@pytest.fixture(scope="module")
def training() -> Training:
    return toy_training(Pace(warmup=9, recovery_steps=1, rounds=2, watch=4), final_steps=4)


def test_a_policy_of_compression_v0_goes_on_in_the_dynamic_environment(
    bundle, problem, training, tmp_path
):
    settings = PPOSpec(num_env_runners=1, episodes_per_iteration=4, epochs=2, hidden=8)
    first, second = tmp_path / "static", tmp_path / "dynamic"
    list(ppo.search(bundle, problem, Settings(16, (4.0, 8.0), 0), [], ppo=settings, folder=first))
    rows: list[dict] = []
    records = list(
        dynamic.train(
            replace(training, agent=Agent.load(first, OBSERVATION_VERSION)).prepared(),
            settings,
            target=(4.0, 8.0),
            episodes=8,
            seed=0,
            folder=second,
            on_iteration=rows.append,
        )
    )
    assert [r.evaluation for r in records] == list(range(1, 9))
    assert len({r.target for r in records}) == 8
    env = gym.make(dynamic.DYNAMIC_ENVIRONMENT, training=training, target=(4.0, 8.0)).unwrapped
    dense = env.trainer.dense
    assert all(dense.bytes / r.measurement.bytes >= r.target for r in records)
    assert [row["evaluation"] for row in rows] == [4, 8]
    before, _ = load_policy(first, OBSERVATION_VERSION)
    after, about = load_policy(second, OBSERVATION_VERSION)
    assert asdict(before.shape) == asdict(after.shape)
    assert about["episodes"] == 8
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    ]
    assert all(moved[:2])


def test_an_rllib_checkpoint_carries_over(bundle, problem, training, tmp_path):
    """Between algorithms of the two environments, by RLlib's own means."""
    settings = PPOSpec(num_env_runners=0, episodes_per_iteration=2, epochs=1, hidden=8)

    def algorithm(environment, env_config, steps):
        return ppo.config(
            settings,
            ppo.policy_shape(env, 8),
            None,
            environment=environment,
            env_config={"seed": [0], **env_config},
            spaces=env,
            steps=steps,
            episodes=2,
            seed=0,
        ).build_algo()

    env = gym.make(ppo.ENVIRONMENT, problem=problem, target=(4.0, 8.0))
    ppo.start_ray(settings)
    ppo.register_env(ppo.REGISTERED, ppo.make)
    ppo.register_env(dynamic.REGISTERED, dynamic.make)
    options = {"target": (4.0, 8.0)}
    context = {"bundle": ppo.share(bundle), "losses": problem.prior.losses, "options": options}
    static = algorithm(ppo.REGISTERED, context, len(problem.network.layers))
    static.train()
    static.save_to_path(tmp_path / "checkpoint")
    shape = ppo.policy_shape(env, 8)
    learned = ppo.trained(static, shape)
    static.stop()
    context = {"training": dynamic.ray.put(training), "options": options}
    other = algorithm(dynamic.REGISTERED, context, 2 * len(training.network.layers))
    other.restore_from_path(tmp_path / "checkpoint")
    carried = ppo.trained(other, shape)
    for a, b in zip(learned.parameters(), carried.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.train()["env_runners"]["num_episodes"] == 2
    other.stop()
