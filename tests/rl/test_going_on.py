"""A policy's training that is cut off goes on, and few episodes are played all the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rlcompress import spec
from rlcompress.core.files import read_archive, read_json, read_lines
from rlcompress.live import Stage
from rlcompress.schema import PPOSpec
from rlcompress.stages import Workspace
from rlcompress.stages.dense import train_dense
from rlcompress.stages.dynamic import compress_in_training

config = pytest.importorskip("rlcompress.rl.config")
zoo = pytest.importorskip("rlcompress.stages.zoo")

TOY = "{model: {factory: tests.toy:toy_network}, data: {factory: digits, args: {size: 16}}}"


class InterruptedRunError(Exception):
    pass


@pytest.fixture
def tiny(rlcompress):
    def workspace(*options: str) -> Workspace:
        file = spec.load_experiments("experiments.yaml")
        settings = ("ppo.episodes_per_iteration=2", "ppo.epochs=1", "ppo.hidden=8", *options)
        return Workspace("tiny", spec.resolve(file, "tiny", list(settings)), Path("runs/tiny"))

    return workspace


@pytest.fixture
def cut_off(monkeypatch):
    """Plays, and is interrupted as a stage shows that it has done so much."""

    def play(work, name: str, done: int) -> None:
        def update(shown: Stage, now: int, text: str) -> None:
            if shown.name == name and now == done:
                raise InterruptedRunError

        with monkeypatch.context() as patched:
            patched.setattr(Stage, "update", update)
            with pytest.raises(InterruptedRunError):
                work()

    return play


def test_iterations_have_no_more_environments_than_episodes():
    for runners, each, most in itertools.product(range(4), range(1, 4), range(1, 9)):
        ppo = PPOSpec(num_env_runners=runners, num_envs_per_env_runner=each)
        lanes = config.within(ppo, most)
        assert 1 <= config.episodes_of(lanes, most) <= most
        assert lanes.num_env_runners <= runners
        if most >= max(1, runners) * each:
            assert lanes == ppo


@pytest.mark.ray
def test_training_runs_are_played_once_wherever_it_is_cut_off(tiny, cut_off):
    run = tiny("dynamic.policy_episodes=7")
    train_dense(run)
    folder = run.folder / "dynamic"
    for stage, done, played in (("policy", 1, 1), ("policy", 4, 4), ("dynamic", 24, 6)):
        cut_off(lambda: compress_in_training(run), stage, done)
        records = read_archive(folder / "archive.jsonl")
        assert [r.evaluation for r in records] == list(range(1, played + 1))
    assert len({r.target for r in records}) == played
    policy = (folder / "policy" / "policy.safetensors").read_bytes()
    compress_in_training(run)
    assert len(read_archive(folder / "archive.jsonl")) == played
    assert (folder / "policy" / "policy.safetensors").read_bytes() == policy
    assert [row["evaluation"] for row in read_lines(folder / "curve.jsonl")] == [3, 6]
    assert read_json(folder / "policy" / "policy.json")["episodes"] == 6


@pytest.mark.ray
def test_one_training_run_is_played_by_one_environment(tiny):
    run = tiny("dynamic.policy_episodes=1", "ppo.num_envs_per_env_runner=2")
    train_dense(run)
    compress_in_training(run)
    assert read_json(run.folder / "dynamic" / "policy" / "policy.json")["episodes"] == 1
    assert len(read_archive(run.folder / "dynamic" / "archive.jsonl")) == 1


@pytest.mark.ray
def test_episodes_over_a_zoo_are_played_once_and_counted(tiny, cut_off):
    options = ("zoo.samples=8", "zoo.ppo_episodes=5", "zoo.target=[3, 8]")
    run = tiny(f"zoo.networks={{toy: {TOY}}}", *options)
    folder = run.folder / "policy"
    for stage, done, played in (("ppo", 2, 2), ("judge", 1, 4)):
        cut_off(lambda: zoo.train_policy(run, zoo.members(run)), stage, done)
        rows = read_lines(folder / "episodes.jsonl")
        assert [row["evaluation"] for row in rows] == list(range(1, played + 1))
    assert zoo.train_policy(run, zoo.members(run))["episodes"] == 4
    assert read_json(folder / "policy.json")["episodes"] == 4
    assert len(read_lines(folder / "episodes.jsonl")) == 4
