"""The way of the data: dense -> search -> ticket -> export -> report, in one run folder.

Each stage reads and writes files and is idempotent: output there and its inputs' hash unchanged
means done. So starting again is resuming. What was made from other inputs is set aside, never
deleted.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

from rlcompress.live import console, noise_to
from rlcompress.report.page import write_report
from rlcompress.spec import Experiment
from rlcompress.stages.check import check
from rlcompress.stages.deliver import export, last_lines, track
from rlcompress.stages.dense import train_dense
from rlcompress.stages.search import search_all
from rlcompress.stages.ticket import make_tickets
from rlcompress.stages.workspace import Workspace

__all__ = ["Run", "Workspace"]


def _import_ahead(run: Workspace) -> None:
    if (run.folder / "tracked.json").exists():
        return
    if "ppo" in (run.experiment.search.searcher, *run.experiment.search.baselines):
        importlib.import_module("rlcompress.rl.ppo")
    importlib.import_module("rlcompress.tracking")


class Run:
    """An experiment's verbs, each of which the command line calls by its name."""

    def __init__(self, name: str, experiment: Experiment, folder: Path) -> None:
        self.workspace = Workspace(name, experiment, folder)

    def check(self) -> None:
        """Prints what would run, and how long it would take; writes nothing."""
        check(self.workspace)

    def search(self) -> None:
        w = self.workspace
        w.begin()
        with noise_to(w.log()):
            train_dense(w)
            records = search_all(w)
        console.print(f"{len(records)} schedules measured: {w.folder / 'search/archive.jsonl'}")
        console.print(f"next     rlcompress ticket {w.name}")

    def ticket(self) -> None:
        w = self.workspace
        w.begin()
        with noise_to(w.log()):
            make_tickets(w)
        last_lines(w)

    def export(self) -> None:
        w = self.workspace
        with noise_to(w.log()):
            paths = export(w)
        for path in paths:
            console.print(path)

    def report(self) -> None:
        with noise_to(self.workspace.log()):
            page = write_report(self.workspace.folder)
        console.print(page)

    def run(self) -> None:
        """All stages, then the last lines: dense -> ticket."""
        w = self.workspace
        w.begin()
        console.print(f"{w.name} in {w.folder}; the libraries' messages go to {w.log()}")
        with noise_to(w.log()):
            # Ray and MLflow take many seconds to import; dense training leaves a core free.
            threading.Thread(target=_import_ahead, args=(w,), daemon=True).start()
            train_dense(w)
            search_all(w)
            make_tickets(w)
            export(w)
            write_report(w.folder)
            track(w)
        last_lines(w)
