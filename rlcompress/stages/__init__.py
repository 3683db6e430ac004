"""The way of the data: dense -> search -> ticket -> export -> report, in one run folder.

Each stage reads and writes files and is idempotent: output there and its inputs' hash unchanged
means done. So starting again is resuming. What was made from other inputs is set aside, never
deleted.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path

from rlcompress.core.errors import UserError
from rlcompress.live import console, noise_to
from rlcompress.report.page import write_report
from rlcompress.spec import Experiment
from rlcompress.stages.check import check
from rlcompress.stages.deliver import export, last_lines, track, tracked
from rlcompress.stages.dense import train_dense
from rlcompress.stages.search import search_all
from rlcompress.stages.ticket import make_tickets
from rlcompress.stages.workspace import Workspace

__all__ = ["Run", "Workspace"]


def _prepare(run: Workspace) -> None:
    """Ray and MLflow take many seconds to start and import; dense training hides it."""
    if (run.folder / "tracked.json").exists():
        return
    modules = ["rlcompress.tracking"]
    ppo = run.experiment.ppo
    if "ppo" in (run.experiment.search.searcher, *run.experiment.search.baselines):
        modules.insert(0, "rlcompress.rl.ppo")
        if ppo.num_env_runners:
            # In this thread: Ray's processes die with the thread that started them.
            cluster = importlib.import_module("rlcompress.rl.cluster")
            cluster.warm_up(ppo.address, min(ppo.num_env_runners, os.cpu_count() or 1))
    threading.Thread(
        target=lambda: [importlib.import_module(name) for name in modules], daemon=True
    ).start()


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
        w = self.workspace
        if not (w.folder / "search" / "archive.jsonl").exists():
            raise UserError(f"{w.folder}: nothing searched yet; rlcompress run {w.name}")
        with noise_to(w.log()):
            page = write_report(w.folder)
        console.print(page)

    def run(self) -> None:
        """All stages, then the last lines: dense -> ticket."""
        w = self.workspace
        w.begin()
        console.print(f"{w.name} in {w.folder}; the libraries' messages go to {w.log()}")
        with noise_to(w.log()):
            _prepare(w)
            train_dense(w)
            search_all(w)
            make_tickets(w)
            if export(w) and not tracked(w):
                write_report(w.folder)
                track(w)
        last_lines(w)
