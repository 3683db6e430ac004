"""`train-policy`, `transfer` and `compress`, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from rlcompress.cli.compress import _name
from rlcompress.core.files import read_archive
from rlcompress.rl.transfer import SIZES
from rlcompress.schema import NAME
from tests.shell import rlcompress

DATA = {"factory": "digits", "args": {"size": 16}}
TINY = {
    "model": {"factory": "tests.toy:toy_network"},
    "data": DATA,
    "dense": {"epochs": 3, "batch_size": 32, "lr": 0.1},
    "calibration": {
        "fit_images": 64,
        "score_images": 64,
        "final_images": 0,
        "positions": 128,
        "estimate_images": 32,
    },
    "search": {
        "searcher": "random",
        "baselines": [],
        "episodes": 4,
        "target": [4, 8],
        "keeps": [1.0, 0.6, 0.3],
        "bits": [2, 4, 8],
    },
    "ppo": {"num_env_runners": 0, "episodes_per_iteration": 4, "epochs": 1, "hidden": 8},
    "ticket": {"epochs": 1, "batch_size": 32, "floor": 50.0, "fit_images": 64},
    "zoo": {
        "target": [3, 10],
        "samples": 10,
        "networks": {
            "small": {"model": {"factory": "cnn", "args": {"width": 0.2}}, "data": DATA},
            "other": {"model": {"factory": "cnn", "args": {"width": 0.3}}, "data": DATA},
        },
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    content = {"experiments": {"tiny": TINY, "empty": {**TINY, "zoo": {}}}}
    (folder / "experiments.yaml").write_text(yaml.safe_dump(content))
    done = rlcompress(folder, "train-policy", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learned on 2 networks, 20 evaluations" in done.stdout
    assert "version 1 of rlcompress-policy" in done.stdout
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_policy_says_where_it_comes_from_and_is_not_trained_again(trained):
    policy = trained / "runs" / "tiny" / "policy"
    assert {path.name for path in policy.iterdir()} >= {"policy.json", "losses.safetensors"}
    about = json.loads((policy / "policy.json").read_text())
    assert sorted(about["networks"]) == ["other", "small"]
    assert about["command"] == "rlcompress train-policy tiny"
    assert set(about["agreement"]) == {"small", "other"}
    assert about["judged"][0]["target"] == pytest.approx(4.0)
    before = {path.name: path.stat().st_mtime_ns for path in policy.iterdir()}
    for name in ("small", "other"):
        archive = trained / "runs" / "tiny" / "zoo" / name / "samples" / "archive.jsonl"
        assert len(read_archive(archive)) == 10
    done = rlcompress(trained, "train-policy", "tiny")
    assert done.returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in policy.iterdir()} == before


def test_a_policy_that_was_set_aside_comes_back(folder):
    policy = folder / "runs" / "tiny" / "policy"
    before = {path.name: path.stat().st_ino for path in policy.iterdir()}
    for option, kept in (("ppo.kl_weight=2.0", False), ("ppo.kl_weight=1.0", True)):
        done = rlcompress(folder, "train-policy", "tiny", "--set", option)
        assert done.returncode == 0, done.stdout + done.stderr
        now = {path.name: path.stat().st_ino for path in policy.iterdir()}
        assert (now == before) is kept


def test_an_empty_zoo_is_one_line(trained):
    done = rlcompress(trained, "train-policy", "empty")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("empty: zoo.networks is empty")


def test_transfer_plays_the_policy_and_goes_on(folder):
    words = ("transfer", "tiny", "--policy", "runs/tiny", "--out", "runs/there")
    done = rlcompress(folder, *words, "--evaluations", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times fewer" in done.stdout
    archive = folder / "runs" / "there" / "search" / "archive.jsonl"
    few = archive.read_text()
    assert len(few.splitlines()) == 6
    more = SIZES + 4
    assert rlcompress(folder, *words, "--evaluations", str(more)).returncode == 0
    assert archive.read_text().startswith(few)
    records = read_archive(archive)
    assert [r.evaluation for r in records] == list(range(1, more + 1))


@pytest.mark.parametrize("alias", ["champion", "1"])
def test_a_registered_policy_is_fetched_by_its_alias(folder, alias):
    database = f"sqlite:///{folder / 'runs' / 'tiny' / 'mlflow.db'}"
    words = ("transfer", "tiny", "--policy", f"rlcompress-policy@{alias}", "--evaluations", "2")
    done = rlcompress(folder, *words, "--set", f"tracking.uri={database}", "--out", "runs/there")
    assert done.returncode == 0, done.stdout + done.stderr
    archive = folder / "runs" / "there" / "search" / "archive.jsonl"
    assert [r.searcher for r in read_archive(archive)] == ["transfer"] * 2


def test_another_policy_sets_aside_its_own_records_alone(folder):
    where = ("--out", "runs/there")
    assert rlcompress(folder, "search", "tiny", *where).returncode == 0
    archive = folder / "runs" / "there" / "search" / "archive.jsonl"
    theirs = archive.read_text()
    words = ("transfer", "tiny", *where, "--evaluations", "3")
    assert rlcompress(folder, *words, "--policy", "runs/tiny").returncode == 0
    # Another policy: one of other losses.
    other = folder / "other"
    shutil.copytree(folder / "runs" / "tiny" / "policy", other)
    (other / "losses.safetensors").unlink()
    done = rlcompress(folder, *words, "--policy", "other")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was made from other options" in done.stdout
    assert archive.read_text().startswith(theirs)
    assert [r.searcher for r in read_archive(archive)].count("transfer") == 3


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("nowhere", "search.policy = nowhere: no policy.json in nowhere"),
        ("rlcompress-policy@champion", "a registered policy needs MLflow"),
        ("none", "transfer plays one"),
    ],
)
def test_a_policy_that_is_not_there_is_one_line(folder, policy, said):
    done = rlcompress(folder, "transfer", "tiny", "--policy", policy, "--out", "runs/new")
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not (folder / "runs" / "new" / "search").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ppo_goes_on_over_the_zoo_alike_with_any_number_of_runners(tmp_path):
    zoo = {**TINY["zoo"], "ppo_episodes": 8, "held": 1}
    runs = {
        f"with{n}": {**TINY, "zoo": zoo, "ppo": {**TINY["ppo"], "num_env_runners": n}}
        for n in (0, 1)
    }
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"experiments": runs}))
    found = []
    for name in runs:
        done = rlcompress(tmp_path, "train-policy", name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "8 episodes of PPO" in done.stdout
        policy = tmp_path / "runs" / name / "policy"
        found.append((policy / "episodes.jsonl").read_text())
        assert (policy / "policy.safetensors").exists()
    assert found[0] == found[1]
    rows = [json.loads(line) for line in found[0].splitlines()]
    assert [row["evaluation"] for row in rows] == list(range(1, 9))
    assert {row["network"] for row in rows} == {"small", "other"}
    assert all(3 <= row["target"] <= 10 for row in rows)
    # A policy that PPO trained plays its own actions.
    words = ("transfer", "with0", "--policy", "runs/with0", "--evaluations", "2")
    assert rlcompress(tmp_path, *words, "--out", "runs/there").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compress_is_the_whole_job_and_other_verbs_go_on_from_it(tmp_path):
    sets = {
        "data.args.size": 16,
        "dense.epochs": 3,
        "dense.batch_size": 32,
        "calibration.fit_images": 64,
        "calibration.score_images": 64,
        "ppo.num_env_runners": 0,
        "ticket.epochs": 1,
        "ticket.fit_images": 64,
        "export.latency": [],
    }
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    model = ("--model", "tests.toy:toy_network", "--data", "digits", "--evaluations", "3")
    done = rlcompress(tmp_path, "compress", *model, "--target", "5x", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "toy-toy_network-digits-5x"
    (ticket,) = (json.loads(p.read_text()) for p in run.glob("tickets/*/ticket.json"))
    assert ticket["ratio"] >= 5.0
    assert ticket["searcher"] == "transfer"
    again = ("report", run.name, "--file", str(run / "experiments.yaml"), "--out", str(run))
    assert rlcompress(tmp_path, *again).returncode == 0


@pytest.mark.parametrize("model", ["_nets:build", "a.b._c:d", "nétz:build", "-"])
def test_compress_makes_a_name_that_an_experiments_file_may_have(model):
    assert re.fullmatch(NAME, _name(model, "digits", "5x"))


def test_compress_tells_all_mistakes_at_once_and_writes_nothing(tmp_path):
    words = ("--model", "vgg91", "--data", "digit")
    done = rlcompress(tmp_path, "compress", *words, "--target", "20")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert 'did you mean "vgg19"?' in first
    assert 'did you mean "digits"?' in second
    done = rlcompress(tmp_path, "compress", *words, "--target", "0.5x")
    assert done.stderr.startswith("--target 0.5x: times fewer bytes; allowed: a number above 1")
    assert list(tmp_path.iterdir()) == []
