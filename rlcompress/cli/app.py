"""The application that verbs register with, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rlcompress import __version__
from rlcompress.core.errors import OutsideError, UserError


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a spot machine's end, a scheduler and `ray job stop` send."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """In here the first SIGTERM ends the work as Ctrl-C does; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Verbs(TyperGroup):
    """Ends a verb in plain lines and an exit code, where Python would show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except UserError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _to_go_on(f"{error.filename or 'disk'}: {error.strerror}; free some first.")
            raise typer.Exit(2) from None
        except _Terminated:
            _to_go_on("\nStopped by SIGTERM.")
            raise typer.Exit(143) from None
        except OutsideError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(3) from None
        except KeyboardInterrupt:
            _to_go_on("\nInterrupted.")
            raise typer.Exit(130) from None


def _to_go_on(why: str) -> None:
    # With --fresh the same command would start over instead of going on.
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    typer.echo(f"{why} What is measured is kept; to go on:", err=True)
    typer.echo(f"  rlcompress {shlex.join(words)}", err=True)


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
