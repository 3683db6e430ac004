"""Faults for real: after at most the same command again nothing is lost, nothing is doubled.

Each strikes a process of its own at a moment that its files tell; `benchmarks.faults` does the same
ten times and at other moments."""

from __future__ import annotations

import os

import pytest

from benchmarks import faulty, stage_set

#: Undisturbed searches of other draws were within 0.06 of each other.
WORST_FRONT = 0.9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return stage_set.prepare(tmp_path_factory.mktemp("faults") / "whole")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("fault", faulty.FAULTS)
def test_the_same_command_ends_what_a_fault_struck(whole, tmp_path, fault):
    if fault == "disk_full" and os.geteuid() != 0:
        pytest.skip("only root can mount the small tmpfs that is to become full")
    row = faulty.play(fault, tmp_path / fault, whole)
    assert row["wrong"] == []
    assert row["before"] > 0
    assert (row["lost"], row["doubled"], row["missing"]) == (0, 0, 0)
    assert row["front"] > WORST_FRONT
