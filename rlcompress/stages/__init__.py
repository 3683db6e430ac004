"""The way of the data: dense -> search -> ticket -> export -> report, in one run folder.

Each stage reads and writes files and is idempotent: output there and its inputs' hash unchanged
means done. So starting again is resuming. What was made from other inputs is set aside, never
deleted.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlcompress.core.errors import UserError
from rlcompress.live import console, json_only, noise_to, print_json
from rlcompress.lock import Lock
from rlcompress.spec import Experiment
from rlcompress.stages.check import check
from rlcompress.stages.deliver import (
    export,
    finish_tickets,
    last_lines,
    track,
    tracked,
    tracker_of,
)
from rlcompress.stages.dense import train_dense
from rlcompress.stages.policies import find_policy
from rlcompress.stages.preflight import require_possible
from rlcompress.stages.search import outcome_lines, print_front, search_all, searched
from rlcompress.stages.ticket import make_tickets
from rlcompress.stages.workspace import Workspace

__all__ = ["Run", "Workspace"]


def _prepare(run: Workspace) -> None:
    """Ray takes many seconds to start and RLlib to import; dense training hides it. A cluster that
    does not answer is told before."""
    ppo, search = run.experiment.ppo, run.experiment.search
    on_ray = "ppo" in (search.searcher, *search.baselines)
    if (run.folder / "tracked.json").exists() or not (on_ray or run.has_workers()):
        return
    uniform = "uniform" in search.baselines and search.searcher != "uniform"
    if len(run.tickets()) >= run.experiment.ticket.top + uniform:
        return  # what is left needs no workers
    if ppo.num_env_runners:
        # In this thread: Ray's processes die with the thread that started them.
        importlib.import_module("rlcompress.rl.cluster").start_ray(ppo)
    if on_ray:
        threading.Thread(
            target=importlib.import_module, args=["rlcompress.rl.ppo"], daemon=True
        ).start()


@contextlib.contextmanager
def _ahead(run: Workspace) -> Iterator[None]:
    """Meanwhile imports MLflow and makes its database: that takes many seconds too. An error
    there is not ours: who needs MLflow in earnest meets it again."""

    def work() -> None:
        with contextlib.suppress(Exception):
            tracking = importlib.import_module("rlcompress.tracking")
            tracking.prepare(run.folder, run.experiment.tracking.uri)

    thread = threading.Thread(target=work, daemon=True)
    if not (run.folder / "tracked.json").exists():
        thread.start()
    yield
    if thread.is_alive():
        thread.join()


@contextlib.contextmanager
def _working(run: Workspace, lock: Lock | None) -> Iterator[None]:
    """The libraries' messages go to the log, and a copy to `storage`, however it ends; under the
    lock, or without one where another command holds it and makes the copy."""
    with lock or contextlib.nullcontext():
        try:
            with noise_to(run.log()):
                if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # this is a Ray job
                    jobs = importlib.import_module("rlcompress.rl.jobs")
                    jobs.publish(run.folder, run.experiment.ppo)
                yield
        except BaseException:
            # What ended the command is what it ends with: of the copy a line is enough.
            try:
                _keep(run, lock)
            except (UserError, OSError) as error:
                print(error, file=sys.stderr)
            raise
        _keep(run, lock)


def _keep(run: Workspace, lock: Lock | None) -> None:
    if lock is not None:
        run.keep()
    elif run.storage is not None:
        _keep_if_idle(run)


def _keep_if_idle(run: Workspace) -> None:
    """Two that copy at a time could leave the older of two files."""
    try:
        lock = Lock(run.folder)
    except UserError:
        return  # who holds it copies at its end
    with lock:
        run.keep()


class Run:
    """An experiment's verbs, each of which the command line calls by its name."""

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        folder: Path,
        words: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        """`words`: the options of the command line, for the commands that are printed. `fresh`: the
        run that is there moves aside once this one can begin."""
        self.workspace = Workspace(name, experiment, folder, words, fresh)

    def check(self, *, as_json: bool = False) -> None:
        """Prints what would run, and how long it would take; writes nothing."""
        check(self.workspace, as_json=as_json)

    def search(self, *, as_json: bool = False) -> None:
        w = self.workspace
        with json_only(as_json):
            require_possible(w, tracked=False)
            with _working(w, w.begin()):
                _prepare(w)
                train_dense(w)
                records = search_all(w)
            for line in outcome_lines(w, records):
                console.print(line, soft_wrap=True, highlight=False)
            console.print(f"archive  {w.folder / 'search/archive.jsonl'}")
            console.print(f"next     {w.next('ticket')}")
        if as_json:
            print_json(searched(w, records))

    def ticket(self) -> None:
        w = self.workspace
        w.fetch()
        w.require_search()
        with _working(w, w.begin()):
            train_dense(w)  # another verb may have left one of other options
            for _ in make_tickets(w):
                pass
        last_lines(w)

    def tune(self) -> None:
        """Trials of PPO with other rewards and settings, beside the stages of `run`."""
        w = self.workspace
        from rlcompress.stages import tune

        tune.require_space(w)
        require_possible(w, plays=find_policy)
        with _working(w, w.begin()):
            train_dense(w)
            trials = tune.tune(w)
            tune.track_trials(w, trials)
        tune.last_lines(w, trials)

    def transfer(self) -> None:
        """A search by a policy from elsewhere, and its front on the terminal."""
        w = self.workspace
        require_possible(w, tracked=False)
        with _working(w, w.begin()):
            _prepare(w)
            train_dense(w)
            search_all(w)
        print_front(w, "transfer")
        console.print(f"next     {w.next('ticket')}")

    def train_policy(self) -> None:
        """A policy for other networks, beside the stages of `run`."""
        w = self.workspace
        from rlcompress.stages import zoo

        networks = zoo.members(w)
        require_possible(w, plays=None, zoo=networks)
        with _working(w, w.begin()):
            about = zoo.train_policy(w, networks)
            version = zoo.register(w, about)
        zoo.last_lines(w, about, version)

    def dynamic(self) -> None:
        """Compression during training, beside the stages of `run`."""
        w = self.workspace
        from rlcompress.stages import dynamic

        require_possible(w, searches=False, plays=dynamic.begins_with)
        with _working(w, w.begin()):
            train_dense(w)
            ticket = dynamic.compress_in_training(w)
            with tracker_of(w) as tracker:
                tracker.log_ticket(w.folder / "dynamic", ticket)
        dynamic.last_lines(ticket, w)

    def export(self) -> None:
        w = self.workspace
        w.fetch()
        tickets = w.tickets()
        if not tickets:
            raise UserError(f"{w.folder}: no ticket of these options yet; {w.next('ticket')}")
        with _working(w, Lock(w.folder)):
            train_dense(w)
            for path in [path for ticket in tickets for path in export(w, ticket)]:
                console.print(path)
            finish_tickets(w)

    def report(self) -> None:
        w = self.workspace
        w.fetch()
        if not (w.folder / "search" / "archive.jsonl").exists():
            raise UserError(f"{w.folder}: nothing searched yet; {w.next('run')}")
        w.require_search()
        from rlcompress.stages.report import report

        # Without the lock: one may look at a run at work.
        with _working(w, None):
            try:
                page = report(w)
            except FileNotFoundError as error:
                raise UserError(
                    f"{error}; if another command is at work on it, {w.next('report')} once that "
                    "is done"
                ) from error
        console.print(page)

    def run(self, write: Path | None = None) -> None:
        """All stages, then the last lines: dense -> ticket. What cannot be exported to ONNX is
        told at the end: it keeps nobody from the ticket. `write`: see `Workspace.begin`."""
        w, problems = self.workspace, list[UserError]()
        require_possible(w)
        with _working(w, w.begin(write)):
            _prepare(w)
            train_dense(w)
            w.keep()
            search_all(w)
            w.keep()
            with _ahead(w):
                # Workers go on with the next ticket while one is exported.
                for ticket in make_tickets(w):
                    try:
                        export(w, ticket)
                    except UserError as error:
                        problems.append(error)
            finish_tickets(w)
            if not tracked(w):
                from rlcompress.stages.report import report

                report(w)
                track(w)
        last_lines(w)
        if problems:
            raise UserError(*map(str, problems))
