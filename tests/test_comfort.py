"""The command line in scripts and shells: JSON, completion, paths of all kinds, Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mistakes import EXPERIMENTS
from tests.shell import ROOT
from tests.shell import rlcompress as shell


def test_ls_as_json(rlcompress):
    Path("experiments.yaml").write_text(EXPERIMENTS + "  bad: {extends: tiny, seed: x}\n")
    Path("runs/tiny").mkdir(parents=True)
    told = rlcompress("ls", "--json")
    good, bad = json.loads(told.out)
    assert (told.code, good["name"], good["folder"], good["problems"]) == (
        0,
        "tiny",
        "runs/tiny",
        [],
    )
    assert bad["folder"] is None
    assert "seed" in bad["problems"][0]


def test_check_as_json(rlcompress):
    told = rlcompress("check", "tiny", "--json")
    content = json.loads(told.out)
    assert [layer["name"] for layer in content["layers"]] == ["0", "4", "8", "14"]
    assert content["layers"][-1]["protected"] == "it is the network's output"
    assert content["spec"]["search"]["episodes"] == 4
    assert content["evaluation"]["seconds"] > 0
    assert content["expected_seconds"].keys() == {"dense", "search", "tickets"}
    assert "one evaluation: " in told.err
    assert not Path("runs").exists()
    alone = json.loads(
        rlcompress("check", "--model", "tests.toy:toy_network", "--input", "1,16,16", "--json").out
    )
    assert alone["dense"] == content["dense"]


def test_search_as_json_in_a_folder_with_spaces_and_umlauts(rlcompress):
    folder = Path("rün s/é")
    Path("my experiments.yaml").write_bytes(Path("experiments.yaml").read_bytes())
    Path("experiments.yaml").unlink()
    words = ("tiny", "--file", "my experiments.yaml", "--out", str(folder))
    told = rlcompress("search", *words, "--json")
    assert told.code == 0, told.err
    content = json.loads(told.out)
    assert content["searchers"]["uniform"]["evaluations"] == 4
    assert content["archive"] == str(folder / "search" / "archive.jsonl")
    lines = Path(content["archive"]).read_text().splitlines()
    front = [json.dumps(record) for record in content["searchers"]["uniform"]["front"]]
    assert {json.dumps(json.loads(line)) for line in lines} >= set(front)
    assert front
    assert "search uniform  4/4" in told.err
    best = content["searchers"]["uniform"]["best"]
    assert ("uniform: 4 schedules measured, none within" in told.err) == (best is None)
    assert ("uniform: 4 schedules measured; within" in told.err) == (best is not None)
    # The command that is named next can be copied.
    assert "rlcompress ticket tiny --file 'my experiments.yaml' --out 'rün s/é'" in told.err
    assert rlcompress("dynamic", *words).code == 0
    listed = rlcompress(
        "tickets", "--json", "--uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    )
    assert [ticket["experiment"] for ticket in json.loads(listed.out)] == ["tiny"]
    assert rlcompress("report", *words).out.strip() == str(folder / "report" / "index.html")


def test_brackets_and_colons_are_printed_as_they_are(rlcompress, searched):
    """Of options and paths in the commands that are named."""
    shutil.copytree(searched, "runs/[red]tiny")
    words = ("--set", "search.baselines=[uniform]", "--set", "description='see [/docs] :art:'")
    told = rlcompress("search", "tiny", *words, "--out", "runs/[red]tiny")
    assert told.code == 0, told.err
    assert "--set 'search.baselines=[uniform]'" in told.out
    assert "see [/docs] :art:" in told.out
    assert "archive  runs/[red]tiny/search/archive.jsonl" in told.out


def test_a_bar_shows_brackets_as_they_are(monkeypatch):
    from rlcompress import live

    shown = live.Console(force_terminal=True, width=120, markup=False, file=io.StringIO())
    monkeypatch.setattr(live, "console", shown)
    with live.stage("search [/x]", 2) as stage:
        stage.update(1, "lr [red]=[0.1]")
    assert "search [/x]" in shown.file.getvalue()
    assert "lr [red]=[0.1]" in shown.file.getvalue()


@pytest.mark.parametrize(
    ("line", "completes"),
    [
        ("rlcompress run ti", "tiny"),
        ("rlcompress check ", "tiny"),
        ("rlcompress run tiny --set search.ep", "search.episodes="),
        ("rlcompress run tiny --set se", "seed="),
        ("rlcompress sea", "search"),
    ],
)
def test_completion(tmp_path, line, completes):
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    done = subprocess.run(
        [sys.executable, "-m", "rlcompress"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_RLCOMPRESS_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - (not line.endswith(" "))),
        },
    )
    assert completes in done.stdout.split(), done.stdout + done.stderr


def test_help_tells_the_exit_codes(rlcompress):
    told = " ".join(rlcompress("--help").out.split())
    assert "Exit codes: 0 done; 2 a mistake in what was asked; 3 the outside world" in told


def on_a_terminal(folder: Path, *words: str, **env: str) -> str:
    """What `rlcompress WORDS` writes to a terminal of 120 columns."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlcompress", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=there,
        stderr=there,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **env},
    )
    os.close(there)
    written = b""
    # Reading from a terminal that nobody writes to any more is an error.
    with contextlib.suppress(OSError):
        while part := os.read(here, 65536):
            written += part
    os.close(here)
    assert process.wait() == 0, written.decode()
    return written.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:[39][0-7]|38;|48;|4[0-7]|10[0-7])")


