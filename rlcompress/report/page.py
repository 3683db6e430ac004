"""The report of a run: figures as PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from rlcompress.core.files import read_archive, read_lines, save_bytes
from rlcompress.core.pareto import archive_front, best_at_floor
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.report import depth, figures
from rlcompress.report.card import below_floor, delivered, measure_of, points
from rlcompress.schema import Experiment, spec_hash

_LIBRARIES = ("rlcompress", "torch", "ray", "gymnasium", "mlflow", "numpy", "onnxruntime")
_BASELINE = "uniform"


@dataclass(frozen=True)
class Shown:
    """What a report is of, beside the search that is in the run folder.

    command  makes the run, and goes on with it
    tickets  contents of ticket.json, of these very options, the best first
    dynamic  that of dynamic/ticket.json; None without one
    seeds    run folder -> its best ticket, of runs that differ in nothing but the seed
    """

    name: str
    experiment: Experiment
    command: str
    tickets: Sequence[dict[str, Any]] = ()
    dynamic: Mapping[str, Any] | None = None
    seeds: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def write_report(run: Path, shown: Shown) -> Path:
    """Write `run`/report: index.html and the figures as PNG at 200 dpi; the page's path.

    Reads what the search left in the run folder, and what lies beside the tickets. The same
    inputs give the same bytes. Raises FileNotFoundError, naming the file and the command that
    makes it, if the search has not been run.
    """
    folder = run / "report"
    page, drawn = _assemble(run, shown)
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        save_bytes(folder / f"{name}.png", figures.to_png(figure))
    save_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _assemble(run: Path, shown: Shown) -> tuple[str, dict[str, Figure]]:
    def needed(name: str) -> Path:
        path = run / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; `{shown.command}` makes it")
        return path

    records = read_archive(needed("search/archive.jsonl"))
    dense = Measurement.from_dict(_json(needed("search/dense.json")))
    training = _json(needed("dense/metrics.json"))
    layers = _json(needed("search/layers.json"))
    spec = shown.experiment.model_dump(mode="json")
    floor = shown.experiment.ticket.floor
    main, baseline = _chosen(shown.tickets)
    dynamic = shown.dynamic
    # Earlier versions did not note it.
    labelled = bool(training.get("labelled", True))
    measure = measure_of(labelled)
    searched = measure_of(labelled and shown.experiment.calibration.labels)
    costs = _optional(run / "tickets" / main["id"] / "layers.json", []) if main else []

    chosen = [ticket for ticket in (main, baseline) if ticket is not None]
    drawn = {"front": figures.front_figure(records, dense, chosen, searched)}
    if main is not None:
        drawn["arms"] = figures.arms_figure([main, *shown.seeds.values()], measure)
        drawn["schedule"] = depth.schedule_figure(Schedule.from_dict(main["schedule"]), layers)
    if costs:
        drawn["layers"] = depth.layers_figure(costs)
    if curve := read_lines(run / "search" / "curve.jsonl"):
        drawn["learning"] = figures.learning_figure(curve)
    if dynamic:
        drawn["dynamic"] = depth.dynamic_figure(dynamic["decisions"])
    drawn["training"] = figures.training_figure(training, main, measure)
    svg = {name: figures.to_svg(figure, name) for name, figure in drawn.items()}

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=figures.size, count=figures.count, percent=lambda accuracy: f"{100 * accuracy:.2f}"
    )
    html = environment.get_template("page.html.j2").render(
        experiment=shown.name,
        spec=spec,
        spec_hash=spec_hash(shown.experiment),
        command=shown.command,
        main=main,
        short=below_floor(main) if main else "",
        tickets=[(ticket, Measurement.from_dict(ticket["ticket"])) for ticket in shown.tickets],
        compared=_compared(main, baseline),
        delivered=delivered(run / "tickets" / main["id"]) if main else {"onnx": {}},
        arms=figures.arm_measurements(main) if main is not None else {},
        searchers=_searchers(records, dense, floor),
        dense=dense,
        margin=points(floor),
        labelled=labelled,
        measure=measure,
        searched=searched,
        evaluations=len(records),
        svg=svg,
        script=(Path(__file__).parent / "page.js").read_text(encoding="utf-8"),
        front=_front_data(
            records, dense, layers, figures.front_places(drawn["front"], records), searched
        ),
        costs=costs,
        dynamic=dynamic,
        seeds=shown.seeds,
        resolved=yaml.safe_dump(spec, sort_keys=False),
        versions=_versions(),
    )
    return html, drawn


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _optional(path: Path, default: Any) -> Any:
    return _json(path) if path.is_file() else default


def _front_data(
    records: list[Record],
    dense: Measurement,
    layers: list[dict[str, Any]],
    places: list[list[float | None]],
    measure: str,
) -> str:
    """JSON for the page's script, safe inside a script element."""
    names = figures.searchers(records)
    rows = []
    for record, place in zip(records, places, strict=True):
        m, schedule = record.measurement, record.schedule
        rows.append(
            {
                "searcher": names.index(record.searcher),
                "evaluation": record.evaluation,
                "accuracy": f"{100 * m.accuracy:.2f} %",
                "kl": f"{m.kl:.2g}",
                "bytes": f"{m.bytes:,}",
                "ratio": f"{dense.bytes / m.bytes:.3g}{figures.TIMES}",
                "macs": figures.count(m.macs),
                "place": place,
                "keep": [round(schedule.ratio(layer["group"]), 2) for layer in layers],
                "bits": [schedule.width(layer["name"]) for layer in layers],
            }
        )
    content = {
        "measure": measure,
        "searchers": names,
        "layers": [layer["name"] for layer in layers],
        "points": rows,
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _chosen(
    tickets: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The searcher's best ticket, and the best of the uniform baseline."""
    main = next(iter(tickets), None)
    others = (ticket for ticket in tickets if ticket["searcher"] == _BASELINE)
    if main is None or main["searcher"] == _BASELINE:
        return main, None
    return main, next(others, None)


def _compared(
    main: dict[str, Any] | None, baseline: dict[str, Any] | None
) -> list[tuple[str, Measurement, float]]:
    """Columns of the first table: name, measurement on the ticket's split, size ratio."""
    if main is None:
        return []
    columns = [("dense", Measurement.from_dict(main["dense"]), 1.0)]
    for ticket in (main, baseline):
        if ticket is not None:
            measured = Measurement.from_dict(ticket["ticket"])
            columns.append((f"{ticket['searcher']} ticket", measured, float(ticket["ratio"])))
    return columns


def _searchers(records: list[Record], dense: Measurement, floor: float) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(figures.searchers(records)):
        mine = [record for record in records if record.searcher == name]
        best = best_at_floor(mine, dense.accuracy - floor / 100)
        rows.append(
            {
                "name": name,
                "series": i % len(figures.SERIES),
                "evaluations": len(mine),
                "front": len(archive_front(mine)),
                "best": best.measurement if best else None,
                "ratio": dense.bytes / best.measurement.bytes if best else None,
            }
        )
    return rows


def _versions() -> dict[str, str]:
    installed = {
        dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()
    }
    versions = {"Python": platform.python_version()}
    return versions | {name: installed[name] for name in _LIBRARIES if name in installed}
