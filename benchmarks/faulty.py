"""The eight faults. Each begins a scene at the stage that it is about, waits for a moment that the
run's own files tell, strikes, and says what was reported before."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.stage_set import (
    MlflowServer,
    Scene,
    front_area,
    kill_all,
    lost_and_doubled,
    query_database,
    tickets_wrongly,
    tracked_wrongly,
)
from rlcompress.core.files import read_lines

#: Seconds that the MLflow server is away, unless the run ends first.
AWAY = 60.0
#: Of the folder whose disk becomes full.
DISK_MB = 64


@dataclass
class Blow:
    """What was in the archive when a fault struck, how the command ended, what it printed; what
    was wrong with the same command again, where that had to be tried at once."""

    before: list[str]
    code: int
    said: str
    again: list[str] | None = None


def _some_lines(scene: Scene, turn: int) -> Callable[[], bool]:
    """After some evaluations, others in each turn."""
    wanted = 8 + 11 * turn % 28
    return lambda: len(scene.lines()) >= wanted


def env_runner(scene: Scene, turn: int) -> Blow:
    """kill -9 of an env runner, while PPO plays."""
    with scene.command("search") as command:
        command.until(_some_lines(scene, turn))
        victims: list[psutil.Process] = []

        def found() -> bool:
            victims[:] = [p for p in command.descendants() if _titled(p, "SingleAgentEnvRunner")]
            return bool(victims)

        command.until(found)
        victims[0].kill()
        before = scene.lines()
        return Blow(before, command.wait(), command.said())


def _titled(process: psutil.Process, title: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(title in word for word in process.cmdline()[:1])
    return False


def node(scene: Scene, turn: int) -> Blow:
    """kill -9 of all processes of a worker node, one of whose env runners is sampling."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    store = 100 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=store) for _ in range(2)]
        scene.env["RAY_ADDRESS"] = cluster.address
        with scene.command("search") as command:
            command.until(_some_lines(scene, turn))
            raylet = psutil.Process(nodes[turn % 2].all_processes["raylet"][0].process.pid)
            workers: list[psutil.Process] = []

            def playing() -> bool:
                # The untrained policy's own sizes are played before there is any.
                workers[:] = raylet.children(recursive=True)
                learned = read_lines(scene.run / "search" / "curve.jsonl")
                return bool(learned) and any(_titled(p, "SingleAgentEnvRunner") for p in workers)

            command.until(playing)
            # The raylet first: it would start new workers.
            kill_all([raylet])
            kill_all(workers)
            before = scene.lines()
            return Blow(before, command.wait(), command.said())
    finally:
        cluster.shutdown()


def driver_searching(scene: Scene, turn: int) -> Blow:
    """kill -9 of the driver during search."""
    return _driver(scene, "search", _some_lines(scene, turn))


def driver_retraining(scene: Scene, turn: int) -> Blow:
    """kill -9 of the driver while tickets retrain."""
    tickets = scene.run / "tickets"

    def moment() -> bool:
        # One arm of each of the two tickets has epochs.
        return len([*tickets.glob("*/*.checkpoint"), *tickets.glob("*/ticket.json")]) > turn % 2

    return _driver(scene, "run", moment)


#: Of MLflow's database: one of these is true first where the other ends.
LOGGED = (
    "SELECT COUNT(*) FROM runs",
    "SELECT COUNT(*) FROM metrics",
    "SELECT COUNT(*) > 1 FROM runs",
    "SELECT COUNT(*) FROM logged_models",
    "SELECT COUNT(*) FROM model_versions",
)


def driver_logging(scene: Scene, turn: int) -> Blow:
    """kill -9 of the driver while it logs to MLflow."""
    query = LOGGED[turn % len(LOGGED)]
    return _driver(scene, "run", lambda: bool(query_database(scene.run / "mlflow.db", query)))


def _driver(scene: Scene, verb: str, moment: Callable[[], bool]) -> Blow:
    with scene.command(verb) as command:
        command.until(moment)
        command.kill()
        code = command.wait()
        return Blow(scene.lines(), code, command.said())


def mlflow_gone(scene: Scene, turn: int) -> Blow:
    """The MLflow server is gone for a minute, or until the run gives up."""
    database = scene.folder / "server" / "mlflow.db"
    with MlflowServer(scene.folder / "server", f"sqlite:///{database}") as server:
        scene.env["MLFLOW_TRACKING_URI"] = server.uri
        query = LOGGED[turn % len(LOGGED)]
        with scene.command("run") as command:
            command.until(lambda: bool(query_database(database, query)))
            server.kill()
            before = scene.lines()
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(AWAY)
            server.start()
            blow = Blow(before, command.wait(), command.said())
        if blow.code:
            blow.again = _again(scene, "run")
        return blow


