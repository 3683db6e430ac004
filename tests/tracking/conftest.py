"""An MLflow on SQLite in tmp_path, and what is logged there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from rlcompress.core.schedule import Measurement, Record, Schedule, performance_density
from rlcompress.tracking import Tracker

SPEC = {
    "model": {"factory": "vgg19", "args": {"width": 0.25}},
    "search": {"target": [8, 60]},
    "ticket": {"floor": 1.0},
}


def measurement(accuracy: float, size: int, kl: float = 0.1) -> dict[str, Any]:
    density = performance_density(accuracy, size)
    return Measurement(accuracy, 0.5, kl, size, 1000, 5000, 160_000, density).to_dict()


def record(searcher: str, evaluation: int, accuracy: float, size: int) -> Record:
    measured = Measurement.from_dict(measurement(accuracy, size))
    schedule = Schedule({"a": 0.5}, {"a": 4})
    return Record(schedule, measured, searcher, seed=0, evaluation=evaluation)


def make_ticket(name: str, accuracy: float = 0.92, size: int = 50_000) -> dict[str, Any]:
    curve = [
        {"step": s, "loss": 1 / (s + 1), "validation_accuracy": 0.9 + s / 1000} for s in (0, 9)
    ]
    return {
        "id": name,
        "searcher": "ppo",
        "schedule": {"keep": {"a": 0.5}, "bits": {"a": 4}},
        "dense": measurement(0.925, 3_000_000),
        "ticket": measurement(accuracy, size),
        "arm": "rewind",
        "controls": {"reconstructed": measurement(0.91, size), "fresh": measurement(0.8, size)},
        "validation": {"dense": 0.925, "rewind": accuracy, "fresh": 0.8},
        "floor": 1.0,
        "input": {"shape": [1, 8, 8], "mean": 0.0, "std": 1.0},
        "curves": {"rewind": curve, "fresh": curve},
        "seed": 0,
        "spec_hash": "abc",
        "inputs": "in",
        "split": "test",
        "target": None,
        "ratio": 60.0,
        "search": measurement(0.918, size),
    }


#: What `Net` takes.
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables: made once, copied for each test."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run(fresh: Path, empty_database: Path) -> Path:
    """A run folder whose mlflow.db has tables and no runs."""
    shutil.copy(empty_database, fresh / "mlflow.db")
    return fresh


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder without a database, and an empty current folder that must stay empty."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, elsewhere = tmp_path / "runs" / "demo", tmp_path / "elsewhere"
    (folder / "search").mkdir(parents=True)
    (folder / "search" / "dense.json").write_text(json.dumps(measurement(0.93, 3_000_000)))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield folder
    assert list(elsewhere.iterdir()) == []


def open_tracker(run: Path, **changes: Any) -> Tracker:
    about = {"experiment": "demo", "spec": SPEC, "spec_hash": "abc", "inputs": "in"}
    return Tracker(run, **about | changes)


def write_ticket(run: Path, ticket: dict[str, Any]) -> Path:
    folder = run / "tickets" / ticket["id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ticket.json").write_text(json.dumps(ticket))
    (folder / "weights.safetensors").write_bytes(b"weights")
    return folder
