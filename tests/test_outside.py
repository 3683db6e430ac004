"""Mistakes around a run folder, and an outside world that does not answer. Most play on copies of
one search of a tiny network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rlcompress.core.policy import Policy, PolicyShape, save_policy
from rlcompress.core.tensors import save_tensors
from rlcompress.lock import Lock
from tests.mistakes import EXPERIMENTS, assert_told, contents
from tests.shell import ROOT
from tests.shell import rlcompress as shell
from tests.toy import toy_network


def second_line(text: str, line: str) -> str:
    lines = text.splitlines()
    return "\n".join([lines[0], line, *lines[2:]]) + "\n"


GROWN = ("--set", "search.episodes=6")
#: Path, what becomes of its text, the command, what it says.
DAMAGED = {
    "an archive's line": (
        "search/archive.jsonl",
        lambda text: second_line(text, '{"schedule": 3}'),
        ("search", "tiny", *GROWN),
        "archive.jsonl, line 2: not a measured schedule",
    ),
    "an archive's line, half": (
        "search/archive.jsonl",
        lambda text: second_line(text, text.splitlines()[1][:40]),
        ("ticket", "tiny"),
        "archive.jsonl, line 2: not a measured schedule",
    ),
    "the dense network's figures": (
        "dense/metrics.json",
        lambda text: text[:30],
        ("search", "tiny", *GROWN),
        "metrics.json: damaged",
    ),
    "the dense network": (
        "dense/trained.safetensors",
        lambda text: text[:30],
        ("search", "tiny", *GROWN),
        "trained.safetensors: damaged or missing",
    ),
    "the estimates": (
        "search/estimates.safetensors",
        lambda text: "no tensors",
        ("search", "tiny", *GROWN),
        "estimates.safetensors: damaged or missing",
    ),
    "a marker": (
        "search/inputs.json",
        lambda text: "",
        ("search", "tiny", *GROWN),
        "inputs.json: damaged",
    ),
    "a learning curve": (
        "search/curve.jsonl",
        lambda text: "{\n",
        ("report", "tiny"),
        "curve.jsonl, line 1: not JSON",
    ),
}


@pytest.mark.parametrize(("name", "damage", "words", "says"), DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_files(rlcompress, searched, name, damage, words, says):
    run = Path("runs/tiny")
    shutil.copytree(searched, run)
    text = (run / name).read_bytes().decode("latin-1") if (run / name).exists() else ""
    (run / name).write_bytes(damage(text).encode("latin-1"))
    before = contents(run)
    assert_told(rlcompress(*words), says)
    assert contents(run) == before


def test_another_search_than_this(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    told = rlcompress("ticket", "tiny", "--set", "search.recovery=bn")
    assert_told(told, "searched with other options than these; rlcompress search tiny")


@pytest.mark.parametrize("verb", ["search", "run"])
def test_a_target_below_what_is_possible_is_told_before_training(rlcompress, verb):
    told = rlcompress(verb, "tiny", "--set", "search.target=[4, 9000]")
    assert_told(told, "search.target = [4.0, 9000.0]: at most ")
    assert not Path("runs/tiny/dense").exists()


def test_a_target_of_dynamic_below_what_is_possible(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    told = rlcompress("dynamic", "tiny", "--set", "dynamic.target=9000")
    assert_told(told, "target = 9000: from 1 to ")
    assert not Path("runs/tiny/dynamic").exists()


def test_a_loss_that_is_nan(rlcompress):
    told = rlcompress("search", "tiny", "--set", "dense.lr=1e30")
    assert_told(told, "training loss is nan in epoch 1; try a lower lr (now 1e+30)")
    assert not Path("runs/tiny/dense/metrics.json").exists()


def test_a_policy_of_another_version(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    save_policy(Path("runs/tiny/search/policy"), Policy(PolicyShape(9, 9, 8, 99)), {})
    told = rlcompress("dynamic", "tiny")
    assert_told(told, "the policy reads observation version 99")
    assert "train it again" in told.err
    assert not Path("runs/tiny/dynamic/ticket.json").exists()


def weights(kind: str) -> Path:
    path = Path(f"{kind}.safetensors")
    if kind == "text":
        path.write_text("no tensors")
    elif kind == "other":
        save_tensors(path, toy_network(in_channels=3).state_dict())
    elif kind == "pickle":
        path = path.with_suffix(".pt")
        path.write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    return path


WEIGHTS = {
    "missing": "no such file",
    "text": "dense.weights = ",
    "other": "dense.weights = ",
    "pickle": "dense.weights = ",
}


@pytest.mark.parametrize(("kind", "says"), WEIGHTS.items())
def test_weights_of_something_else(rlcompress, kind, says):
    told = rlcompress("search", "tiny", "--set", f"dense.weights={weights(kind)}")
    assert_told(told, says)
    assert not Path("run").exists()
    assert not Path("runs/tiny/dense").exists()


# --- two commands in one folder ------------------------------------------------------------------

HOLDER = "import sys; from pathlib import Path; from rlcompress.lock import Lock;"


def test_two_commands_in_one_folder(rlcompress):
    code = f"{HOLDER} sys.argv = ['rlcompress', 'run', 'tiny']; lock = Lock(Path('runs/tiny'));"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code} print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        for verb in ("run", "search", "tune", "dynamic"):
            words = ("--set", "tune.space={ppo.lr: {choice: [0.1]}}")
            told = rlcompress(verb, "tiny", *words)
            assert_told(told, f"runs/tiny: in use by process {holder.pid} on {os.uname().nodename}")
            assert "rlcompress run tiny; wait until it ends" in told.err
        Path("runs/tiny/spec.yaml").write_text("")
        assert_told(rlcompress("run", "tiny", "--fresh"), f"in use by process {holder.pid}")
        assert {path.name for path in Path("runs/tiny").iterdir()} == {"lock", "spec.yaml"}
    finally:
        holder.kill()
        holder.communicate()
    # The words of a process that was killed are no obstacle.
    assert str(holder.pid) in Path("runs/tiny/lock").read_text()
    with Lock(Path("runs/tiny")):
        assert str(os.getpid()) in Path("runs/tiny/lock").read_text()
    with Lock(Path("runs/tiny")):
        pass


def test_a_report_is_of_the_options_that_are_named(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    told = rlcompress("report", "tiny", "--set", "seed=5")
    assert_told(told, "searched with other options than these; rlcompress search tiny --set seed=5")
    assert not Path("runs/tiny/report").exists()


def test_a_report_of_a_run_at_work_leaves_the_copy_to_it(rlcompress, searched):
    """Two that copy at a time could leave the older of two files."""
    shutil.copytree(searched, "runs/tiny")
    words = ("report", "tiny", "--set", "storage=kept")
    with Lock(Path("runs/tiny")):
        assert rlcompress(*words).code == 0
        assert Path("runs/tiny/report/index.html").is_file()
        assert not Path("kept/tiny").exists()
    assert rlcompress(*words).code == 0
    assert Path("kept/tiny/report/index.html").is_file()
    assert not Path("kept/tiny/lock").exists()


def test_a_report_while_another_command_trains(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    Path("runs/tiny/dense/metrics.json").unlink()
    told = rlcompress("report", "tiny")
    assert_told(told, "dense/metrics.json is missing; ")


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs with options on a new folder; needs root."""
    made = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("needs root, to mount a small disk")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_a_full_disk_and_room_again(rlcompress, mounted):
    disk = mounted("size=64k")
    words = ("search", "tiny", "--out", str(disk / "run"))
    filler = disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    told = rlcompress(*words)
    assert_told(told, "the disk is full; make room; the same command goes on", code=3)
    assert str(disk / "run") in told.err
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert rlcompress(*words).code == 0


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_a_read_only_disk(rlcompress, mounted):
    disk = mounted("size=64k,ro")
    assert_told(rlcompress("run", "tiny", "--out", str(disk / "run")), "cannot be written; name")


