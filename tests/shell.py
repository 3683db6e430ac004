"""The command line as a user has it: in a process of its own."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What is imported once, for all commands, before each forks: seconds a command. None starts a
#: thread that a fork would lose (pyarrow's jemalloc, in MLflow, starts its own again).
PRELOADED = [
    "torchvision",
    "scipy.optimize",
    "onnx",
    "rlcompress.stages",
    "rlcompress.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
]

#: What tests in this process may have set, and a command must not see.
AMBIENT = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(PRELOADED)


def rlcompress(
    folder: Path, *words: str, timeout: float = 280, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`rlcompress WORDS` in `folder`, where `tests` can be imported."""
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept) / "out", Path(kept) / "err"
        inherited = {name: v for name, v in os.environ.items() if name not in AMBIENT}
        environment = {**inherited, "PYTHONPATH": str(ROOT), **(env or {})}
        args = (str(folder), words, environment, str(out), str(err))
        process = _forks.Process(target=_command, args=args)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(
            words, process.exitcode, out.read_text(), err.read_text()
        )


def command(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = rlcompress(folder, *words)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _command(
    folder: str, words: tuple[str, ...], env: Mapping[str, str], out: str, err: str
) -> None:
    os.chdir(folder)
    for name in AMBIENT:
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.path[:] = [env["PYTHONPATH"], *(place for place in sys.path if place != folder)]
    sys.argv = ["rlcompress", *words]
    for stream, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream)
        os.close(opened)
    from rlcompress.cli import main

    try:
        main(words)
    finally:
        # multiprocessing ends its processes without.
        atexit._run_exitfuncs()
