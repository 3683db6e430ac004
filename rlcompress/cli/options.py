"""What verbs on an experiment share: their options, and the run they open.

Everything but typer is imported inside a verb, so that `--help` is instant and a mistake in
an experiment is told before torch, ray or mlflow load.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlcompress.cli import complete, interrupt
from rlcompress.core.errors import UserError
from rlcompress.lock import check_movable

if TYPE_CHECKING:
    from rlcompress.stages import Run

Name = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT", help="A name that `ls` lists.", autocompletion=complete.names
    ),
]
File = Annotated[Path, typer.Option("--file", metavar="PATH", help="The experiments file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override an option; may be repeated.",
        autocompletion=complete.keys,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run folder.  [default: runs/EXPERIMENT]"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; the old run folder moves to DIR.1, DIR.2, …")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, for scripts; the rest goes to stderr.")
]
_SHORTS: dict[str, Any] = {
    "searcher": typer.Option(
        "--searcher", metavar="NAME", help="Short for --set search.searcher=NAME."
    ),
    "sensitivity": typer.Option(
        "--sensitivity",
        metavar="KIND",
        help="estimated, measured or refitted: short for --set search.sensitivity=KIND.",
    ),
}
FILE = Path("experiments.yaml")
#: Where run folders go without --out. A job's working folder is deleted behind it.
RUNS = "RLCOMPRESS_RUNS"


def open_run(
    name: str,
    file: Path,
    sets: Sequence[str] | None,
    out: Path | None,
    *,
    shorts: Mapping[str, str | None] | None = None,
    fresh: bool = False,
    begins: bool = False,
    as_json: bool = False,
) -> Run:
    """Validate first; only then load torch, and touch the disk. `begins`: work that takes a while;
    its first line does not wait for torch either."""
    from rlcompress import spec

    given = {short: value for short, value in (shorts or {}).items() if value}
    short = [spec.override(f"search.{key}", value) for key, value in given.items()]
    overrides = [*(sets or ()), *short]
    experiment = spec.resolve(spec.load_experiments(file), name, overrides)
    words = [] if file == FILE else ["--file", str(file)]
    # A short option as --set: every verb takes that.
    words += [word for text in overrides for word in ("--set", text)]
    words += ["--out", str(out)] if out else []
    folder = interrupt.folder = out or Path(os.environ.get(RUNS, "runs")).expanduser() / name
    check_folder(folder)
    if fresh and experiment.storage:
        raise UserError(
            f"--fresh: storage = {experiment.storage} keeps the old run and is not moved; name "
            "another place with --set storage=PLACE"
        )
    if fresh:
        check_movable(folder)
    if begins:
        line = f"{name} in {folder}; the libraries' messages go to {folder / 'log.txt'}"
        typer.echo(line, err=as_json)
        sys.stdout.flush()

    from rlcompress import stages

    return stages.Run(name, experiment, folder, words, fresh)


def check_folder(folder: Path) -> None:
    above = (folder.absolute(), *folder.absolute().parents)
    there = next(path for path in above if os.path.lexists(path))  # False where one may not look
    if there.is_symlink() and not os.path.exists(there):
        raise UserError(f"{folder}: {there} is a link to nowhere; name another with --out DIR")
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; name another folder with --out DIR")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: {there} cannot be written; name another with --out DIR")


def experiment_verb(
    *,
    begins: bool = False,
    fresh: bool = False,
    shorts: Sequence[str] = (),
    json: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb that takes a run becomes one that takes the command line's options for it:
    EXPERIMENT, --file, --set, --out, --fresh where starting over is meant, and the short
    options named. `begins`: see `open_run`. With `json` it is told too whether --json is given,
    as `as_json`."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def command(**given: Any) -> None:
            names = {short: given.pop(short) for short in shorts}
            told = {"as_json": given.pop("as_json")} if json else {}
            verb(open_run(**given, **told, shorts=names, begins=begins), **told)

        options: dict[str, tuple[Any, Any]] = {
            "name": (Name, inspect.Parameter.empty),
            "file": (File, FILE),
            "sets": (Sets, None),
            "out": (Out, None),
            **({"fresh": (Fresh, False)} if fresh else {}),
            **({"as_json": (AsJson, False)} if json else {}),
            **{short: (Annotated[str | None, _SHORTS[short]], None) for short in shorts},
        }
        # typer reads a command's options from its signature.
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    key, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default
                )
                for key, (kind, default) in options.items()
            ]
        )
        command.__annotations__ = {key: kind for key, (kind, _) in options.items()}
        return command

    return decorate
