"""A network and data of one's own, and `check`, which looks before anything is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shell import command
from tests.test_stages import EXPERIMENTS

OWN = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

def data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    parts = ((0, 900), (900, 1300), (1300, 1797))
    return [TensorDataset(images[a:b], labels[a:b]) for a, b in parts]

class Net(nn.Module):
    def __init__(self, channels, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.head = nn.Linear(channels, num_classes)
        self.aux = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        if float(x.detach().mean()) < 0:
            raise ValueError("never")
        x = torch.relu(self.body(x)).mean((2, 3))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)
"""

OWN_EXPERIMENT = """
experiments:
  own:
    model: {factory: "mine:Net", args: {channels: 24}}
    data: {factory: "mine:data"}
    dense: {epochs: 4, batch_size: 32}
    calibration: {fit_images: 64, score_images: 64, positions: 256, estimate_images: 32}
    search: {searcher: knapsack, episodes: 6, target: [3, 6], keeps: [1.0, 0.6, 0.3], bits: [4, 8]}
    ppo: {num_env_runners: 0}
    ticket: {epochs: 1, batch_size: 32, lr: 0.05, fit_images: 128, floor: 5.0}
    export: {onnx: false}
"""


def test_ones_own_network_and_data_from_the_current_folder(tmp_path):
    """It cannot be traced, and has a head for training only."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "experiments.yaml").write_text(OWN_EXPERIMENT)
    printed = command(tmp_path, "run", "own").stdout
    assert printed.count("cannot be traced by torch.fx") == 1
    assert printed.count("the output does not use it: aux") == 1
    (path,) = (tmp_path / "runs/own/tickets").glob("knapsack-*/ticket.json")
    ticket = json.loads(path.read_text())
    assert path.with_name("weights.safetensors").stat().st_size == ticket["ticket"]["bytes"]
    assert "cannot hold this network" in printed  # torch.export cannot follow it either
    line = next(text for text in printed.splitlines() if text.startswith("next "))
    assert "trust=['mine:Net']" in line
    done = subprocess.run(
        line.removeprefix("next").strip(),
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert "(aux): Identity()" in done.stdout


def test_check_prints_the_table_and_writes_nothing(tmp_path):
    (tmp_path / "experiments.yaml").write_text(EXPERIMENTS)
    printed = command(tmp_path, "check", "tiny").stdout
    for words in ("features.22", "classifier", "the network's output", "to expect", "9 layers"):
        assert words in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "torchvision.models:alexnett"], "did you mean"),
        (["--model", "nosuch.module:x"], "cannot import nosuch.module"),
        (["--model", "torchvison.models:x"], 'did you mean "torchvision"?'),
        (["--model", "torchvision.model:x"], 'did you mean "torchvision.models"?'),
        (["--model", "vgg"], "--model = "),
        (["--model", "torchvision.models:alexnet", "--input", "3,4"], "three whole numbers"),
        (
            ["--model", "torchvision.models:alexnet", "--input", "3,4,4"],
            "cannot be run on an input",
        ),
        (["tiny", "--model", "vgg19"], "one of the two"),
        ([], "one of the two"),
    ],
)
def test_what_check_cannot_look_at_is_one_line(tmp_path, words, says):
    done = command(tmp_path, "check", *words, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_check_of_a_network_alone_needs_no_experiment(tmp_path):
    words = ("--model", "torchvision.models:shufflenet_v2_x0_5", "--input", "3,32,32")
    printed = command(tmp_path, "check", *words).stdout
    for text in (
        "stage2.0.branch2.0",
        "channels could not be read in stage4",
        "a cut there changes what other channels compute",
        "it is the network's output",
        "dense: 57 layers in 19 groups (3 protected)",
        "one evaluation: ",
        "to expect, about: ",
    ):
        assert text in printed
    assert not list(tmp_path.iterdir())
