"""`rlcompress tickets`: what MLflow holds."""

from __future__ import annotations

from typing import Annotated

import typer

from rlcompress.cli.app import app
from rlcompress.cli.options import AsJson

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


@tickets_app.callback()
def tickets(ctx: typer.Context, uri: Uri = None, as_json: AsJson = False) -> None:
    """List the tickets that MLflow holds: bytes, accuracy, density, controls.

    \b
    rlcompress tickets
    rlcompress tickets show ppo-1a2b3c4d
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = (uri, as_json)  # said before the subcommand, they hold for it
        return
    from rlcompress.stages.listing import list_tickets

    list_tickets(uri, as_json=as_json)


@tickets_app.command("show")
def tickets_show(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="ID", help="Its id, or how it begins.")],
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Print one ticket: figures, controls, what it came from, its schedule.

    \b
    rlcompress tickets show ppo-1a2b3c4d
    """
    from rlcompress.stages.listing import print_ticket

    before_uri, before_json = ctx.obj
    print_ticket(name, uri or before_uri, as_json=as_json or before_json)
