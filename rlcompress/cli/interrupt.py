"""Ctrl-C: the command ends within seconds and says what is kept."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import typer

#: Seconds for stages to close what they hold; then the process ends all the same.
PATIENCE = 4.0

#: The run folder that the command works in, once it is known.
folder: Path | None = None


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kept(run: Path) -> list[str]:
    """What a run folder holds, in words."""
    found = []
    if (run / "dense" / "metrics.json").exists():
        found.append("the dense network")
    elif (run / "dense" / "checkpoint.safetensors").exists():
        found.append("the epochs of the dense network so far")
    counts = [
        (_count(run / "search" / "archive.jsonl"), "measured schedule", ""),
        (_count(run / "tune" / "archive.jsonl"), "schedule", " of trials"),
        (len(list(run.glob("tickets/*/ticket.json"))), "ticket", ""),
        (len(list(run.glob("tickets/*/*.checkpoint"))), "arm", " in training"),
    ]
    found += [f"{n} {what}{'s' * (n > 1)}{more}" for n, what, more in counts if n]
    return found


def words() -> str:
    """What is kept, and the command that goes on."""
    # With --fresh the same command would start over instead of going on.
    command = [word for word in sys.argv[1:] if word != "--fresh"]
    found = kept(folder) if folder is not None else []
    what = f"Kept in {folder}: {', '.join(found)}" if found else "Nothing is measured yet"
    return f"\nInterrupted. {what}; to go on:\n  rlcompress {shlex.join(command)}\n"


@contextlib.contextmanager
def ending_in_time() -> Iterator[None]:
    """The first SIGINT is a KeyboardInterrupt, and `PATIENCE` seconds later an end by force; the
    second one is an end by force. Every end says `words`, once, with exit code 130."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminal = os.dup(2)  # stages send 2 to the log file
    said = False

    def end(number: int = 0, frame: FrameType | None = None) -> None:
        if not said:
            os.write(terminal, words().encode())
        os._exit(130)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, end)
        timer = threading.Timer(PATIENCE, end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(words(), err=True, nl=False)
        said = True
        if signal.getsignal(signal.SIGINT) is end:
            # What must be closed (Ray) is; taking the libraries down takes seconds more, in which
            # no timer runs.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(130)
        raise typer.Exit(130) from None
    finally:
        # Until it has ended, an interrupted process keeps its handler and its timer.
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)
            os.close(terminal)
