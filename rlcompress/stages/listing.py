"""What `rlcompress tickets` prints: tickets of all experiments, as MLflow holds them."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from rlcompress.core.errors import OutsideError, UserError
from rlcompress.live import console
from rlcompress.tracking import Found, TrackingError, find_tickets, show_ticket, stores


def list_tickets(uri: str | None, *, as_json: bool) -> None:
    """A table, or JSON. Raises UserError where a store does not answer."""
    places = stores(uri)
    try:
        found = find_tickets(places)
    except TrackingError as error:
        raise OutsideError(str(error)) from error
    if as_json:
        console.print_json(json.dumps([asdict(t) for t in found]))
        return
    if not found:
        where = ", ".join(places) if places else "no runs/*/mlflow.db here"
        raise UserError(f"no ticket yet ({where}); rlcompress run EXPERIMENT makes them")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ticket", "experiment", "arm"):
        table.add_column(name, no_wrap=True)
    for name in ("seed", "test", "points", "bytes", "fewer", "%/MB", "best control"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in found:
        table.add_row(
            f"{t.id}{' *' if t.champion else ''}{' !' if t.at_floor is False else ''}",
            t.experiment,
            t.arm,
            str(t.seed),
            f"{t.accuracy:.2%}",
            f"{100 * (t.accuracy - t.dense_accuracy):+.2f}",
            f"{t.bytes:,}",
            f"{t.dense_bytes / t.bytes:.1f}x",
            f"{t.density:.1f}",
            _best_control(t),
        )
    console.print(table)
    if any(t.champion for t in found):
        console.print("* champion of its experiment: the densest at the accuracy floor")
    if any(t.at_floor is False for t in found):
        console.print("! below the accuracy floor of its experiment (ticket.floor), on validation")


def _best_control(t: Found) -> str:
    if not t.controls:
        return ""
    name, accuracy = max(t.controls.items(), key=lambda item: item[1])
    return f"{name} {accuracy:.2%}"


def print_ticket(name: str, uri: str | None, *, as_json: bool) -> None:
    """One ticket with its lineage and schedule. Raises UserError unless `name` means one."""
    try:
        t, schedule = show_ticket(stores(uri), name)
    except TrackingError as error:
        raise OutsideError(str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        console.print_json(json.dumps({**asdict(t), "schedule": schedule}))
        return
    points = 100 * (t.accuracy - t.dense_accuracy)
    floor: dict[bool | None, str] = {
        True: ", at the floor",
        False: ", below the floor (ticket.floor, on validation)",
    }
    rows = {
        "ticket": t.id + (" (champion)" if t.champion else ""),
        "experiment": t.experiment,
        "test": f"{t.accuracy:.2%}, dense {t.dense_accuracy:.2%}, {points:+.2f} points"
        + floor.get(t.at_floor, ""),
        "bytes": f"{t.bytes:,}, {t.dense_bytes / t.bytes:.1f}x fewer, {t.density:.1f} %/MB",
        "arm": t.arm,
        "controls": ", ".join(f"{n} {a:.2%}" for n, a in t.controls.items()),
        "searcher": t.searcher,
        "seed": str(t.seed),
        **{name.replace("_", " "): value for name, value in t.lineage.items()},
        "mlflow": f"run {t.run_id} at {t.store}",
        "keep": json.dumps(schedule["keep"]),
        "bits": json.dumps(schedule["bits"]),
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        console.print(f"{key:<{width}}  {value}", soft_wrap=True, highlight=False)
