"""Result files: `benchmarks/results/<name>.json`, one form for all benchmarks; and the rows that
a long benchmark has measured so far."""

from __future__ import annotations

import argparse
import fcntl
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
from typing import IO, Any

from rlcompress.core.files import JsonLines, read_lines, save_json

FOLDER = Path(__file__).parent / "results"


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Mean and standard deviation over n seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"value": statistics.mean(values), "unit": unit, "sd": sd, "n": len(values)}


def median_figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Median and standard deviation of n timings."""
    return {**figure(values, unit), "value": statistics.median(values)}


def parser(description: str) -> argparse.ArgumentParser:
    """For a module's own `__doc__`, shown as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


#: Locks of this process, until it ends.
_held: dict[Path, IO[str]] = {}


def _claim(path: Path) -> None:
    lock = path.with_suffix(".lock").resolve()
    if lock in _held:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = open(lock, "w")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{path}: another process is writing it") from None
    _held[lock] = file


class Rows:
    """A file of measured rows, each on the disk before `append` returns, so that a benchmark
    that is stopped goes on behind them; each with the `commit` that measured it. One process may
    write it, any may read it."""

    def __init__(self, path: Path) -> None:
        _claim(path)
        self.rows = read_lines(path)
        self._file, self._commit = JsonLines(path), commit()

    def append(self, row: Mapping[str, Any]) -> None:
        row = {"commit": self._commit, **row}
        self._file.append(json.dumps(row, separators=(",", ":")))
        self.rows.append(row)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The commit that runs; " and changes" if the tree differs from it."""
    # The result files are rewritten as figures come in.
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "HEAD") + (" and changes" if changed else "")


#: What a row is about, beside its seed.
ABOUT = (
    *("network", "method", "searcher", "budget", "score", "sensitivity", "target"),
    *("part", "recovery", "keep"),
)


def _about(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(key) for key in ABOUT])


def write(
    name: str,
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    keep: bool = False,
) -> Path:
    """Writes a result file and returns its path; its `commit` and `command` are those of this
    summary. `keep`: what the file has of networks, methods and budgets that were not measured this
    time stays, with the `commit` of its own summary where it names none."""
    path = FOLDER / f"{name}.json"
    stayed: list[dict[str, Any]] = []
    if keep and path.exists():
        old = json.loads(path.read_text())
        mark = {"commit": old["commit"]}
        others = {n: {**mark, **f} for n, f in old["figures"].items() if n not in figures}
        figures = {**figures, **others}
        again = {_about(row) for row in rows}
        stayed = [{**mark, **row} for row in old["rows"] if _about(row) not in again]
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
        "rows": [*rows, *stayed],
    }
    FOLDER.mkdir(exist_ok=True)
    save_json(path, content)
    return path
