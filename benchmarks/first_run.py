"""How long a new user looks at nothing: `rlcompress run quickstart` in a new folder.

    uv run python -m benchmarks.first_run            # 3 repetitions
    uv run python -m benchmarks.first_run --quick    # one

first_line   seconds from the command to its first line
first_point  seconds until the archive holds a measured schedule: the first point of the front

The command is interrupted there, as Ctrl-C does it; `end` says how long it took to stop. Packages
are read from the disk's cache from the second repetition on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import results

MOST_SECONDS = 600.0


def once() -> dict[str, Any]:
    """One command, timed."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        archive = run / "search" / "archive.jsonl"
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlcompress", "run", "quickstart", "--out", str(run)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        first_line = time.monotonic() - begun
        # A full pipe would stop the command.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        while not (archive.exists() and archive.stat().st_size):
            if process.poll() is not None or time.monotonic() - begun > MOST_SECONDS:
                process.kill()
                raise SystemExit(f"no schedule after {time.monotonic() - begun:.0f} s")
            time.sleep(0.05)
        first_point = time.monotonic() - begun
        process.send_signal(signal.SIGINT)
        code = process.wait()
        end = time.monotonic() - begun - first_point
    return {
        "line": line.replace(str(run), "RUN"),
        "first_line": round(first_line, 2),
        "first_point": round(first_point, 2),
        "end": round(end, 2),
        "code": code,
    }


def main() -> None:
    parser = results.parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one repetition")
    quick = parser.parse_args().quick
    rows = []
    for _ in range(1 if quick else 3):
        rows.append(once())
        print(rows[-1], flush=True)
    figures = {
        name: results.median_figure([row[name] for row in rows], "s")
        for name in ("first_line", "first_point", "end")
    }
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.1f} s (median of {figure['n']})")
    print(results.write("first_run", figures, rows))


if __name__ == "__main__":
    main()
