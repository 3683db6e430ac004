"""Where faults happen: a tiny experiment at a known stage, commands that are watched and killed, a
Ray cluster and an MLflow server to lose, and what is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from rlcompress.core.files import read_archive
from rlcompress.core.pareto import hypervolume

ROOT = Path(__file__).parents[1]
NAME = "tiny"
#: Evaluations of each searcher.
BUDGETS = {"ppo": 48, "uniform": 6}
#: Of a ticket's arm.
EPOCHS = 3
EXPERIMENT = f"""
experiments:
  {NAME}:
    model: {{factory: vgg19, args: {{width: 0.125}}}}
    data: {{factory: digits}}
    dense: {{epochs: 2, batch_size: 32}}
    calibration: {{fit_images: 32, score_images: 32, positions: 128, estimate_images: 32}}
    search: {{searcher: ppo, episodes: {BUDGETS["ppo"]}, baselines: [uniform],
             baseline_episodes: {BUDGETS["uniform"]}, finalists: 2, target: [6, 20],
             keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}}
    ppo: {{num_env_runners: 2, episodes_per_iteration: 12, epochs: 2}}
    ticket: {{epochs: {EPOCHS}, batch_size: 32, lr: 0.05, fit_images: 64, floor: 3.0,
             arms: [reconstructed, rewind]}}
    export: {{onnx: false}}
"""
#: Names what is made of it.
KEY = hashlib.sha256(EXPERIMENT.encode()).hexdigest()[:8]
HOME = Path("runs") / "faults" / KEY
#: What a stage leaves to the next ones: removed from a whole run, it has ended before them.
_AFTER_TICKETS = ("report", "mlartifacts", "mlflow.db", "mlflow.json", "tracked.json")
_AFTER_SEARCH = ("tickets", "search/finals.jsonl", *_AFTER_TICKETS)
REMOVED = {
    "dense": ("search", *_AFTER_SEARCH),
    "search": _AFTER_SEARCH,
    "tickets": _AFTER_TICKETS,
}
#: Seconds of one command, at most: a busy machine takes minutes to start Ray.
LIMIT = 900.0
_POLL = 0.02


class MissedError(Exception):
    """The moment of the fault never came."""


@dataclass
class Scene:
    """`folder` holds experiments.yaml and `runs/tiny`; commands run there."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME

    @property
    def archive(self) -> Path:
        return self.run / "search" / "archive.jsonl"

    def begin(self, whole: Path, ended: str) -> None:
        """`runs/tiny` as it is when `ended` (dense, search or tickets) has ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "experiments.yaml").write_text(EXPERIMENT)
        shutil.copytree(whole / "runs" / NAME, self.run, dirs_exist_ok=True)
        for name in REMOVED[ended]:
            path = self.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """Whole lines of the archive."""
        text = self.archive.read_text() if self.archive.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    @contextlib.contextmanager
    def command(self, *words: str) -> Iterator[Command]:
        """`rlcompress WORDS tiny`, watched; nothing of it is left behind."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        path = self.folder / "printed.txt"
        with open(path, "wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlcompress", *words[:1], NAME, *words[1:]],
                cwd=self.folder,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**clean, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **self.env},
            )
        command = Command(process, path)
        try:
            yield command
        finally:
            command.clear()


@dataclass
class Command:
    process: subprocess.Popen[bytes]
    printed: Path
    _seen: set[psutil.Process] = field(default_factory=set)

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return [p for p in self._seen if p.is_running()]

    def until(self, moment: Callable[[], bool]) -> None:
        """Watches until `moment()`. Raises MissedError if the command ends first."""
        pause = threading.Event()
        while not moment():
            if self.process.poll() is not None:
                raise MissedError(f"ended with {self.process.returncode}: {self.said()[-2000:]}")
            pause.wait(_POLL)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.descendants()
        self.process.send_signal(number)

    def wait(self, seconds: float = LIMIT) -> int:
        return self.process.wait(seconds)

    def said(self) -> str:
        return self.printed.read_text(errors="replace")

    def clear(self) -> None:
        """Ends what is left: Ray's daemons end by themselves, but later."""
        left = self.descendants()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        kill_all(psutil.wait_procs(left, 10)[1])


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 30)


