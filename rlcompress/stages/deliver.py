"""Stages 4 and 5: ONNX files, MLflow, and what the terminal says at the end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlcompress.core.artifact import folded, load_artifact, read_artifact
from rlcompress.core.cost import CostModel
from rlcompress.core.errors import OutsideError, UserError
from rlcompress.core.export import export_onnx, latency, onnx_logits
from rlcompress.core.files import read_json, save_bytes, save_json
from rlcompress.core.schedule import Schedule
from rlcompress.core.train import logits_of
from rlcompress.live import console, stage
from rlcompress.report.card import below_floor, delivered, measure_of, model_card
from rlcompress.stages.workspace import Workspace

if TYPE_CHECKING:
    from rlcompress.tracking import Tracker

#: Largest share of images that a ticket and its model.onnx may answer otherwise; of few images one
#: may turn over a rounding.
OTHER_ANSWERS = 0.002
#: Of timing one batch size of one ticket.
LATENCY_SECONDS = 3.0


def export(run: Workspace, ticket: dict[str, Any]) -> list[Path]:
    """ONNX beside a ticket's packed artifact, checked against it in onnxruntime; the paths.

    `onnx.json` says of each file: bytes, container_bytes, difference (largest one of the logits,
    relative to the largest logit), and on the validation images that chose the ticket agreement
    (share with the artifact's answer) and validation_accuracy. Raises UserError if a network cannot
    be exported, or model.onnx's answers are not the ticket's.
    """
    folder, wanted = run.folder / "tickets" / ticket["id"], run.experiment.export
    source, about = folder / "weights.safetensors", folder / "onnx.json"
    kinds: list[tuple[str, Literal["float", "int8"]]] = []
    kinds += [("model.onnx", "float")] if wanted.onnx else []
    kinds += [("model.int8.onnx", "int8")] if wanted.int8 else []
    done, selection = delivered(folder)["onnx"], run.splits[2]
    for name, activations in kinds:
        if name in done and (folder / name).exists():
            continue
        packed = read_artifact(source, trust=[run.ref.factory])
        file = export_onnx(
            packed.model,
            packed.bits,
            packed.scales,
            run.fit.images() if activations == "int8" else run.splits[1].images(slice(0, 8)),
            folder / name,
            activations=activations,
        )
        answers_N = logits_of(packed.model, selection).argmax(1)
        exported_N = onnx_logits(file.path, selection.images()).argmax(1)
        agreement = float((exported_N == answers_N).float().mean())
        allowed = max(OTHER_ANSWERS, 1.5 / len(answers_N))
        if activations == "float" and 1 - agreement > allowed:
            file.path.unlink()
            raise UserError(
                f"{file.path}: in onnxruntime {agreement:.2%} of {len(answers_N)} validation "
                f"images get the ticket's answer (wanted {1 - allowed:.2%}); "
                "--set export.onnx=false"
            )
        done[name] = {
            "bytes": file.bytes,
            "container_bytes": file.container_bytes,
            "difference": file.difference,
            "agreement": agreement,
            "validation_accuracy": float((exported_N == selection.labels_N).float().mean()),
        }
        save_json(about, done)
    return [source, *(folder / name for name, _ in kinds)]


def finish_tickets(run: Workspace) -> None:
    """What is measured when nothing else runs: latencies; and the cards."""
    spec, command = run.experiment.model_dump(mode="json"), run.next("run")
    labelled = read_json(run.folder / "dense" / "metrics.json").get("labelled", True)
    folders = {ticket["id"]: run.folder / "tickets" / ticket["id"] for ticket in run.tickets()}
    untimed = {name: folder for name, folder in folders.items() if _untimed(run, folder)}
    if untimed:
        with stage("export", len(untimed)) as shown:
            for done, (name, folder) in enumerate(untimed.items(), start=1):
                _time(run, folder)
                shown.update(done, f"timed {name}")
    for ticket in run.tickets():
        folder = folders[ticket["id"]]
        _describe_layers(run, ticket, folder / "layers.json")
        card = model_card(ticket, run.name, spec, delivered(folder), command, labelled=labelled)
        save_bytes(folder / "card.md", card.encode())


def _untimed(run: Workspace, folder: Path) -> bool:
    """Whether a ticket has files that `latency.json` does not tell of."""
    path, files = folder / "latency.json", delivered(folder)["onnx"]
    done = read_json(path) if path.exists() else {}
    timed = (done.get(str(batch), {}) for batch in run.experiment.export.latency)
    return bool(files) and not all(times.keys() > files.keys() for times in timed)


def _time(run: Workspace, folder: Path) -> None:
    """`latency.json`: batch -> file -> milliseconds, one thread, dense and ticket in turns."""
    path, batches = folder / "latency.json", run.experiment.export.latency
    done = read_json(path) if path.exists() else {}
    files = {name: folder / name for name in delivered(folder)["onnx"]}
    files = {"dense": _dense_onnx(run), **files}
    shape = run.ref.input_shape
    for batch in batches:
        seconds = latency(list(files.values()), shape, batch, seconds=LATENCY_SECONDS)
        done[str(batch)] = {n: 1000 * s for n, s in zip(files, seconds, strict=True)}
    save_json(path, done)


def _describe_layers(run: Workspace, ticket: dict[str, Any], path: Path) -> None:
    """`layers.json`: what each layer costs, dense and in the ticket, in forward order."""
    if path.exists():
        return
    costs = CostModel(run.structure)
    before, after = map(costs.by_layer, (Schedule(), Schedule.from_dict(ticket["schedule"])))
    save_json(path, [{"name": n, "dense": before[n], "ticket": after[n]} for n in before])


def _dense_onnx(run: Workspace) -> Path:
    """The dense network, batch norms folded, in float32."""
    path = run.folder / "dense" / "model.onnx"
    if not path.exists():
        dense = folded(run.network("trained"), run.structure, run.ref)
        export_onnx(dense, {}, {}, run.splits[1].images(slice(0, 8)), path)
    return path


def _state(run: Workspace) -> dict[str, Any]:
    return {
        "uri": run.experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"),
        "spec_hash": run.hash,
        "inputs": _inputs(run),
        "records": len(run.archive()),
        "tickets": [[ticket["id"], ticket["inputs"]] for ticket in run.tickets()],
    }


def _inputs(run: Workspace) -> str:
    """All that records and tickets are made from: under the same options the files that they name,
    weights and a policy, may be others."""
    path, search = run.folder / "search" / "policies.json", run.experiment.search
    begun = read_json(path) if path.exists() else {}
    mine = {name: begun[name] for name in (search.searcher, *search.baselines) if name in begun}
    return f"{run.inputs.search} {json.dumps(mine, sort_keys=True)}"


def tracked(run: Workspace) -> bool:
    """Whether report and MLflow have all that the run folder holds (`tracked.json` says so)."""
    state, marker = _state(run), run.folder / "tracked.json"
    made = [run.folder / "report" / "index.html"]
    if state["uri"] is None:
        made.append(run.folder / "mlflow.db")
    return marker.exists() and read_json(marker) == state and all(path.exists() for path in made)


@contextlib.contextmanager
def tracker_of(run: Workspace) -> Iterator[Tracker]:
    """The run's tracker, whose parent run is ended behind, however that comes about. Raises
    OutsideError if MLflow does not answer."""
    from rlcompress.tracking import Tracker, TrackingError

    try:
        tracker = Tracker(
            run.folder,
            experiment=run.name,
            spec=run.experiment.model_dump(mode="json"),
            spec_hash=run.hash,
            inputs=_inputs(run),
            uri=run.experiment.tracking.uri,
        )
        try:
            yield tracker
        except BaseException as error:
            with contextlib.suppress(TrackingError):
                tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        tracker.finish()
    except TrackingError as error:
        raise OutsideError(
            f"{error}", f"all results are in {run.folder}; the same command tries MLflow again"
        ) from error


def track(run: Workspace) -> None:
    """Brings MLflow up to what the run folder holds. Raises OutsideError if it does not answer."""
    from rlcompress.tracking import UnexportableError

    with tracker_of(run) as tracker:
        tracker.log_dense(read_json(run.folder / "dense" / "metrics.json"))
        tracker.log_archive(run.archive())
        tickets = run.tickets()
        for ticket in tickets:
            tracker.log_ticket(run.folder / "tickets" / ticket["id"], ticket)
        best = run.folder / "tickets" / tickets[0]["id"] / "weights.safetensors"
        model = load_artifact(best, trust=[run.ref.factory])
        try:
            tracker.register(tickets[0], model, run.data.example())
        except UnexportableError as error:
            console.print(f"{error}; its files are logged, it is not in the registry")
        tracker.log_figures(run.folder / "report")
    save_json(run.folder / "tracked.json", _state(run))


def last_lines(run: Workspace) -> None:
    """Before -> after, where it lies, what next."""
    from rich.table import Table

    tickets = run.tickets()
    best = tickets[0]
    dense, small = best["dense"], best["ticket"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("test split", "dense", "ticket", ""):
        table.add_column(column, justify="left" if column == "test split" else "right")
    measure = measure_of(run.data.labelled)
    points = 100 * (small["accuracy"] - dense["accuracy"])
    accuracies = (f"{dense['accuracy']:.2%}", f"{small['accuracy']:.2%}")
    densities = (f"{dense['density']:.1f}", f"{small['density']:.1f}")
    # A dense network that is always wrong has none.
    times = f"{small['density'] / dense['density']:.1f}x" if dense["density"] else ""
    rows = [
        (measure, *accuracies, f"{points:+.2f} points"),
        ("bytes on disk", *_fewer(dense, small, "bytes")),
        ("MACs", *_fewer(dense, small, "macs")),
        ("density, %/MB", *densities, times),
    ]
    rows += _runtime_rows(run.folder / "tickets" / best["id"], run.folder / "dense" / "model.onnx")
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
    if (page := run.folder / "report" / "index.html").exists():
        console.print(f"report   {page}")
    trust = f", trust=['{run.ref.factory}']" if ":" in run.ref.factory else ""
    console.print(
        'next     python -c "from rlcompress.core.artifact import load_artifact; '
        f"print(load_artifact('{folder / 'weights.safetensors'}'{trust}))\""
    )
    if short := below_floor(best):
        console.print(short)


def _runtime_rows(folder: Path, dense: Path) -> list[tuple[str, str, str, str]]:
    """model.onnx against the dense network's: bytes, and milliseconds a batch."""
    found = delivered(folder)
    if "model.onnx" not in found["onnx"] or not dense.exists():
        return []
    sizes = {"bytes": dense.stat().st_size}, {"bytes": found["onnx"]["model.onnx"]["bytes"]}
    rows = [("bytes as ONNX", *_fewer(*sizes, "bytes"))]
    for batch, times in found["latency"].items():
        before, after = times["dense"], times.get("model.onnx")
        if after is not None:
            said = f"{before / after:.2f}x as fast"
            rows.append((f"ms, batch {batch}", f"{before:.2f}", f"{after:.2f}", said))
    return rows


def _fewer(dense: dict[str, int], small: dict[str, int], name: str) -> tuple[str, str, str]:
    return f"{dense[name]:,}", f"{small[name]:,}", f"{dense[name] / small[name]:.1f}x fewer"
