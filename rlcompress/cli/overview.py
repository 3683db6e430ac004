"""The verbs that need no experiment: what there is, and where it would run."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlcompress import __version__
from rlcompress.cli.app import app
from rlcompress.cli.options import FILE, AsJson, File

if TYPE_CHECKING:
    from rlcompress.spec import ExperimentFile


@app.command("ls")
def ls_(file: File = FILE, as_json: AsJson = False) -> None:
    """List the experiments, and the run folders that exist.

    \b
    rlcompress ls
    rlcompress ls --file my-experiments.yaml
    """
    from rlcompress import spec

    experiments = spec.load_experiments(file)
    if as_json:
        typer.echo(json.dumps(_listed(experiments), indent=1))
        return
    width = max((len(name) for name in experiments.experiments), default=0)
    for name in experiments.experiments:
        try:
            text = spec.resolve(experiments, name).description
        except spec.SpecError as error:
            count = len(error.lines)
            text = f"[{count} problem{'s' * (count > 1)}: rlcompress check {name}]"
        folder = Path("runs") / name
        note = f"  [{folder}]" if folder.is_dir() else ""
        typer.echo(f"{name:<{width}}  {text}{note}".rstrip())


def _listed(file: ExperimentFile) -> list[dict[str, Any]]:
    """name, description, run folder or null, problems."""
    from rlcompress import spec

    rows = []
    for name in file.experiments:
        row: dict[str, Any] = {"name": name, "description": None, "problems": []}
        try:
            row["description"] = spec.resolve(file, name).description
        except spec.SpecError as error:
            row["problems"] = error.lines
        folder = Path("runs") / name
        rows.append({**row, "folder": str(folder) if folder.is_dir() else None})
    return rows


@app.command()
def env() -> None:
    """Print versions, cores, memory and GPUs: what a bug report needs.

    \b
    rlcompress env
    """
    rows = [("python", platform.python_version()), ("rlcompress", __version__)]
    for package in ("torch", "ray", "mlflow"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    affinity = getattr(os, "sched_getaffinity", None)
    rows.append(("cores", str(len(affinity(0)) if affinity else os.cpu_count())))
    rows.append(("memory", _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))))
    rows += [("gpu", gpu) for gpu in _gpus() or ["none"]]
    for key, value in rows:
        typer.echo(f"{key:<11} {value}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _gpus() -> list[str]:
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {_gib(gpu.total_memory)}" for gpu in found]
