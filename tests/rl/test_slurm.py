"""cluster/slurm.sh for real but for Slurm, on one node: `srun` starts the command right here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlcompress.core.files import read_archive
from tests.shell import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

EXPERIMENTS = """
experiments:
  tiny:
    model: {factory: vgg19, args: {width: 0.125}}
    data: {factory: digits}
    dense: {epochs: 2, batch_size: 64}
    calibration: {fit_images: 64, score_images: 64, positions: 128, estimate_images: 32}
    search: {searcher: uniform, baselines: [], episodes: 4, finalists: 1, target: [6, 20]}
    ppo: {num_env_runners: 0}
    ticket: {epochs: 1, batch_size: 64, fit_images: 64, floor: 100.0, arms: [rewind]}
    export: {onnx: false}
"""
#: Without Slurm's own options; a line a call.
SRUN = """#!/bin/sh
echo "$@" >> "$SRUN_CALLS"
while [ "$1" != ray ]; do shift; done
exec "$@"
"""


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    scratch = Path(f"/tmp/s{os.getpid()}")  # Ray's sockets must have short names
    scratch.mkdir()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(scratch),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SRUN_CALLS": str(tmp_path / "calls"),
    }
    shutil.rmtree(scratch, ignore_errors=True)


def test_the_script_starts_a_cluster_runs_on_it_and_ends_it(tmp_path, machine):
    words = ["bash", str(ROOT / "cluster" / "slurm.sh"), "tiny"]
    done = subprocess.run(
        words, cwd=tmp_path, env=machine, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(read_archive(tmp_path / "runs" / "tiny" / "search" / "archive.jsonl")) == 4
    assert "--head" in (tmp_path / "calls").read_text()
    assert not list(tmp_path.glob(".ray-token*"))
    left = subprocess.run(["pgrep", "-f", machine["RAY_TMPDIR"]], capture_output=True, text=True)
    assert not left.stdout


def test_a_runs_exit_code_is_the_scripts(tmp_path, machine):
    words = ["bash", str(ROOT / "cluster" / "slurm.sh"), "tinny"]
    done = subprocess.run(
        words, cwd=tmp_path, env=machine, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'did you mean "tiny"?' in done.stdout + done.stderr
