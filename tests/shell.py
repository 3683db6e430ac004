"""The command line as a user has it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rlcompress(folder: Path, *words: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`rlcompress WORDS` in `folder`, where `tests` can be imported."""
    return subprocess.run(
        [sys.executable, "-m", "rlcompress", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
