"""Real Ray, no mock: learnability on a problem whose optimum is known, and the plumbing."""

from __future__ import annotations

import gymnasium as gym
import pytest

from rlcompress.core.errors import UserError
from rlcompress.core.files import save_json
from rlcompress.core.policy import Policy, PolicyShape, load_policy
from rlcompress.core.schedule import Measurement
from rlcompress.schema import PPOSpec
from rlcompress.searchers import Settings
from rlcompress.searchers.base import targets
from tests.toy import enumerate_schedules

pytestmark = pytest.mark.ray
ppo = pytest.importorskip("rlcompress.rl.ppo")

TARGET = 6.0


@pytest.mark.slow
def test_finds_the_optimum_that_enumeration_knows(bundle, problem, tmp_path):
    """All 2,187 schedules are measured; the trained policy must come within 1 % of the best."""
    settings = PPOSpec(
        num_env_runners=0, episodes_per_iteration=64, lr=3e-3, epochs=8, entropy=0.01, temperature=3
    )
    options = ppo.environment_options(settings)
    env = gym.make(ppo.ENVIRONMENT, problem=problem, target=(TARGET, TARGET), **options)
    quality = env.unwrapped.quality
    limit = problem.dense.bytes / TARGET
    best = max(quality(m) for _, m in enumerate_schedules(problem) if m.bytes <= limit)
    records = list(
        ppo.search(
            bundle, problem, Settings(1600, (TARGET, TARGET), 0), [], ppo=settings, folder=tmp_path
        )
    )
    policy, about = load_policy(tmp_path, env.unwrapped.observation_version)
    info = ppo.greedy(policy, env, TARGET)
    trained = quality(Measurement.from_dict(info["measurement"]))
    untrained = quality(records[0].measurement)
    assert trained >= best - 0.01 * abs(best)
    assert trained > untrained
    assert 1500 < about["episodes"] < len(records) <= 1600
    assert [r.evaluation for r in records] == list(range(1, len(records) + 1))


def test_workers_measure_what_the_driver_measures_and_the_search_goes_on(bundle, problem, tmp_path):
    settings = PPOSpec(num_env_runners=1, episodes_per_iteration=8, epochs=1)
    budget = Settings(43, (4.0, 8.0), 0)  # not a whole number of iterations
    rows: list[dict] = []
    records = []
    for record in ppo.search(
        bundle, problem, budget, [], ppo=settings, folder=tmp_path, on_iteration=rows.append
    ):
        records.append(record)
        if len(rows) == 2:
            break
    # 17 sizes of the untrained policy, iterations of 8, 10 sizes of the trained one.
    assert [row["evaluation"] for row in rows] == [25, 33]  # all that was played is here
    first = records[:25]
    rest = list(ppo.search(bundle, problem, budget, first, ppo=settings, folder=tmp_path))
    whole = [*first, *rest]
    assert [r.evaluation for r in whole] == list(range(1, 44))
    drawn = [r.target for r in whole[17:33]]
    assert len(set(drawn)) == 16  # no goal is drawn twice, nor on resuming
    assert [r.target for r in whole[33:]] == targets(budget, 10)
    # The last sizes go on where they were.
    again = list(ppo.search(bundle, problem, budget, whole[:37], ppo=settings, folder=tmp_path))
    assert [r.target for r in again] == targets(budget, 10)[4:]
    for record in whole[::5]:
        again = problem.evaluator.evaluate(record.schedule)
        assert again.bytes == record.measurement.bytes
        assert again.kl == pytest.approx(record.measurement.kl, rel=1e-3, abs=1e-5)
    assert {"evaluation", "mean_return", "entropy"} <= set(rows[0])


