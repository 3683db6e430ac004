"""The same seed, the same archive, wherever the env runners are; and a search that goes on with
another number of them."""

from __future__ import annotations

from itertools import islice

import pytest
import ray

from rlcompress.schema import PPOSpec
from rlcompress.searchers import Settings
from tests.toy import toy_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
ppo = pytest.importorskip("rlcompress.rl.ppo")

BUDGET = Settings(26, (4.0, 8.0), 0)


@pytest.fixture(scope="module")
def toy():
    """A Ray with room for two runners, whatever Ray other tests left."""
    from rlcompress.rl.cluster import start_ray

    ray.shutdown()
    start_ray(PPOSpec(num_env_runners=2))
    bundle = toy_bundle()
    yield bundle, bundle.problem()
    ray.shutdown()


def search(toy, folder, runners, history=(), budget=BUDGET):
    settings = PPOSpec(num_env_runners=runners, episodes_per_iteration=8, epochs=2)
    return ppo.search(*toy, budget, list(history), ppo=settings, folder=folder)


def test_the_same_archive_with_0_and_with_1_env_runner(toy, tmp_path):
    inside = [r.to_json() for r in search(toy, tmp_path / "0", 0)]
    remote = [r.to_json() for r in search(toy, tmp_path / "1", 1)]
    assert len(inside) == 26
    assert len(set(inside)) == 26
    assert inside == remote
    policies = [(tmp_path / n / "policy.safetensors").read_bytes() for n in ("0", "1")]
    assert policies[0] == policies[1]


def test_with_2_env_runners_the_same_measurements_for_the_same_schedules(toy, tmp_path):
    records = list(search(toy, tmp_path / "a", 2))
    evaluate = toy[1].evaluator.evaluate
    assert [r.measurement for r in records] == [evaluate(r.schedule) for r in records]
    again = list(search(toy, tmp_path / "b", 2))
    assert [r.to_json() for r in again] == [r.to_json() for r in records]


def test_a_search_goes_on_with_another_number_of_env_runners(toy, tmp_path):
    # 24 sizes of the untrained policy, 40 episodes of training, 16 sizes of the trained one.
    budget = Settings(80, (4.0, 8.0), 0)
    lines = list(islice(search(toy, tmp_path, 1, budget=budget), 33))
    before, kept = list(lines), (tmp_path / "policy.safetensors").read_bytes()
    for runners, more in ((2, 9), (0, 80)):
        lines += list(islice(search(toy, tmp_path, runners, lines, budget), more))
    assert lines[:33] == before
    assert [r.evaluation for r in lines] == list(range(1, 81))
    drawn = [r.target for r in lines[24:58]]
    assert len(set(drawn)) == len(drawn)  # no episode is played again
    assert (tmp_path / "policy.safetensors").read_bytes() != kept  # it learned on
