"""`rlcompress dynamic`: from an experiment to a ticket in one training run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rlcompress.core.artifact import load_artifact
from rlcompress.core.data import digits
from rlcompress.core.train import top1
from tests.shell import rlcompress

EXPERIMENTS = """
experiments:
  tiny:
    model: {factory: tests.toy:toy_network}
    data: {factory: digits, args: {size: 16}}
    dense: {epochs: 4, batch_size: 32, lr: 0.1}
    calibration: {fit_images: 64, score_images: 64, estimate_images: 32}
    search: {searcher: knapsack, target: [4, 8], keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
    ppo: {num_env_runners: 0, episodes_per_iteration: 2, epochs: 1, hidden: 8}
    dynamic: {target: 8, warmup: 21, watch: 10, recovery_steps: 3, final_steps: 60, batch_size: 32}
"""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "experiments.yaml").write_text(EXPERIMENTS)
    return rlcompress(folder, *words, timeout=200)


def test_one_training_run_leaves_a_ticket_and_is_not_repeated(tmp_path):
    done = command(tmp_path, "dynamic", "tiny")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny" / "dynamic"
    ticket = json.loads((folder / "ticket.json").read_text())
    weights = folder / "weights.safetensors"
    assert weights.stat().st_size == ticket["ticket"]["bytes"]
    assert ticket["dense"]["bytes"] / ticket["ticket"]["bytes"] == ticket["ratio"] >= 8
    assert len(ticket["decisions"]) == 2 * 4
    at_floor = ticket["validation"]["closed-loop"] >= ticket["validation"]["dense"] - 0.01
    assert ticket["at_floor"] is at_floor
    assert ("raise dynamic.final_steps or ticket.floor" in done.stdout) is not at_floor
    assert ticket["steps"] == 21 + 2 * 4 * 3 + 60
    model = load_artifact(weights, trust=["tests.toy:toy_network"])
    assert top1(model, digits(16).test) == ticket["ticket"]["accuracy"] > 0.8
    assert f"{ticket['ticket']['bytes']:,} bytes" in done.stdout
    (listed,) = json.loads(command(tmp_path, "tickets", "--json").stdout)
    assert (listed["id"], listed["arm"]) == (ticket["id"], "closed-loop")
    assert listed["accuracy"] == ticket["ticket"]["accuracy"]

    written = weights.stat().st_mtime_ns
    again = command(tmp_path, "dynamic", "tiny")
    assert again.returncode == 0
    assert weights.stat().st_mtime_ns == written
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]


@pytest.mark.ray
def test_ppo_plays_training_runs_first(tmp_path):
    done = command(tmp_path, "dynamic", "tiny", "--set", "dynamic.policy_episodes=4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny" / "dynamic"
    lines = (folder / "archive.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert (folder / "policy" / "policy.safetensors").exists()
    ticket = json.loads((folder / "ticket.json").read_text())
    assert ticket["lineage"]["policy"].endswith("dynamic/policy")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("dynamic.watch=20", "must be less than half of dynamic.warmup = 21"),
        ("dynamic.target=0.5", "dynamic.target"),
        ("dynamic.recovery=3", "recovery_steps"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, option, says):
    done = command(tmp_path, "dynamic", "tiny", "--set", option)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_target_out_of_reach_is_one_line(tmp_path):
    done = command(tmp_path, "dynamic", "tiny", "--set", "dynamic.target=900")
    assert done.returncode == 2
    assert done.stderr.startswith("target = 900: from 1 to ")
    assert not (tmp_path / "runs" / "tiny" / "dynamic").exists()
