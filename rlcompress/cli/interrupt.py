"""Ctrl-C and SIGTERM (which a spot machine's end, a scheduler and `ray job stop` send): the command
ends within seconds and says what is kept."""

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
PATIENCE = {signal.SIGINT: 4.0, signal.SIGTERM: 20.0}
#: Exit codes, as shells give them.
CODES = {number: 128 + number for number in PATIENCE}
_SAID = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Stopped by SIGTERM."}

#: The run folder that the command works in, once it is known.
folder: Path | None = None


def _count(run: Path, pattern: str) -> int:
    """Lines of all files there."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob(pattern))


def kept(run: Path) -> list[str]:
    """What a run folder holds, in words."""
    found = []
    if (run / "dense" / "metrics.json").exists():
        found.append("the dense network")
    elif (run / "dense" / "checkpoint.safetensors").exists():
        found.append("the epochs of the dense network so far")
    counts = [
        (_count(run, "search/archive.jsonl"), "measured schedule", ""),
        (_count(run, "tune/archive.jsonl"), "schedule", " of trials"),
        (len(list(run.glob("zoo/*/dense/metrics.json"))), "dense network", " of the zoo"),
        (_count(run, "zoo/*/samples/archive.jsonl"), "measured schedule", " of the zoo"),
        (_count(run, "policy/episodes.jsonl"), "episode", " over the zoo"),
        (_count(run, "dynamic/archive.jsonl"), "training run", " of the policy"),
        (len(list(run.glob("tickets/*/ticket.json"))), "ticket", ""),
        (len(list(run.glob("tickets/*/*.checkpoint"))), "arm", " in training"),
    ]
    found += [f"{n} {what}{'s' * (n > 1)}{more}" for n, what, more in counts if n]
    return found


def words(number: int) -> str:
    """After a signal: what is kept, and the command that goes on."""
    # With --fresh the same command would start over instead of going on.
    command = [word for word in sys.argv[1:] if word != "--fresh"]
    found = kept(folder) if folder is not None else []
    what = f"Kept in {folder}: {', '.join(found)}" if found else "Nothing is measured yet"
    return (
        f"\n{_SAID[signal.Signals(number)]} {what}; to go on:\n  rlcompress {shlex.join(command)}\n"
    )


@contextlib.contextmanager
def ending_in_time() -> Iterator[None]:
    """The first signal is a KeyboardInterrupt, and `PATIENCE` later an end by force; the second one
    is an end by force. Every end says `words`, once, with the signal's exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminal = os.dup(2)  # stages send 2 to the log file
    said, first = False, 0

    def end(number: int = 0, frame: FrameType | None = None) -> None:
        if not said:
            os.write(terminal, words(first).encode())
        os._exit(CODES[signal.Signals(first)])

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = number
        for other in CODES:
            signal.signal(other, end)
        timer = threading.Timer(PATIENCE[signal.Signals(number)], end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in CODES}
    try:
        yield
    except KeyboardInterrupt:
        first = first or signal.SIGINT
        typer.echo(words(first), err=True, nl=False)
        said = True
        code = CODES[signal.Signals(first)]
        if signal.getsignal(signal.SIGINT) is end:
            # What must be closed (Ray) is; taking the libraries down takes seconds more, in which
            # no timer runs.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)
        raise typer.Exit(code) from None
    finally:
        # Until it has ended, an interrupted process keeps its handlers and its timer.
        if signal.getsignal(signal.SIGINT) is stop:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(terminal)