def disk_full(scene: Scene, turn: int) -> Blow:
    """The disk of the run folder is full."""
    ballast = scene.run / "ballast"
    with scene.command("search") as command:
        command.until(_some_lines(scene, turn))
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        before = scene.lines()
        blow = Blow(before, command.wait(), command.said())
    ballast.unlink()
    return blow


def sigterm(scene: Scene, turn: int) -> Blow:
    """SIGTERM, as a spot machine's notice sends it."""
    with scene.command("search") as command:
        command.until(_some_lines(scene, turn))
        command.kill(signal.SIGTERM)
        code = command.wait(60)
        return Blow(scene.lines(), code, command.said())


@dataclass(frozen=True)
class Fault:
    """ended  the stage that has ended before;  verb  the command;  codes  how it may end;
    says  what it then prints"""

    strike: Callable[[Scene, int], Blow]
    ended: str
    verb: str
    codes: tuple[int, ...]
    says: str = ""


FAULTS = {
    "env_runner": Fault(env_runner, "dense", "search", (0,)),
    "node": Fault(node, "dense", "search", (0,)),
    "driver_searching": Fault(driver_searching, "dense", "search", (-9,)),
    "driver_retraining": Fault(driver_retraining, "search", "run", (-9,)),
    "driver_logging": Fault(driver_logging, "tickets", "run", (-9,)),
    "mlflow_gone": Fault(mlflow_gone, "tickets", "run", (0, 3), "the same command tries"),
    "disk_full": Fault(disk_full, "dense", "search", (3,), "the disk is full"),
    "sigterm": Fault(sigterm, "dense", "search", (143,), "rlcompress search tiny"),
}


@contextlib.contextmanager
def place(fault: str, folder: Path) -> Iterator[Scene]:
    """Where it happens: for `disk_full`, which only root can do, a small tmpfs."""
    scene = Scene(folder)
    if fault != "disk_full":
        yield scene
        return
    scene.run.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(scene.run)]
    subprocess.run(words, check=True)
    try:
        yield scene
    finally:
        subprocess.run(["umount", str(scene.run)], check=True)


def undisturbed(folder: Path, whole: Path, runners: int) -> float:
    """Area under the front of a search that nothing struck / that of `whole`: as many evaluations,
    other draws, because the env runners' number decides who draws what."""
    scene = Scene(folder)
    scene.begin(whole, "dense")
    with scene.command("search", "--set", f"ppo.num_env_runners={runners}") as command:
        if command.wait() != 0:
            raise AssertionError(command.said()[-2000:])
    return front_area(scene.run) / front_area(Scene(whole).run)


def _again(scene: Scene, verb: str) -> list[str]:
    """The same command again; what is wrong with how it ended."""
    with scene.command(verb) as command:
        try:
            code = command.wait()
        except subprocess.TimeoutExpired as error:
            return [f"again: {error}"]
        return [f"again: ended with {code}: {command.said()[-1500:]}"] if code else []


def play(name: str, folder: Path, whole: Path, turn: int = 0) -> dict[str, Any]:
    """One fault for real, and the same command again where it ended the first one. A row:

    ended       exit code of the command that was struck;  before  archive lines by then
    lost        of them, those that are gone in the end
    doubled     lines too many;  missing  evaluations without a line
    front       area under the front / that of the undisturbed run `whole`
    wrong       what else is not as it should be, as text
    seconds     of it all

    Raises MissedError if the moment of the fault never came.
    """
    fault, begun = FAULTS[name], time.monotonic()
    with place(name, folder) as scene:
        scene.begin(whole, fault.ended)
        blow = fault.strike(scene, turn)
        scene.env.pop("RAY_ADDRESS", None)
        wrong = []
        if blow.code not in fault.codes:
            wrong.append(f"ended with {blow.code}: {blow.said[-500:]}")
        if blow.code and fault.says not in blow.said:
            wrong.append(f"did not say {fault.says!r}: {blow.said[-500:]}")
        if "Traceback" in blow.said:
            wrong.append(f"a traceback: {blow.said[-1500:]}")
        if blow.code:
            wrong += _again(scene, fault.verb) if blow.again is None else blow.again
        lost, doubled, missing = lost_and_doubled(blow.before, scene)
        if fault.verb == "run":
            server = scene.folder / "server" / "mlflow.db"
            database = server if name == "mlflow_gone" else scene.run / "mlflow.db"
            wrong += tickets_wrongly(scene)
            wrong += tracked_wrongly(database, Scene(whole).run / "mlflow.db")
        return {
            "ended": blow.code,
            "before": len(blow.before),
            "lost": lost,
            "doubled": doubled,
            "missing": missing,
            "front": front_area(scene.run) / front_area(Scene(whole).run),
            "wrong": wrong,
            "seconds": time.monotonic() - begun,
        }
