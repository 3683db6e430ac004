"""What a user's own network, data and weights may look like."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest
import torch

from rlcompress.core.tensors import load_tensors
from tests.mistakes import Told

_numbers = itertools.count()

OWN = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self, num_classes=10):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, num_classes)
        def forward(self, x):
            x = self.conv2(self.conv(x).relu()).relu()
            return self.head(x.mean((2, 3)))
"""


def assert_passes(told: Told) -> None:
    assert not told.code, told.err


def own(code: str) -> str:
    """The module that holds it."""
    name = f"owned{next(_numbers)}"
    Path(f"{name}.py").write_text(textwrap.dedent(OWN) + code + "\n")
    return name


def check(rlcompress, module: str, *words: str) -> Told:
    small = ("--set", f"model.factory={module}:make", "--set", "search.target=[2, 3]")
    return rlcompress("check", "tiny", *small, *words)


@pytest.mark.parametrize(
    "answer", ["[y, x]", "(y, x)", "{'aux': x, 'out': y}", "{'loss': None, 'logits': y, 'x': x}"]
)
def test_what_training_returns_besides_the_logits(rlcompress, answer):
    code = f"""class make(Net):
    def forward(self, x):
        y = super().forward(x)
        return {answer} if self.training else y"""
    assert_passes(check(rlcompress, own(code)))


def test_a_network_that_comes_frozen_is_trained(rlcompress):
    code = """def make():
    model = Net()
    return model.requires_grad_(False)"""
    module = own(code)
    assert_passes(check(rlcompress, module))
    options = ("--set", f"model.factory={module}:make", "--set", "search.target=[2, 3]")
    assert_passes(rlcompress("search", "tiny", *options))
    before, after = (
        load_tensors(Path(f"runs/tiny/dense/{name}.safetensors"))[0] for name in ("init", "trained")
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)
