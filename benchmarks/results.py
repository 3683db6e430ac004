"""Result files: `benchmarks/results/<name>.json`, one form for all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Mean and standard deviation over n seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"value": statistics.mean(values), "unit": unit, "sd": sd, "n": len(values)}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The commit that runs; " and changes" if the tree differs from it."""
    # The result files are rewritten as figures come in.
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "HEAD") + (" and changes" if changed else "")


def write(name: str, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a result file and returns its path."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    words = ["uv", "run", "python", "-m", module, *sys.argv[1:]]
    content = {
        "command": shlex.join(words),
        "commit": commit(),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "ray", "mlflow")},
        },
        "figures": dict(figures),
        "rows": list(rows),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
