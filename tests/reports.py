"""A run folder as a report finds it, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcompress.core.pareto import ticket_rank
from rlcompress.core.schedule import Measurement, Record, Schedule, performance_density
from rlcompress.report.card import model_card
from rlcompress.report.page import Shown, write_report
from rlcompress.schema import Experiment

SPEC = {
    "model": {"factory": "vgg19", "args": {"width": 0.25}},
    "data": {"factory": "digits", "args": {"size": 32}},
    "ticket": {"floor": 1.0},
    "seed": 7,
}
EXPERIMENT = Experiment.model_validate(SPEC)
LAYERS = [
    {"name": "conv", "kind": "conv", "group": "conv"},
    {"name": "dw", "kind": "depthwise", "group": "conv"},
    {"name": "head", "kind": "linear", "group": "head"},
]
PNG = b"\x89PNG\r\n\x1a\n"


def measurement(accuracy: float, size: int) -> Measurement:
    density = performance_density(accuracy, size)
    return Measurement(accuracy, 0.5, 1 - accuracy, size, size // 4, size, size * 8, density)


DENSE = measurement(0.93, 4_000_000)


def record(searcher: str, evaluation: int, accuracy: float, size: int) -> Record:
    return Record(Schedule({"conv": 0.5}), measurement(accuracy, size), searcher, 0, evaluation)


RECORDS = [
    record("ppo", 1, 0.925, 100_000),
    record("ppo", 2, 0.921, 61_200),
    record("ppo", 3, 0.60, 20_000),
    record("uniform", 1, 0.924, 222_000),
    record("random", 1, 0.11, 90_000),
]


def make_ticket(name: str, searcher: str, accuracy: float, size: int) -> dict[str, Any]:
    curve = [{"step": s, "loss": 1.0, "validation_accuracy": 0.9} for s in (0, 10)]
    return {
        "id": name,
        "searcher": searcher,
        "schedule": {"keep": {"conv": 0.5}, "bits": {"conv": 3, "head": 6}},
        "dense": measurement(0.928, 4_000_000).to_dict(),
        "ticket": measurement(accuracy, size).to_dict(),
        "arm": "rewind",
        "controls": {"fresh": measurement(0.8123, size).to_dict()},
        "validation": {"dense": 0.928, "rewind": accuracy, "fresh": 0.8},
        "floor": 1.0,
        "input": {"shape": [1, 32, 32], "mean": 4.88, "std": 6.02},
        "curves": {"rewind": curve, "fresh": curve},
        "seed": 7,
        "spec_hash": "0123abcd",
        "split": "test",
        "target": 60.0,
        "ratio": 4_000_000 / size,
        "search": measurement(0.9, size).to_dict(),
    }


PPO = make_ticket("aaaa1111", "ppo", 0.9234, 61_000)
UNIFORM = make_ticket("bbbb2222", "uniform", 0.9211, 200_000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after its search, without tickets."""
    folder = tmp_path / "demo"
    (folder / "search").mkdir(parents=True)
    (folder / "dense").mkdir()
    curve = [{"epoch": 1, "step": 5, "loss": 0.5, "validation_accuracy": 0.9}]
    dense = {"inputs": "x", "seed": 7, "seconds": 1.0, "curve": curve}
    (folder / "dense" / "metrics.json").write_text(
        json.dumps(dense | {"validation": DENSE.to_dict()})
    )
    (folder / "search" / "dense.json").write_text(json.dumps(DENSE.to_dict()))
    (folder / "search" / "layers.json").write_text(json.dumps(LAYERS))
    lines = "".join(r.to_json() + "\n" for r in RECORDS)
    (folder / "search" / "archive.jsonl").write_text(lines)
    return folder


def add(run: Path, *tickets: dict[str, Any]) -> Path:
    for ticket in tickets:
        folder = run / "tickets" / ticket["id"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ticket.json").write_text(json.dumps(ticket))
    return run


COMMAND = "rlcompress run demo --set seed=7 --file 'my experiments.yaml' --out elsewhere"


def card(
    ticket: dict[str, Any], delivered: dict[str, Any] | None = None, *, labelled: bool = True
) -> str:
    """The card of a ticket; without files in ONNX, if none are given."""
    files = delivered or {"onnx": {}, "latency": {}}
    return model_card(ticket, "demo", SPEC, files, COMMAND, labelled=labelled)


def write(run: Path, **changes: Any) -> Path:
    """The report of all tickets in the run folder, those of a searcher before `uniform`'s."""
    found = [json.loads(path.read_text()) for path in run.glob("tickets/*/ticket.json")]
    found.sort(key=lambda t: (t["searcher"] != "uniform", ticket_rank(t)), reverse=True)
    about = {"command": COMMAND, "tickets": found} | changes
    return write_report(run, Shown(**{"name": "demo", "experiment": EXPERIMENT, **about}))