def test_a_runner_plays_episodes_in_lockstep(bundle, problem, tmp_path):
    settings = PPOSpec(
        num_env_runners=0, num_envs_per_env_runner=3, episodes_per_iteration=6, epochs=1
    )
    budget = Settings(24, (4.0, 8.0), 0)
    records = list(ppo.search(bundle, problem, budget, [], ppo=settings, folder=tmp_path))
    assert [r.evaluation for r in records] == list(range(1, 25))
    assert len({r.target for r in records[10:16]}) == 6  # each episode draws its own
    for record in records:
        again = problem.evaluator.evaluate(record.schedule)
        assert again.kl == pytest.approx(record.measurement.kl, rel=1e-3, abs=1e-5)
        assert record.measurement.bytes <= problem.dense.bytes / record.target


def test_more_environments_than_episodes_still_train(bundle, problem, tmp_path):
    settings = PPOSpec(num_env_runners=0, num_envs_per_env_runner=64, epochs=1)
    budget, rows = Settings(24, (4.0, 8.0), 0), list[dict]()
    records = list(
        ppo.search(
            bundle,
            problem,
            budget,
            [],
            ppo=settings,
            folder=tmp_path,
            on_iteration=rows.append,
        )
    )
    assert [r.evaluation for r in records] == list(range(1, 25))
    assert rows
    assert load_policy(tmp_path, 2)[1]["episodes"] > 0
    # As many as there are, or more: nothing is left.
    assert not list(ppo.search(bundle, problem, budget, records, ppo=settings, folder=tmp_path))


def test_a_large_seed(bundle, problem, tmp_path):
    settings = PPOSpec(num_env_runners=0, episodes_per_iteration=4, epochs=1)
    budget = Settings(12, (4.0, 8.0), 2**32 - 1)
    records = list(ppo.search(bundle, problem, budget, [], ppo=settings, folder=tmp_path))
    assert [r.evaluation for r in records] == list(range(1, 13))


def test_a_ray_of_ours_that_is_too_small_is_told():
    from rlcompress.rl import cluster

    cluster.start_ray(PPOSpec())
    cluster.require_room(PPOSpec(num_env_runners=1))
    with pytest.raises(UserError, match=r"this process started Ray with \d+ CPUs; ray.shutdown"):
        cluster.require_room(PPOSpec(num_env_runners=999))


def test_the_pool_tells_a_workers_mistake(bundle, problem):
    from rlcompress.rl import cluster, pool

    def mistaken(bundle: list) -> dict:
        raise UserError("no such module")

    cluster.start_ray(PPOSpec())
    with pytest.raises(UserError, match=r"^no such module$"):
        list(pool.Pool(bundle, workers=1)._map(mistaken, [()]))


def test_the_pool_keeps_the_order(bundle, problem):
    from rlcompress.rl import cluster, pool

    cluster.start_ray(PPOSpec())
    schedules = [problem.network.uniform(k, b) for k in problem.keeps for b in problem.bits]
    measured = list(pool.Pool(bundle, workers=2).measure(schedules))
    expected = [problem.evaluator.evaluate(s) for s in schedules]
    assert [m.bytes for m in measured] == [m.bytes for m in expected]
    assert [m.kl for m in measured] == pytest.approx([m.kl for m in expected], rel=1e-3, abs=1e-5)


def test_an_untrained_policy_is_the_prior(problem):
    env = gym.make(ppo.ENVIRONMENT, problem=problem, target=(TARGET, TARGET))
    policy = Policy(PolicyShape(10, 31, 16, env.unwrapped.observation_version))
    observation, _ = env.reset()
    best = (observation["actions"][:, -1] - 1e9 * (observation["mask"] == 0)).argmax()
    assert policy.best_action(observation) == best


def test_a_policy_of_another_observation_version_is_refused(tmp_path):
    from rlcompress.core.errors import UserError
    from rlcompress.core.policy import save_policy

    save_policy(tmp_path, Policy(PolicyShape(10, 31, 16, 99)), {})
    with pytest.raises(UserError, match="observation version 99"):
        load_policy(tmp_path, 1)
    save_json(tmp_path / "policy.json", {"shape": {}})
    with pytest.raises(UserError, match="no intact policy"):
        load_policy(tmp_path, 1)
