"""The command line in scripts and shells: JSON, completion, paths of all kinds, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mistakes import EXPERIMENTS
from tests.shell import ROOT


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
    # The command that is named next can be copied.
    assert "rlcompress ticket tiny --file 'my experiments.yaml' --out 'rün s/é'" in told.err
    assert rlcompress("dynamic", *words).code == 0
    listed = rlcompress(
        "tickets", "--json", "--uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    )
    assert [ticket["experiment"] for ticket in json.loads(listed.out)] == ["tiny"]
    assert rlcompress("report", *words).out.strip() == str(folder / "report" / "index.html")


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
