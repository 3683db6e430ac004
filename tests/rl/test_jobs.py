"""A real cluster: a head and two workers as separate nodes, a job through its job server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from rlcompress.core.files import read_archive
from tests.ray_nodes import Nodes
from tests.shell import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

EXPERIMENTS = """
experiments:
  tiny:
    model: {factory: vgg19, args: {width: 0.125}}
    data: {factory: digits}
    dense: {epochs: 3, batch_size: 32}
    calibration: {fit_images: 64, score_images: 64, positions: 256, estimate_images: 32}
    search: {searcher: ppo, baselines: [], episodes: 14, finalists: 2, target: [6, 20],
             keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
    ppo: {num_env_runners: 2, episodes_per_iteration: 4, epochs: 1}
    ticket: {epochs: 1, batch_size: 32, lr: 0.05, fit_images: 64, floor: 20.0,
             arms: [rewind, reconstructed]}
    export: {onnx: false}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Nodes(tmp_path_factory.mktemp("cluster")) as made:
        made.head(cpus=0)
        for _ in range(2):
            made.worker(cpus=1, hide=[ROOT / "rlcompress", ROOT / "envs"])
        yield made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a user has: the project, and things that must not be uploaded."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rlcompress", "envs", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in (".git", "runs", "data", ".venv", "mlruns"):
        (folder / name).mkdir()
        (folder / name / "large").write_bytes(os.urandom(2**22))
    (folder / "experiments.yaml").write_text(EXPERIMENTS)
    return folder


def start(cluster, checkout: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlcompress", "submit", *words, "--address", cluster.jobs],
        cwd=checkout,
        env={**cluster.env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit(cluster, checkout: Path, *words: str) -> tuple[int, str]:
    process = start(cluster, checkout, *words)
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


@pytest.fixture(scope="module")
def ran(cluster, checkout) -> str:
    code, said = submit(cluster, checkout, "tiny")
    assert code == 0, said
    return said


def test_a_job_brings_its_run_folder_and_its_log(checkout, ran):
    mib = float(re.search(r"upload +([\d.]+) MiB", ran)[1])
    assert 0.05 < mib < 2.0
    assert "test split" in ran  # the table of the job's last lines
    run = checkout / "runs" / "tiny"
    records = read_archive(run / "search" / "archive.jsonl")
    assert [r.evaluation for r in records] == list(range(1, 15))
    (ticket,) = [json.loads(p.read_text()) for p in run.glob("tickets/*/ticket.json")]
    weights = run / "tickets" / ticket["id"] / "weights.safetensors"
    assert weights.stat().st_size == ticket["ticket"]["bytes"]
    assert (run / "report" / "index.html").is_file()


def test_mlflow_has_the_run_and_its_ticket(checkout, ran):
    import mlflow

    run = checkout / "runs" / "tiny"
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs([experiment.experiment_id])
    roles = {r.data.tags.get("rlcompress.role"): r for r in found}
    (path,) = run.glob("tickets/*/ticket.json")
    assert roles["ticket"].data.tags["rlcompress.ticket"] == path.parent.name
    assert {r.info.status for r in found} == {"FINISHED"}


def test_env_runners_were_on_both_workers(cluster, ran):
    answer = requests.get(
        f"{cluster.jobs}/api/v0/actors",
        params={"detail": "true", "limit": 1000},
        headers=cluster._header(),
        timeout=30,
    )
    rows = answer.json()["data"]["result"]["result"]
    runners = [row for row in rows if "EnvRunner" in row["class_name"]]
    assert len({row["node_id"] for row in runners}) == 2, rows


def test_without_the_token_it_is_refused(cluster, checkout):
    env = {**cluster.env, "RAY_AUTH_TOKEN": "wrong" * 8}
    env.pop("RAY_AUTH_TOKEN_PATH")
    done = subprocess.run(
        [sys.executable, "-m", "rlcompress", "submit", "tiny", "--address", cluster.jobs],
        cwd=checkout,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_jobs_exit_code_comes_back(cluster, checkout, ran):
    """A ticket of a search that was never made: the user's mistake is told by the job."""
    code, said = submit(
        cluster, checkout, "tiny", "--verb", "ticket", "--set", "seed=7", "--out", "runs/other"
    )
    assert code == 2, said
    assert "nothing searched yet" in said or "searched with other options" in said


def test_interrupted_it_says_that_the_job_goes_on_and_how_to_follow_it(cluster, checkout, ran):
    process = start(cluster, checkout, "tiny", "--verb", "report", "--out", "runs/again")
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("job "):
            break
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "The job goes on" in said
    job = re.search(r"ray job stop .* (raysubmit_\w+)", said)[1]
    words = ("tiny", "--follow", job, "--out", "runs/again")
    assert f"--follow {job}" in said
    code, said = submit(cluster, checkout, *words)
    assert code == 0, said
    assert (checkout / "runs" / "again" / "report" / "index.html").is_file()


def test_plain_ray_job_submit_leaves_the_run_at_storage(cluster, checkout, tmp_path):
    words = ["ray", "job", "submit", "--address", cluster.jobs, "--working-dir", "."]
    words += ["--runtime-env", "cluster/runtime_env.yaml", "--"]
    words += ["python", "-m", "rlcompress", "search", "tiny", "--searcher", "knapsack"]
    words += ["--set", f"storage={tmp_path}", "--set", "search.episodes=3"]
    done = subprocess.run(
        words, cwd=checkout, env=cluster.env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    archive = tmp_path / "tiny" / "search" / "archive.jsonl"
    assert len([r for r in read_archive(archive) if r.searcher == "knapsack"]) >= 1