@pytest.mark.slow
def test_colours_respect_no_color(tmp_path):
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    assert COLOUR.search(on_a_terminal(tmp_path, "search", "tiny", NO_COLOR=""))
    plain = on_a_terminal(tmp_path, "search", "tiny", "--fresh", NO_COLOR="1")
    assert "uniform" in plain
    assert not COLOUR.search(plain)


# --- Ctrl-C --------------------------------------------------------------------------------------

SLOW = """
experiments:
  slow:
    model: {factory: "tests.toy:toy_network"}
    data: {factory: digits, args: {size: 16}}
    dense: {epochs: EPOCHS, batch_size: 32, lr: 0.05}
    calibration: {fit_images: 64, score_images: 64, positions: 256, estimate_images: 32}
    search: {searcher: SEARCHER, baselines: [], episodes: EPISODES, target: [4, 8],
             keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
    ppo: {num_env_runners: 1, episodes_per_iteration: 4, epochs: 1, hidden: 8}
    tune: {trials: 2, trial_episodes: 400, space: {ppo.lr: {loguniform: [0.0001, 0.01]}}}
    dynamic: {target: 8, warmup: 21, watch: 10, recovery_steps: 3, final_steps: 4000000}
    ticket: {epochs: 4000, batch_size: 32, fit_images: 64, floor: 50.0}
"""


def interrupted(folder: Path, words: list[str], at: Callable[[Path], bool]) -> tuple[int, str]:
    """Sends SIGINT to `rlcompress WORDS` once its run folder is as `at` says; exit code, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlcompress", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while not at(folder / "runs" / "slow"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def write_slow(folder: Path, epochs: int, searcher: str, episodes: int) -> None:
    text = SLOW.replace("EPOCHS", str(epochs)).replace("SEARCHER", searcher)
    (folder / "experiments.yaml").write_text(text.replace("EPISODES", str(episodes)))


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_interrupted_while_the_dense_network_trains(tmp_path):
    write_slow(tmp_path, 4000, "uniform", 4)
    code, err = interrupted(
        tmp_path,
        ["search", "slow", "--fresh"],
        lambda run: (run / "dense" / "checkpoint.safetensors").exists(),
    )
    assert code == 130
    assert "Traceback" not in err
    assert "Interrupted. Kept in runs/slow: the epochs of the dense network so far" in err
    assert err.endswith("; to go on:\n  rlcompress search slow\n")


def test_interrupted_in_a_search_the_same_command_goes_on(tmp_path):
    write_slow(tmp_path, 2, "random", 100_000)
    archive = tmp_path / "runs" / "slow" / "search" / "archive.jsonl"
    code, err = interrupted(tmp_path, ["search", "slow"], lambda run: lines_of(archive) > 5)
    assert (code, "Traceback" in err) == (130, False)
    kept = archive.read_text()
    count = lines_of(archive)
    assert f"Kept in runs/slow: the dense network, {count} measured schedules" in err
    words = ("search", "slow", "--set", f"search.episodes={count + 2}")
    done = shell(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert archive.read_text().startswith(kept)
    assert lines_of(archive) == count + 2


def test_interrupted_while_a_ticket_trains(tmp_path):
    write_slow(tmp_path, 2, "uniform", 4)
    code, err = interrupted(
        tmp_path, ["run", "slow"], lambda run: any(run.glob("tickets/*/*.checkpoint"))
    )
    assert (code, "Traceback" in err) == (130, False)
    assert "the dense network, 4 measured schedules, 1 arm in training; to go on:" in err


def test_what_train_policy_and_dynamic_have_kept(tmp_path):
    from rlcompress.cli import interrupt

    for name in ("a", "b"):
        (tmp_path / "zoo" / name / "samples").mkdir(parents=True)
        (tmp_path / "zoo" / name / "dense").mkdir()
        (tmp_path / "zoo" / name / "dense" / "metrics.json").write_text("{}")
        (tmp_path / "zoo" / name / "samples" / "archive.jsonl").write_text("1\n2\n")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "episodes.jsonl").write_text("1\n")
    (tmp_path / "dynamic").mkdir()
    (tmp_path / "dynamic" / "archive.jsonl").write_text("1\n")
    assert interrupt.kept(tmp_path) == [
        "2 dense networks of the zoo",
        "4 measured schedules of the zoo",
        "1 episode over the zoo",
        "1 training run of the policy",
    ]


def test_interrupted_in_dynamic(tmp_path):
    write_slow(tmp_path, 2, "random", 4)
    code, err = interrupted(
        tmp_path, ["dynamic", "slow"], lambda run: (run / "dynamic" / "inputs.json").exists()
    )
    assert (code, "Traceback" in err) == (130, False)
    assert "Kept in runs/slow: the dense network; to go on:\n  rlcompress dynamic slow\n" in err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", ["search", "tune"])
def test_interrupted_while_ray_runs_the_same_command_goes_on(tmp_path, verb):
    write_slow(tmp_path, 2, "ppo", 100_000)
    archive = tmp_path / "runs" / "slow" / verb / "archive.jsonl"
    code, err = interrupted(tmp_path, [verb, "slow"], lambda run: lines_of(archive) > 9)
    assert (code, "Traceback" in err) == (130, False)
    assert f"the dense network, {lines_of(archive)} " in err
    assert not (archive.parent / "trials.json").exists()
    kept = archive.read_text()
    again, err = interrupted(tmp_path, [verb, "slow"], lambda run: archive.read_text() != kept)
    assert again == 130
    assert archive.read_text().startswith(kept)
