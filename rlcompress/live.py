"""What a run shows while it works: a bar with chosen columns on a terminal, plain lines
elsewhere. The libraries' own messages go to the run's log file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Seconds between plain lines.
PLAIN_INTERVAL = 10.0

#: Tables keep their columns in a file or a pipe.
PLAIN_WIDTH = 140

#: Columns of a terminal below which the bar is short and the time spent is left out.
NARROW = 100

#: Prints text as it is: brackets and colons are part of options and paths.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
if not console.is_terminal:
    console.width = PLAIN_WIDTH


class Stage:
    """One piece of work of known length, `done` of which was done before. `update(done, text)`
    shows how far it is."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total = name, total
        self._shown = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            narrow = console.width < NARROW
            self._bar = Progress(
                TextColumn("{task.description:<14}", markup=False),
                BarColumn(bar_width=10 if narrow else 24),
                MofNCompleteColumn(),
                *([] if narrow else [TimeElapsedColumn()]),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, text="")
            self._bar.start()

    def update(self, done: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif done >= self.total or time.monotonic() - self._shown >= PLAIN_INTERVAL:
            self._shown = time.monotonic()
            console.print(f"{self.name}  {done}/{self.total}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def stage(name: str, total: int, done: int = 0) -> Iterator[Stage]:
    shown = Stage(name, total, done)
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[None]:
    """If wanted, all that is shown goes to the terminal's standard error (`noise_to` takes 2
    itself), and `print_json` has standard output to itself."""
    if not wanted:
        yield
        return
    with os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as shown:
        console.file = shown
        try:
            yield
        finally:
            console.file = None  # type: ignore[assignment]  # standard output again


def print_json(content: Any) -> None:
    """On standard output, whatever `console` is."""
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[None]:
    """Sends file descriptor 2, and with it every library's messages, to `path`."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(path, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
