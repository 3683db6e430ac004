"""What a process is told once holds for what it computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from rlcompress.core.process import settle_process
if {settled}:
    settle_process()
x = torch.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x = x + 1.0
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, float((x * 1e-39).sum() > 0))
"""


def measured(settled: bool) -> tuple[int, float]:
    """Pages that 20 additions of 32 MiB asked the system for, and whether denormals count."""
    code = COUNT.format(settled=settled)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults, denormals = done.stdout.split()
    return int(faults), float(denormals)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_and_denormals_are_zero():
    fresh, counted = measured(settled=False)
    again, zero = measured(settled=True)
    assert (counted, zero) == (1.0, 0.0)
    assert again < fresh / 2
