"""The application that verbs register with, and how it ends."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlcompress import __version__
from rlcompress.cli import interrupt
from rlcompress.core.errors import UserError, outside

EXIT_CODES = (
    "Exit codes: 0 done; 2 a mistake in what was asked; 3 the outside world does not answer "
    "(cluster, MLflow, disk, network); 130 interrupted; 143 stopped by SIGTERM; 1 a bug, with its "
    "traceback."
)


class _Verbs(TyperGroup):
    """Ends a verb in plain lines and an exit code, where Python would show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with interrupt.ending_in_time():
            try:
                return super().invoke(ctx)
            except UserError as error:
                told = error
            except OSError as error:
                if (found := outside(error, interrupt.folder)) is None:
                    raise
                told = found
        typer.echo(str(told), err=True)
        raise typer.Exit(told.exit_code)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
