"""`rlcompress tune`: trials of PPO on real Ray Tune, one front, a child run each."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from rlcompress.core.files import read_lines
from rlcompress.core.schedule import Record
from rlcompress.spec import SpecError, load_experiments, resolve
from tests.shell import rlcompress

TINY = {
    "model": {"factory": "tests.toy:toy_network"},
    "data": {"factory": "digits", "args": {"size": 16}},
    "dense": {"epochs": 3, "batch_size": 32, "lr": 0.1},
    "calibration": {"fit_images": 64, "score_images": 64, "estimate_images": 32},
    "search": {"searcher": "ppo", "target": [4, 8], "keeps": [1.0, 0.6, 0.3], "bits": [2, 4, 8]},
    "ppo": {"num_env_runners": 0, "episodes_per_iteration": 4, "epochs": 1, "hidden": 8},
    "tune": {
        "trials": 1,
        "trial_episodes": 12,
        "space": {"ppo.kl_weight": {"grid": [0.5, 2.0]}, "ppo.lr": {"loguniform": [1e-4, 1e-2]}},
    },
}


def write(folder: Path, **changes) -> Path:
    path = folder / "experiments.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"tiny": {**TINY, **changes}}}))
    return path


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return rlcompress(folder, *words, timeout=500)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_differ_merge_and_go_on(tmp_path):
    write(tmp_path)
    done = command(tmp_path, "tune", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "tiny" / "tune"
    lines = read_lines(folder / "archive.jsonl")
    trials = {json.dumps(line["options"], sort_keys=True) for line in lines}
    assert len(trials) == 2
    assert {line["options"]["ppo.kl_weight"] for line in lines} == {0.5, 2.0}
    for trial in trials:
        mine = [x for x in lines if json.dumps(x["options"], sort_keys=True) == trial]
        records = [Record.from_json(json.dumps(x["record"])) for x in mine]
        assert [r.evaluation for r in records] == list(range(1, 13))
    assert "ppo.kl_weight" in done.stdout
    assert "--set ppo.kl_weight=" in done.stdout
    assert "Configuration for experiment" not in done.stdout

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/tiny/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'rlcompress-tiny'")
    runs = client.search_runs([experiment.experiment_id], "tags.`rlcompress.role` = 'trial'")
    assert {float(r.data.params["ppo.kl_weight"]) for r in runs} == {0.5, 2.0}
    assert all(r.data.metrics["hypervolume"] > 0 for r in runs)

    # As if the driver had been killed between its last report and the end.
    (folder / "trials.json").unlink()
    kept = lines[:-3]
    text = (folder / "archive.jsonl").read_text().splitlines()
    (folder / "archive.jsonl").write_text("\n".join(text[: len(kept)]) + "\n")
    again = command(tmp_path, "tune", "tiny")
    assert again.returncode == 0, again.stdout + again.stderr
    after = read_lines(folder / "archive.jsonl")
    assert after[: len(kept)] == kept
    keys = [(json.dumps(x["options"], sort_keys=True), x["record"]["evaluation"]) for x in after]
    assert len(set(keys)) == len(keys) == 24


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"ppo.kl_wait": {"choice": [1.0]}}, 'did you mean "ppo.kl_weight"?'),
        ({"ppo.num_env_runners": {"choice": [1]}}, "no option that trials may differ in"),
        ({"ppo.lr": {"choice": [-1.0]}}, "ppo.lr = -1.0"),
        ({"ppo.lr": {"loguniform": [0.0, 1.0]}}, "low below high"),
        ({"ppo.lr": {}}, "exactly one of"),
        ({"ppo.lr": {"grid": [0.1], "choice": [0.1]}}, "exactly one of"),
        ({"search.target": {"grid": [[8, 2]]}}, "search.target"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_at_once(tmp_path, space, says):
    file = load_experiments(write(tmp_path, tune={"space": space}))
    with pytest.raises(SpecError) as caught:
        resolve(file, "tiny")
    assert says in str(caught.value)


def test_no_space_is_one_line(tmp_path):
    write(tmp_path, tune={})
    done = command(tmp_path, "tune", "tiny")
    assert done.returncode == 2
    assert "tune.space is empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
