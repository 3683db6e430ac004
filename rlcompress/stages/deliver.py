"""Stages 4 and 5: ONNX files, MLflow, and what the terminal says at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlcompress.core.artifact import load_artifact
from rlcompress.core.errors import UserError
from rlcompress.core.export import export_onnx
from rlcompress.core.files import save_json
from rlcompress.live import console
from rlcompress.stages.workspace import Workspace


def export(run: Workspace, ticket: dict[str, Any]) -> list[Path]:
    """ONNX beside a ticket's packed artifact, checked against it in onnxruntime; the paths."""
    folder = run.folder / "tickets" / ticket["id"]
    source, target = folder / "weights.safetensors", folder / "model.onnx"
    if not run.experiment.export.onnx:
        return [source]
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        model = load_artifact(source, trust=[run.ref.factory])
        export_onnx(model, run.splits[1].images(slice(0, 8)), target)
    return [source, target]


def _state(run: Workspace) -> dict[str, Any]:
    return {
        "uri": run.experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"),
        "spec_hash": run.hash,
        "records": len(run.archive()),
        "tickets": [ticket["id"] for ticket in run.tickets()],
    }


def tracked(run: Workspace) -> bool:
    """Whether report and MLflow have all that the run folder holds (`tracked.json` says so)."""
    state, marker = _state(run), run.folder / "tracked.json"
    made = [run.folder / "report" / "index.html"]
    if state["uri"] is None:
        made.append(run.folder / "mlflow.db")
    return (
        marker.exists()
        and json.loads(marker.read_text()) == state
        and all(path.exists() for path in made)
    )


def track(run: Workspace) -> None:
    """Brings MLflow up to what the run folder holds. Raises UserError if it does not answer."""
    from rlcompress.tracking import Tracker, TrackingError

    try:
        tracker = Tracker(
            run.folder,
            experiment=run.name,
            spec=run.experiment.model_dump(mode="json"),
            spec_hash=run.hash,
            uri=run.experiment.tracking.uri,
        )
        tracker.log_dense(json.loads((run.folder / "dense" / "metrics.json").read_text()))
        tracker.log_archive(run.archive())
        tickets = run.tickets()
        for ticket in tickets:
            tracker.log_ticket(run.folder / "tickets" / ticket["id"], ticket)
        best = run.folder / "tickets" / tickets[0]["id"] / "weights.safetensors"
        model = load_artifact(best, trust=[run.ref.factory])
        tracker.register(tickets[0], model, run.data.example())
        tracker.log_figures(run.folder / "report")
        tracker.finish()
        save_json(run.folder / "tracked.json", _state(run))
    except TrackingError as error:
        raise UserError(
            f"{error}", f"all results are in {run.folder}; the same command tries MLflow again"
        ) from error


def last_lines(run: Workspace) -> None:
    """Before -> after, where it lies, what next."""
    from rich.table import Table

    tickets = run.tickets()
    best = tickets[0]
    dense, small = best["dense"], best["ticket"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("test split", "dense", "ticket", ""):
        table.add_column(column, justify="left" if column == "test split" else "right")
    points = 100 * (small["accuracy"] - dense["accuracy"])
    accuracies = (f"{dense['accuracy']:.2%}", f"{small['accuracy']:.2%}")
    densities = (f"{dense['density']:.1f}", f"{small['density']:.1f}")
    rows = [
        ("accuracy", *accuracies, f"{points:+.2f} points"),
        ("bytes on disk", *_fewer(dense, small, "bytes")),
        ("MACs", *_fewer(dense, small, "macs")),
        ("density, %/MB", *densities, f"{small['density'] / dense['density']:.1f}x"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    controls = "  ".join(f"{n} {m['accuracy']:.2%}" for n, m in best["controls"].items())
    console.print(f"exported: {best['arm']} (best on validation); controls on test: {controls}")
    for other in tickets[1:]:
        m = other["ticket"]
        console.print(
            f"{other['searcher']} ({other['id']}, same retraining): {m['accuracy']:.2%} at "
            f"{m['bytes']:,} bytes, {other['ratio']:.1f}x, {m['density']:.1f} %/MB"
        )
    folder = run.folder / "tickets" / best["id"]
    console.print(f"ticket   {folder / 'weights.safetensors'}")
    console.print(f"report   {run.folder / 'report' / 'index.html'}")
    trust = f", trust=['{run.ref.factory}']" if ":" in run.ref.factory else ""
    console.print(
        'next     python -c "from rlcompress.core.artifact import load_artifact; '
        f"print(load_artifact('{folder / 'weights.safetensors'}'{trust}))\""
    )


def _fewer(dense: dict[str, int], small: dict[str, int], name: str) -> tuple[str, str, str]:
    return f"{dense[name]:,}", f"{small[name]:,}", f"{dense[name] / small[name]:.1f}x fewer"
