"""The command line: verbs only.

Everything but typer is imported inside a verb, so that `--help` is instant and a mistake in
an experiment is told before torch, ray or mlflow load.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rlcompress import __version__
from rlcompress.core.errors import UserError

if TYPE_CHECKING:
    from rlcompress.stages import Run


class _Verbs(TyperGroup):
    """Ends a verb in plain lines and an exit code, where Python would show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            # With --fresh the same command would start over instead of going on.
            words = [word for word in sys.argv[1:] if word != "--fresh"]
            typer.echo("\nInterrupted. What is measured is kept; to go on:", err=True)
            typer.echo(f"  rlcompress {shlex.join(words)}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A name that `ls` lists.")]
File = Annotated[Path, typer.Option("--file", metavar="PATH", help="The experiments file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option; may be repeated."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run folder.  [default: runs/EXPERIMENT]"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; the old run folder moves to DIR.1, DIR.2, …")
]
SearcherName = Annotated[
    str | None,
    typer.Option("--searcher", metavar="NAME", help="Short for --set search.searcher=NAME."),
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        "--sensitivity",
        metavar="KIND",
        help="estimated, measured or refitted: short for --set search.sensitivity=KIND.",
    ),
]
FILE = Path("experiments.yaml")


def _open(
    name: str,
    file: Path,
    sets: Sequence[str] | None,
    out: Path | None,
    *,
    searcher: str | None = None,
    fresh: bool = False,
) -> Run:
    """Validate first; only then load torch, and touch the disk."""
    from rlcompress import spec

    overrides = [*(sets or ()), *([f"search.searcher={searcher}"] if searcher else ())]
    experiment = spec.resolve(spec.load_experiments(file), name, overrides)
    words = [] if file == FILE else ["--file", str(file)]
    words += [word for text in sets or () for word in ("--set", text)]
    words += ["--searcher", searcher] if searcher else []
    words += ["--out", str(out)] if out else []
    folder = out or Path("runs") / name
    _check_folder(folder)
    if fresh:
        _move_aside(folder)

    from rlcompress import stages

    return stages.Run(name, experiment, folder, words)


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; name another folder with --out DIR")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: {there} cannot be written; name another with --out DIR")


