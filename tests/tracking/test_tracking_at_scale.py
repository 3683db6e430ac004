"""Several writers at once: the embedded SQLite, and a server on PostgreSQL."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from benchmarks.stage_set import MlflowServer, free_port
from tests.shell import rlcompress
from tests.tracking.conftest import open_tracker, record

RECORDS = 400

#: Two experiments of their own names, made in seconds.
EXPERIMENTS = """
defaults:
  model: {factory: "tests.toy:toy_network"}
  data: {factory: digits, args: {size: 16}}
  dense: {epochs: 2, batch_size: 32, lr: 0.1}
  calibration: {fit_images: 64, score_images: 64, estimate_images: 32}
  search: {searcher: random, episodes: 6, baselines: [], target: [4, 8], finalists: 2,
           keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
  ppo: {num_env_runners: 0}
  ticket: {epochs: 1, batch_size: 32, fit_images: 64, arms: [reconstructed, rewind]}
  export: {onnx: false}
experiments:
  one: {seed: 1}
  two: {seed: 2}
"""


def _log(run: Path, number: int, barrier) -> None:
    tracker = open_tracker(run)
    barrier.wait()
    for first in range(1, RECORDS, 100):
        some = [record("ppo", i, 0.9, 1000 + i) for i in range(first, first + 100)]
        tracker.log_trial(number, {"ppo.lr": number}, some, hypervolume=1.0)


@pytest.mark.slow
def test_two_trials_log_to_the_embedded_database_at_once(run):
    open_tracker(run)  # makes the parent
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    trials = [context.Process(target=_log, args=(run, n, barrier)) for n in (1, 2)]
    for trial in trials:
        trial.start()
    for trial in trials:
        trial.join()
    assert [trial.exitcode for trial in trials] == [0, 0]
    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'rlcompress-demo'")
    found = client.search_runs([experiment.experiment_id], "tags.`rlcompress.role` = 'trial'")
    assert len(found) == 2
    for child in found:
        history = client.get_metric_history(child.info.run_id, "kl")
        assert sorted(point.step for point in history) == list(range(1, RECORDS + 1))


def _programs() -> Path | None:
    """Debian keeps PostgreSQL's server programs off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a PostgreSQL of this test's own. It refuses root: then `postgres` runs it."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb is not installed (Debian: postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("the driver psycopg is not installed: uv sync --extra postgres")
    folder = tmp_path_factory.mktemp("postgres")
    words: list[str] = []
    if os.geteuid() == 0:
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
        shutil.chown(folder, "postgres")
        words = ["runuser", "-u", "postgres", "--"]
    port, base = free_port(), folder / "base"

    def call(program: str, *more: str) -> None:
        subprocess.run(
            [*words, str(programs / program), "-D", str(base), *more],
            check=True, cwd=folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    call("initdb", "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    call("pg_ctl", "start", "-w", "-l", str(folder / "log.txt"), "-o", options)
    try:
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "stop", "-w", "-m", "immediate")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_experiments_at_once_on_a_server_with_postgresql(postgres, tmp_path):
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    with MlflowServer(tmp_path / "server", postgres) as server:
        tracked = {"MLFLOW_TRACKING_URI": server.uri}
        with ThreadPoolExecutor(2) as both:
            done = list(
                both.map(
                    lambda name: rlcompress(tmp_path, "run", name, env=tracked), ("one", "two")
                )
            )
        for ended in done:
            assert ended.returncode == 0, ended.stdout + ended.stderr
        client = mlflow.MlflowClient(server.uri)
        for name in ("one", "two"):
            (experiment,) = client.search_experiments(filter_string=f"name = 'rlcompress-{name}'")
            runs = client.search_runs([experiment.experiment_id])
            assert {run.info.status for run in runs} == {"FINISHED"}
            roles = [run.data.tags["rlcompress.role"] for run in runs]
            assert (roles.count("experiment"), roles.count("ticket")) == (1, 1)
            (parent,) = [r for r in runs if r.data.tags["rlcompress.role"] == "experiment"]
            history = client.get_metric_history(parent.info.run_id, "random/kl")
            assert sorted(point.step for point in history) == list(range(1, 7))
            (ticket,) = [r for r in runs if r.data.tags["rlcompress.role"] == "ticket"]
            # Through the server: this process has no path to its artifacts.
            assert ticket.info.artifact_uri.startswith("mlflow-artifacts:")
            names = {file.path for file in client.list_artifacts(ticket.info.run_id)}
            assert "weights.safetensors" in names
            champion = client.get_model_version_by_alias(f"rlcompress-{name}", "champion")
            assert champion.version
        assert not (tmp_path / "runs" / "one" / "mlflow.db").exists()
