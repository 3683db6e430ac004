"""The examples run as they are, shorter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ones_own_loop_and_its_checkpoint(tmp_path):
    """Stopped after a third and resumed, it writes the file that it writes in one go."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = example("own_loop", "--epochs", "10", "--out", str(whole))
    size, accuracy = re.findall(r"([\d,]+) bytes, test ([\d.]+)%", said)[-1]
    assert int(size.replace(",", "")) == (whole / "weights.safetensors").stat().st_size
    assert re.findall(r"([\d.]+)x fewer", said)[-1] >= "20.0"
    assert float(accuracy) > 80.0
    example("own_loop", "--epochs", "4", "--out", str(parts))
    example("own_loop", "--epochs", "10", "--out", str(parts), "--resume")
    files = [(folder / "weights.safetensors").read_bytes() for folder in (whole, parts)]
    assert files[0] == files[1]


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


@pytest.mark.parametrize("name", ["own_loop", "callback"])
def test_the_commands_in_an_example_are_its_own(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"uv run python -m examples.{name}" in text
