"""The examples run as they are, shorter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlcompress.core.files import read_archive

ROOT = Path(__file__).parents[1]


def example(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_ones_own_loop(tmp_path):
    said = example("own_loop", "--epochs", "10", "--out", str(tmp_path))
    size, accuracy = re.findall(r"([\d,]+) bytes, test ([\d.]+)%", said)[-1]
    assert int(size.replace(",", "")) == (tmp_path / "weights.safetensors").stat().st_size
    assert float(re.findall(r"([\d.]+)x fewer", said)[-1]) >= 20.0
    assert float(accuracy) > 80.0


@pytest.mark.slow
def test_ones_own_loop_stopped_and_resumed_writes_the_same_file(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    example("own_loop", "--epochs", "10", "--out", str(whole))
    example("own_loop", "--epochs", "4", "--out", str(parts))
    example("own_loop", "--epochs", "10", "--out", str(parts), "--resume")
    files = [(folder / "weights.safetensors").read_bytes() for folder in (whole, parts)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_callback_as_lightning_calls_it():
    said = example("callback", "--epochs", "10")
    ratio, accuracy = re.fullmatch(r"([\d.]+)x fewer bytes, test ([\d.]+)%\n", said).groups()
    assert float(ratio) >= 20.0
    assert float(accuracy) > 80.0


@pytest.mark.slow
def test_ones_own_image_folder(tmp_path):
    """PNG files in, a ticket that loads by its own class out."""
    folder, out = tmp_path / "digits", tmp_path / "run"
    said = example(*("image_folder", "--images", "600", "--folder", str(folder), "--out", str(out)))
    assert len(list(folder.glob("*/*.png"))) == 600
    assert "bytes on disk" in said
    (ticket,) = out.glob("tickets/knapsack-*")
    about = json.loads((ticket / "ticket.json").read_text())
    assert (ticket / "weights.safetensors").stat().st_size == about["ticket"]["bytes"]
    assert about["input"]["shape"] == [3, 16, 16]


@pytest.mark.slow
def test_a_policy_from_elsewhere_on_a_torchvision_network(tmp_path):
    """The policy in the box plays; its ticket and the uniform rule's are compared."""
    words = ("--evaluations", "4", "--epochs", "4", "--out", str(tmp_path))
    said = example("policy_transfer", *words)
    archive = read_archive(tmp_path / "search" / "archive.jsonl")
    assert [r.searcher for r in archive].count("transfer") == 4
    assert "\nuniform (uniform-" in said
    (ticket,) = tmp_path.glob("tickets/transfer-*")
    about = json.loads((ticket / "ticket.json").read_text())
    assert about["ratio"] >= 4
    assert about["ticket"]["accuracy"] > 0.8


@pytest.mark.parametrize("name", ["own_loop", "callback", "image_folder", "policy_transfer"])
def test_the_commands_in_an_example_are_its_own(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"uv run python -m examples.{name}" in text
