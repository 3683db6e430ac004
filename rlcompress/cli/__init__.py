"""The command line: verbs only. Importing a module of verbs registers them.

Everything but typer is imported inside a verb, so that `--help` is instant and a mistake in
an experiment is told before torch, ray or mlflow load.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlcompress.cli import compress, experiment, overview, submit, tickets  # noqa: F401
from rlcompress.cli.app import app


def main(args: Sequence[str] | None = None) -> None:
    """The console entry. Ends in SystemExit: 0, 2 on a user's mistake, 3 where the world outside
    failed, 130 when interrupted, 143 on SIGTERM."""
    app(args=args, prog_name="rlcompress")
