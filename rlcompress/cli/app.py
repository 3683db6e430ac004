"""The application that verbs register with, and how it ends."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlcompress import __version__
from rlcompress.core.errors import OutsideError, UserError


class _Verbs(TyperGroup):
    """Ends a verb in plain lines and an exit code, where Python would show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except OutsideError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(3) from None
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