def prepare(folder: Path = HOME / "whole") -> Path:
    """A whole undisturbed run, made once in `folder`, which it returns as an absolute path."""
    folder = folder.resolve()
    scene = Scene(folder)
    if not (folder / "whole").exists():
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "experiments.yaml").write_text(EXPERIMENT)
        with scene.command("run") as command:
            if command.wait() != 0:
                raise AssertionError(command.said())
        (folder / "whole").touch()
    return folder


def front_area(run: Path) -> float:
    """Area under the front of (log10 bytes, log10 KL) of all records, larger is better."""
    dense = json.loads((run / "search" / "dense.json").read_text())
    found = [r.measurement for r in read_archive(run / "search" / "archive.jsonl")]
    costs = np.array([(np.log10(m.bytes), np.log10(max(m.kl, 1e-4))) for m in found])
    return hypervolume(costs, (float(np.log10(dense["bytes"])), 1.0))


def lost_and_doubled(before: list[str], scene: Scene) -> tuple[int, int, int]:
    """Lines reported before that are gone; lines too many; lines too few in the end."""
    after = scene.lines()
    lost = sum((Counter(before) - Counter(after)).values())
    counts = Counter((r.searcher, r.evaluation) for r in read_archive(scene.archive))
    wanted = {(name, i) for name, most in BUDGETS.items() for i in range(1, most + 1)}
    doubled = sum(counts.values()) - len(counts) + len(counts.keys() - wanted)
    return lost, doubled, len(wanted - counts.keys())


def tickets_wrongly(scene: Scene) -> list[str]:
    """What is wrong in the tickets of a run that has ended: each has all epochs, once."""
    tickets = [json.loads(p.read_text()) for p in scene.run.glob("tickets/*/ticket.json")]
    wrong = [] if len(tickets) == len(BUDGETS) else [f"{len(tickets)} tickets"]
    epochs = {len(curve) for ticket in tickets for curve in ticket["curves"].values()}
    if epochs != {EPOCHS}:
        wrong.append(f"{epochs} epochs, not {EPOCHS}")
    if left := list(scene.run.glob("tickets/*/*.checkpoint")):
        wrong.append(f"left behind: {left}")
    return wrong


def tracked_wrongly(database: Path, undisturbed: Path) -> list[str]:
    """What is wrong in MLflow's database after a run, by that of an undisturbed one: nothing is
    missing, nothing twice, nothing left open."""
    wrong = []

    def ask(base: Path, query: str) -> int:
        return int(query_database(base, query) or 0)

    doubled = "SELECT COUNT(*) FROM (SELECT 1 FROM metrics GROUP BY run_uuid, key, step HAVING "
    if ask(database, doubled + "COUNT(*) > 1)"):
        wrong.append("a metric is there twice")
    if ask(database, "SELECT COUNT(*) FROM runs WHERE status != 'FINISHED'"):
        wrong.append("a run is not FINISHED")
    for query in (
        "runs",
        "metrics WHERE key LIKE '%/kl'",
        "params WHERE key = 'arm'",
        "model_versions",
        "registered_model_aliases WHERE alias = 'champion'",
    ):
        found, wanted = (
            ask(base, f"SELECT COUNT(*) FROM {query}") for base in (database, undisturbed)
        )
        if found != wanted:
            wrong.append(f"{found} {query}, not {wanted}")
    return wrong


def query_database(database: Path, query: str) -> Any:
    """The first value of a query to an SQLite file that another process may be writing; None
    without an answer."""
    if not database.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as base:
            row = base.execute(query).fetchone()
    except sqlite3.OperationalError:
        return None
    return row[0] if row else None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class MlflowServer:
    """`mlflow server` on this machine, artifacts proxied; it can be lost and come back.

    store  SQLAlchemy's URI of its database
    """

    folder: Path
    store: str
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", self.store, "--serve-artifacts"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.txt", "ab") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=self.folder,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Its job runners would be eight processes more, for nothing here.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        pause = threading.Event()
        while not self.answers():
            if self._process.poll() is not None:
                raise AssertionError((self.folder / "server.txt").read_text()[-2000:])
            pause.wait(0.2)

    def answers(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.uri}/health", timeout=2).ok
        return False

    def kill(self) -> None:
        if self._process is not None:
            whole = psutil.Process(self._process.pid)
            kill_all([whole, *whole.children(recursive=True)])
            self._process.wait()
            self._process = None

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
