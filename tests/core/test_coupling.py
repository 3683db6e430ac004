"""Attempts have an end, and what cannot be read whole is read in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlcompress.core import coupling
from rlcompress.core.coupling import LimitError, bounded
from rlcompress.core.structure import build_network


def test_an_attempt_that_takes_too_long_is_ended():
    def forever() -> None:
        while True:
            pass

    with pytest.raises(LimitError), bounded(0.2):
        forever()


def test_an_attempt_that_takes_too_much_memory_is_ended():
    hoard = []

    def grow() -> None:
        while True:
            hoard.append(bytearray(2**20))

    with pytest.raises(LimitError), bounded(60.0, growth_bytes=200 * 2**20):
        grow()
    assert len(hoard) < 20_000


def test_an_attempt_within_its_bounds_is_left_alone():
    with bounded(60.0):
        done = sum(range(1000))
    assert done == 499_500


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def test_a_network_that_cannot_be_read_whole_is_read_in_parts(monkeypatch):
    """Only what lies inside a part may be cut; a kind of part that failed is not tried again."""
    model = nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    tried = []
    groups = coupling._groups

    def fails_on_blocks(part, *rest):
        tried.append(type(part).__name__)
        if any(isinstance(module, Block) for module in part.modules()):
            raise ZeroDivisionError("by zero")
        return groups(part, *rest)

    monkeypatch.setattr(coupling, "_groups", fails_on_blocks)
    network = build_network(model, torch.zeros(1, 4, 6, 6))
    assert tried == ["Sequential", "Block", "Sequential", "Sequential"]
    assert [*network.groups] == ["0.branch.0", "1.branch.0"]
    assert not any(group.protected for group in network.groups.values())
    assert network.layers["0.branch.2"].protected == "its channels could not be read"
    assert network.unread[""] == "ZeroDivisionError: by zero"
    assert network.unread["1"] == "it contains what cannot be read"