def _move_aside(folder: Path) -> None:
    folder = folder.resolve()
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "spec.yaml").exists():
        raise UserError(
            f"{folder}: not a run folder (no spec.yaml in it), so --fresh does not move it;"
            " name another with --out DIR"
        )
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    typer.echo(f"the old run is now in {aside}", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlcompress {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Prune and quantize neural networks with a policy that PPO trains.

    \b
    rlcompress ls
    rlcompress check quickstart
    rlcompress run quickstart
    """


@app.command("ls")
def ls_(file: File = FILE) -> None:
    """List the experiments, and the run folders that exist.

    \b
    rlcompress ls
    rlcompress ls --file my-experiments.yaml
    """
    from rlcompress import spec

    experiments = spec.load_experiments(file)
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


@app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(metavar="[EXPERIMENT]", help="A name that `ls` lists.")
    ] = None,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PKG.MOD:FACTORY", help="A network alone, without data."),
    ] = None,
    shape: Annotated[
        str, typer.Option("--input", metavar="C,H,W", help="With --model: shape of one image.")
    ] = "3,224,224",
    classes: Annotated[
        int, typer.Option("--classes", metavar="N", min=1, help="With --model: its num_classes.")
    ] = 10,
) -> None:
    """Print the layers and groups, one evaluation, and the time to expect. Starts no Ray.

    \b
    rlcompress check quickstart
    rlcompress check --model torchvision.models:resnet18 --input 3,224,224
    """
    if (name is None) == (model is None):
        raise UserError("check wants an EXPERIMENT or --model PKG.MOD:FACTORY, one of the two")
    if model is None:
        assert name is not None
        return _open(name, file, sets, out).check()
    from rlcompress import spec

    alone = spec.resolve_alone(model, shape, classes)
    from rlcompress.stages.check import check_model

    check_model(alone.model, alone.input, alone.classes)


@app.command()
def run(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    fresh: Fresh = False,
    searcher: SearcherName = None,
) -> None:
    """Run all stages: dense, search, ticket, export, report. Goes on where it stopped.

    \b
    rlcompress run quickstart
    rlcompress run quickstart --searcher knapsack --out runs/quickstart-knapsack
    rlcompress run quickstart --set search.episodes=50 --fresh
    """
    _open(name, file, sets, out, searcher=searcher, fresh=fresh).run()


@app.command()
def search(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    fresh: Fresh = False,
    searcher: SearcherName = None,
    sensitivity: Sensitivity = None,
) -> None:
    """Train the dense network if need be, then search for schedules.

    \b
    rlcompress search quickstart
    rlcompress search quickstart --searcher random --out runs/quickstart-random
    rlcompress search quickstart --searcher knapsack --sensitivity refitted
    """
    # As an override: the next verb, whose command is shown, takes that as well.
    sets = [*(sets or ()), *([f"search.sensitivity={sensitivity}"] if sensitivity else ())]
    _open(name, file, sets, out, searcher=searcher, fresh=fresh).search()


@app.command()
def ticket(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    searcher: SearcherName = None,
) -> None:
    """Retrain the best schedules into tickets, with their controls.

    \b
    rlcompress ticket quickstart
    rlcompress ticket quickstart --set ticket.top=3 --set ticket.floor=0.5
    """
    _open(name, file, sets, out, searcher=searcher).ticket()


@app.command()
def tune(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Search PPO's reward and settings with Ray Tune; one front of all trials.

    \b
    rlcompress tune quickstart --set tune.trials=8
    """
    _open(name, file, sets, out).tune()


@app.command()
def dynamic(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Compress the network during one training run, with the policy in the loop.

    \b
    rlcompress dynamic quickstart
    rlcompress dynamic quickstart --set dynamic.target=40 --set dynamic.policy_episodes=16
    """
    _open(name, file, sets, out).dynamic()


@app.command()
def export(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    searcher: SearcherName = None,
) -> None:
    """Write tickets at the size they claim: packed weights, ONNX.

    \b
    rlcompress export quickstart
    rlcompress export quickstart --set export.onnx=false
    """
    _open(name, file, sets, out, searcher=searcher).export()


@app.command()
def report(
    name: Name,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    searcher: SearcherName = None,
) -> None:
    """Draw the figures and write report/index.html.

    \b
    rlcompress report quickstart
    """
    _open(name, file, sets, out, searcher=searcher).report()


tickets_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tickets_app, name="tickets")

Uri = Annotated[
    str | None,
    typer.Option(
        "--uri",
        metavar="URI",
        help="MLflow's tracking URI.  [default: MLFLOW_TRACKING_URI, else runs/*/mlflow.db]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@tickets_app.callback()
def tickets(ctx: typer.Context, uri: Uri = None, as_json: AsJson = False) -> None:
    """List the tickets that MLflow holds: bytes, accuracy, density, controls.

    \b
    rlcompress tickets
    rlcompress tickets show ppo-1a2b3c4d
    """
    if ctx.invoked_subcommand is not None:
        return
    from rlcompress.stages.listing import list_tickets

    list_tickets(uri, as_json=as_json)


@tickets_app.command("show")
def tickets_show(
    name: Annotated[str, typer.Argument(metavar="ID", help="Its id, or how it begins.")],
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Print one ticket: figures, controls, what it came from, its schedule.

    \b
    rlcompress tickets show ppo-1a2b3c4d
    """
    from rlcompress.stages.listing import print_ticket

    print_ticket(name, uri, as_json=as_json)


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


def main(args: Sequence[str] | None = None) -> None:
    """The console entry. Ends in SystemExit: 0, 2 on a user's mistake, 130 when interrupted."""
    app(args=args, prog_name="rlcompress")


if __name__ == "__main__":
    main()
