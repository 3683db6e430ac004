"""The tickets that MLflow holds, of all experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from requests import RequestException  # type: ignore[import-untyped]
from sqlalchemy.exc import SQLAlchemyError

from rlcompress.core.errors import did_you_mean, first_line
from rlcompress.tracking.store import TrackingError, hidden, try_database

PREFIX = "rlcompress-"
#: Ids in an error.
_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """One ticket in MLflow. Accuracies are shares (0-1) on the test split.

    controls  arm -> accuracy;  champion  whether the registry's alias names it
    at_floor  whether it is at its experiment's accuracy floor on validation; None if not known
    lineage   what it came from: policy, commit, version, target, spec hash
    """

    id: str
    experiment: str
    searcher: str
    arm: str
    seed: int
    accuracy: float
    dense_accuracy: float
    bytes: int
    dense_bytes: int
    density: float
    controls: dict[str, float]
    champion: bool
    at_floor: bool | None
    created: str
    store: str
    run_id: str
    lineage: dict[str, str]


def stores(uri: str | None = None, root: Path = Path("runs")) -> list[str]:
    """`uri`, else MLFLOW_TRACKING_URI, else the databases of the run folders in `root`."""
    named = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return [named]
    return [f"sqlite:///{path.resolve()}" for path in sorted(root.glob("*/mlflow.db"))]


def find_tickets(uris: Sequence[str]) -> list[Found]:
    """All finished tickets, experiment by experiment, the densest first. Raises TrackingError
    where a store does not answer."""
    found: list[Found] = []
    for uri in uris:
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not path.is_file():
            raise TrackingError(f"MLflow at {uri}: no such file")  # SQLite would make one
        try:
            try_database(uri)
            found += _in_store(uri)
        except (MlflowException, SQLAlchemyError, RequestException) as error:
            raise TrackingError(hidden(f"MLflow at {uri}: {first_line(error)}")) from error
    return sorted(found, key=lambda t: (t.experiment, -t.density, t.id))


def show_ticket(uris: Sequence[str], name: str) -> tuple[Found, dict[str, Any]]:
    """A ticket by its id, or the beginning of it, and its schedule.

    Raises ValueError if none or several are called so."""
    everything = find_tickets(uris)
    mine = [t for t in everything if t.id == name] or [
        t for t in everything if t.id.startswith(name)
    ]
    if not mine:
        if not everything:
            where = ", ".join(map(hidden, uris)) if uris else "no runs/*/mlflow.db here"
            raise ValueError(f"ticket {name!r}: no tickets yet ({where})")
        ids = [t.id for t in everything]
        shown = ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" * (len(ids) > _SHOWN))
        raise ValueError(f"ticket {name!r}: not among {shown}{did_you_mean(name, ids)}")
    if len({(t.store, t.run_id) for t in mine}) > 1:
        which = ", ".join(f"{t.id} of {t.experiment}" for t in mine)
        raise ValueError(f"ticket {name!r}: {which}; name one, or its store with --uri")
    client = mlflow.MlflowClient(tracking_uri=mine[0].store)
    path = client.download_artifacts(mine[0].run_id, "schedule.json")
    return mine[0], json.loads(Path(path).read_text())


def _in_store(uri: str) -> list[Found]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = []
    for experiment in client.search_experiments(filter_string=f"name LIKE '{PREFIX}%'"):
        champion = _champion(client, experiment.name)
        token = None
        while True:
            page = client.search_runs(
                [experiment.experiment_id],
                "tags.`rlcompress.role` = 'ticket' and tags.`rlcompress.complete` = 'true'",
                page_token=token,
            )
            for run in page:
                found.append(_of(run, experiment.name.removeprefix(PREFIX), uri, champion))
            token = page.token
            if not token:
                break
    return found


def _champion(client: mlflow.MlflowClient, name: str) -> str | None:
    """The run that the alias names."""
    try:
        return str(client.get_model_version_by_alias(name, "champion").run_id)
    except MlflowException:
        return None  # nothing is registered yet


def _of(run: Any, experiment: str, uri: str, champion: str | None) -> Found:
    metrics, params = run.data.metrics, run.data.params
    controls = {
        name.split(".")[1]: value
        for name, value in metrics.items()
        if name.startswith("control.") and name.endswith(".accuracy")
    }
    lineage = ("policy", "commit", "version", "target", "spec_hash")
    return Found(
        id=params["id"],
        experiment=experiment,
        searcher=params["searcher"],
        arm=params["arm"],
        seed=int(params["seed"]),
        accuracy=metrics["accuracy"],
        dense_accuracy=metrics["dense.accuracy"],
        bytes=int(metrics["bytes"]),
        dense_bytes=int(metrics["dense.bytes"]),
        density=metrics["density"],
        controls=dict(sorted(controls.items())),
        champion=run.info.run_id == champion,
        at_floor={"True": True, "False": False}.get(run.data.tags.get("rlcompress.at_floor", "")),
        created=run.data.tags.get("rlcompress.created", ""),
        store=uri,
        run_id=run.info.run_id,
        lineage={name: params[name] for name in lineage if name in params},
    )