#: Root reads everything; so it becomes nobody once it has read the program.
AS_NOBODY = (
    "import os, sys, rlcompress.cli, rlcompress.spec; os.setuid(65534);"
    " rlcompress.cli.main(sys.argv[1:])"
)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_no_permission(tmp_path):
    file = tmp_path / "experiments.yaml"
    file.write_text(EXPERIMENTS)
    tmp_path.chmod(0o755)

    def told(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stderr

    code, words = told("run", "tiny")
    assert code == 2
    assert "cannot be written; name another with --out DIR" in words
    file.chmod(0o600)
    code, words = told("ls")
    assert code == 2
    assert words.endswith("path 'experiments.yaml' is not readable.\n")


# --- who does not answer -------------------------------------------------------------------------


@pytest.fixture
def busy_port():
    """A port where somebody listens who speaks neither Ray's protocol nor HTTP."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


def test_mlflow_unreachable(rlcompress, closed_port):
    uri = f"http://127.0.0.1:{closed_port}"
    assert_told(rlcompress("tickets", "--uri", uri), f"MLflow at {uri}: ", code=3)
    assert_told(rlcompress("tickets", "show", "x", "--uri", uri), f"MLflow at {uri}: ", code=3)


def test_mlflow_behind_a_busy_port(rlcompress, busy_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{busy_port}"
    assert_told(rlcompress("tickets", "--uri", uri), f"MLflow at {uri}: ", code=3)


@pytest.mark.parametrize("uri", ["sqlite:///typo.db", "nonsense://x"])
def test_mlflow_nowhere(rlcompress, uri):
    assert_told(rlcompress("tickets", "--uri", uri), f"MLflow at {uri}: ", code=3)
    assert not Path("typo.db").exists()


@pytest.fixture
def answers_once():
    """The address of a server that says that MLflow knows no experiment, and is gone."""

    class Once(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Once)

    def serve() -> None:
        server.handle_request()
        server.server_close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def test_mlflow_unreachable_after_a_training_run(rlcompress, searched, answers_once):
    shutil.copytree(searched, "runs/tiny")
    told = rlcompress("dynamic", "tiny", "--set", f"tracking.uri={answers_once}")
    assert_told(told, "all results are in runs/tiny; the same command tries MLflow", 3, lines=2)
    assert json.loads(Path("runs/tiny/dynamic/ticket.json").read_text())["id"]


@pytest.mark.parametrize("verb", ["run", "dynamic", "tune"])
def test_mlflow_unreachable_is_told_before_anything_is_trained(rlcompress, verb, closed_port):
    uri = f"http://127.0.0.1:{closed_port}"
    words = ("--set", f"tracking.uri={uri}", "--set", "tune.space={ppo.gamma: {grid: [0.9]}}")
    assert_told(rlcompress(verb, "tiny", *words), f"MLflow at {uri}: ", code=3)
    assert not Path("runs").exists()


@pytest.mark.ray
@pytest.mark.parametrize("port", ["busy_port", "closed_port"])
def test_a_cluster_that_does_not_answer(rlcompress, request, port):
    address = f"127.0.0.1:{request.getfixturevalue(port)}"
    words = ("--set", "ppo.num_env_runners=1", "--set", f"ppo.address={address}")
    told = rlcompress("search", "tiny", *words)
    assert_told(told, f"ppo.address = {address}: no Ray cluster answers there", code=3)
    assert not Path("runs/tiny/dense").exists()


@pytest.mark.ray
def test_more_gpus_than_there_are(tmp_path):
    # A process of its own: Ray has started by then.
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    words = ("--set", "ppo.num_env_runners=1", "--set", "ppo.num_gpus_per_env_runner=64")
    done = shell(tmp_path, "search", "tiny", "--searcher", "ppo", *words)
    assert done.returncode == 2
    assert "1 env runners need 64 GPUs, this machine has" in done.stderr
    assert "--set ppo.num_gpus_per_env_runner=" in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "dense").exists()
