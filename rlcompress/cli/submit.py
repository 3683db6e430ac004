"""`rlcompress submit`: a verb on an experiment, as a job on a Ray cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlcompress.cli.app import app
from rlcompress.cli.options import (
    FILE,
    File,
    Fresh,
    Name,
    Out,
    Sets,
    check_folder,
)
from rlcompress.core.errors import OutsideError, UserError
from rlcompress.lock import check_movable, move_aside

if TYPE_CHECKING:
    from rlcompress.rl.jobs import Cluster

VERBS = ("run", "search", "ticket", "tune", "dynamic", "export", "report")

Address = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", help="The job server.", envvar="RAY_API_SERVER_ADDRESS"
    ),
]
RuntimeEnv = Annotated[
    Path, typer.Option("--runtime-env", metavar="PATH", help="What goes along, and variables.")
]


@app.command()
def submit(
    name: Name,
    address: Address = "http://127.0.0.1:8265",
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    fresh: Fresh = False,
    verb: Annotated[
        str, typer.Option("--verb", metavar="VERB", help=f"Of {', '.join(VERBS)}.")
    ] = "run",
    runtime_env: RuntimeEnv = Path("cluster/runtime_env.yaml"),
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job, nor bring anything back.")
    ] = False,
    follow: Annotated[
        str | None, typer.Option("--follow", metavar="ID", help="A job that runs or ran already.")
    ] = None,
) -> None:
    """Run an experiment on a Ray cluster: follow its log, bring its run folder back.

    This folder is uploaded, without what the runtime environment's file and .gitignore leave
    out. On the cluster the run folder stays, and the same command goes on in it.

    \b
    rlcompress submit quickstart --address http://127.0.0.1:8265
    rlcompress submit quickstart --verb tune --set tune.trials=16 --no-wait
    rlcompress submit quickstart --follow raysubmit_1a2b3c4d

    Exit codes: the job's own; 2 a mistake, nothing was submitted; 3 the cluster cannot be
    reached; 130 interrupted, the job goes on.
    """
    from rlcompress import spec

    experiment = spec.resolve(spec.load_experiments(file), name, list(sets or ()))
    if verb not in VERBS:
        raise UserError(f"--verb {verb}: must be one of {', '.join(VERBS)}")
    if fresh and verb not in ("run", "search"):
        raise UserError(f"--fresh: {verb} does not start over; run and search do")
    folder = out or Path("runs") / name
    check_folder(folder)
    if experiment.storage is None:
        check_movable(folder)
    env: dict[str, Any] = {}
    words = ["python", "-m", "rlcompress", verb, name]
    if follow is None:
        words += [] if file == FILE else ["--file", _inside(file)]
        words += [word for text in sets or () for word in ("--set", text)]
        words += ["--fresh"] if fresh else []
        env = _runtime_env(runtime_env)

    from rlcompress.rl.jobs import Cluster

    cluster = Cluster(address)
    entrypoint = shlex.join(words)
    job = follow or _submit(cluster, env, entrypoint, name)
    again = ["rlcompress", "submit", name, "--address", cluster.address, "--follow", job]
    again += ["--file", str(file)] if file != FILE else []
    again += ["--out", str(out)] if out else []
    again += [word for text in sets or () for word in ("--set", text)]
    commands = [
        f"to follow it: {shlex.join(again)}",
        f"to stop it:   ray job stop --address {shlex.quote(cluster.address)} {job}",
    ]
    try:
        if follow is None:
            typer.echo(f"job      {job}: {entrypoint}")
        if no_wait:
            return typer.echo("\n".join(commands))
        code = cluster.follow(job, lambda text: typer.echo(text, nl=False))
        if experiment.storage is None:
            _bring(cluster, job, folder)
        else:
            typer.echo(f"run folder: {experiment.storage.rstrip('/')}/{name}")
    except KeyboardInterrupt:
        typer.echo("\n".join(["\nInterrupted. The job goes on;", *commands]), err=True)
        raise typer.Exit(130) from None
    except OutsideError as error:
        raise OutsideError("\n".join([str(error), "the job may go on;", *commands])) from error
    raise typer.Exit(code)


def _inside(file: Path) -> str:
    """`file` as the job sees it: relative to the folder that is uploaded."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        raise UserError(f"--file {file}: must be in this folder, which is uploaded") from None


def _runtime_env(path: Path) -> dict[str, Any]:
    import yaml

    try:
        env = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; run from the folder that has it, or name it with "
            "--runtime-env PATH"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(env, dict) or not isinstance(env.get("excludes", []), list):
        raise UserError(f"{path}: must be a mapping, `excludes` in it a list")
    return env


def _submit(cluster: Cluster, env: dict[str, Any], entrypoint: str, name: str) -> str:
    from rlcompress.rl.jobs import pack

    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "working_dir.zip"
        size = pack(Path.cwd(), env.get("excludes", []), package)
        typer.echo(f"upload   {size / 2**20:.2f} MiB of {Path.cwd()} to {cluster.address}")
        return cluster.submit(package, env, entrypoint, name)


def _bring(cluster: Cluster, job: str, folder: Path) -> None:
    """Whole or not there; what was there before moves aside."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        count = cluster.fetch(job, part)
        if not count:
            return typer.echo("the job made no run folder", err=True)
        move_aside(folder)
        if folder.is_dir():  # an empty one
            folder.rmdir()
        part.chmod(0o777 & ~_umask())
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    typer.echo(f"run folder, {count} files: {folder}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
