"""MLflow: a parent run for an experiment, a child run for a ticket, a version for a model.

Every call asks MLflow what is there already and adds what is missing, so calling it twice, or again
after a crash, doubles nothing. It keeps no global state: neither the active run nor MLflow's
tracking URI is touched.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import mlflow
import mlflow.pytorch
import torch
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from requests import RequestException  # type: ignore[import-untyped]
from sqlalchemy.exc import SQLAlchemyError

from rlcompress.core.errors import first_line
from rlcompress.core.files import save_json
from rlcompress.core.pareto import ticket_rank
from rlcompress.core.schedule import Measurement, Record
from rlcompress.tracking.champion import crown
from rlcompress.tracking.graph import save_pt2
from rlcompress.tracking.store import (
    TrackingError,
    UnexportableError,
    hidden,
    make_database,
    try_database,
)

_ADVICE = "MLFLOW_TRACKING_URI names another; unset, the run folder is used"
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100  # MLflow's limits

P = ParamSpec("P")
T = TypeVar("T")
Plain = Mapping[str, Any]  # the content of a JSON or YAML file
Row = tuple[str, int, float]  # metric, step, value


def clear(method: Callable[Concatenate[Tracker, P], T]) -> Callable[Concatenate[Tracker, P], T]:
    """Turn what MLflow, its database or its server raise into one `TrackingError`."""

    @functools.wraps(method)
    def call(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except (MlflowException, SQLAlchemyError, RequestException) as error:
            reason = first_line(error)
            raise self._error(f"{reason} ({_ADVICE})") from error

    return call


class Tracker:
    """One MLflow parent run an experiment, a child run a ticket.

    run         the experiment's run folder; `mlflow.json` in it names the run for good
    experiment  names the MLflow experiment and the registered model: rlcompress-<experiment>
    spec        the resolved experiment, nested; becomes the parent's params and spec.yaml
    spec_hash   another hash in the same folder is another parent run
    inputs      what the options alone do not say, such as the content of a file that they name: so
                are other inputs
    uri         MLflow's tracking URI; None takes MLFLOW_TRACKING_URI or, without it,
                mlflow.db and mlartifacts/ inside the run folder

    Every method, this one included, raises TrackingError when MLflow does not answer.
    """

    @clear
    def __init__(
        self,
        run: Path,
        *,
        experiment: str,
        spec: Plain,
        spec_hash: str,
        inputs: str,
        uri: str | None = None,
    ) -> None:
        self.run = run.resolve()
        self.run.mkdir(parents=True, exist_ok=True)
        embedded = f"sqlite:///{self.run / 'mlflow.db'}"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded
        self.name = f"rlcompress-{experiment}"
        self._floor = float(spec["ticket"]["floor"])
        self._histories: dict[tuple[str, str], dict[int, float]] = {}
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])

        if self.uri == embedded:
            make_database(self.run / "mlflow.db")
        try_database(self.uri)
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.experiment_id = self._find_experiment()
        run_id = _run_id(self.run / "mlflow.json")
        self._tags = {
            "rlcompress.run_id": run_id,
            "rlcompress.spec_hash": spec_hash,
            "rlcompress.inputs": digest(inputs),
        }
        tags = {**self._tags, "rlcompress.role": "experiment"}
        self.parent_id = self._find_or_create(tags, experiment)
        self.client.update_run(self.parent_id, status="RUNNING")
        params = {"experiment": experiment, "spec_hash": spec_hash, **_flat(spec)}
        self.log_params(self.parent_id, params)
        self.client.log_dict(self.parent_id, dict(spec), "spec.yaml")

    @clear
    def log_dense(self, metrics: Plain) -> None:
        """Log `dense/metrics.json`: its curve by step, its last measurement, seed and inputs."""
        params = {f"dense.{name}": metrics[name] for name in ("inputs", "seed")}
        self.log_params(self.parent_id, params)
        values = _measured("dense.", metrics["validation"]) | {"dense.seconds": metrics["seconds"]}
        self._log_metrics(self.parent_id, _curve("dense/", metrics["curve"]), values)

    @clear
    def log_archive(self, records: Sequence[Record]) -> None:
        """Log the records that MLflow does not have, by step = evaluation.

        A searcher's metrics are <searcher>/accuracy (0-1), /kl (nats), /bytes, /density, and
        /best_density: the highest density so far at an accuracy of at least the dense
        network's minus `ticket.floor`. Raises FileNotFoundError without search/dense.json.
        """
        path = self.run / "search" / "dense.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the search measures the dense network")
        floor = Measurement.from_dict(json.loads(path.read_text())).accuracy - self._floor / 100
        rows: list[Row] = []
        for searcher in sorted({record.searcher for record in records}):
            known = self._history(self.parent_id, f"{searcher}/best_density")
            last, best = max(known, default=0), max(known.values(), default=0.0)
            mine = [record for record in records if record.searcher == searcher]
            for record in sorted(mine, key=lambda r: r.evaluation):
                step, measured = record.evaluation, record.measurement
                for name in ("accuracy", "kl", "bytes", "density"):
                    rows.append((f"{searcher}/{name}", step, getattr(measured, name)))
                if step > last and measured.accuracy >= floor:
                    best = max(best, measured.density)
                if step > last and best > 0.0:
                    rows.append((f"{searcher}/best_density", step, best))
        self._log_metrics(self.parent_id, rows)

    @clear
    def log_trial(
        self, number: int, options: Plain, records: Sequence[Record], hypervolume: float
    ) -> None:
        """Log a trial of `tune` as a child run: its options, its records by step = evaluation."""
        run = self.child("trial", f"trial {number}", {"rlcompress.trial": json.dumps(options)})
        self.log_params(run, options)
        rows = [
            (name, record.evaluation, getattr(record.measurement, name))
            for record in sorted(records, key=lambda r: r.evaluation)
            for name in ("accuracy", "kl", "bytes", "density")
        ]
        self._log_metrics(run, rows, {"hypervolume": hypervolume})
        self.client.set_terminated(run, "FINISHED")

    @clear
    def log_ticket(self, folder: Path, ticket: Plain) -> None:
        """Log a ticket as a child run: params, metrics, curves and files.

        folder  tickets/<id>; all its files become artifacts
        ticket  the content of its ticket.json
        """
        child = self._child(ticket)
        # A tag: another floor later on makes no other ticket.
        self.client.set_tag(child, "rlcompress.at_floor", str(ticket_rank(ticket)[0]))
        if "rlcompress.complete" in self.client.get_run(child).data.tags:
            return
        names = ("id", "searcher", "arm", "seed", "spec_hash", "target", "split")
        params = {name: ticket[name] for name in names} | dict(ticket.get("lineage", {}))
        self.log_params(child, params)
        for arm in (ticket["arm"], *ticket["controls"]):
            self._log_arm(child, ticket, arm)
        curves = [
            row for arm, points in ticket["curves"].items() for row in _curve(f"{arm}/", points)
        ]
        self._log_metrics(child, curves, _ticket_values(ticket))
        self.client.log_artifacts(child, str(folder))
        self.client.log_dict(child, ticket["schedule"], "schedule.json")
        self.client.set_tag(child, "rlcompress.complete", "true")
        self.client.set_terminated(child, "FINISHED")

    def _log_arm(self, child: str, ticket: Plain, arm: str) -> None:
        """An arm as a child run of its ticket's: its curve, and its measurement on test."""
        tags = {"rlcompress.ticket": str(ticket["id"]), "rlcompress.arm": arm}
        run = self.child("arm", arm, tags, parent=child)
        measured = ticket["ticket"] if arm == ticket["arm"] else ticket["controls"][arm]
        self.log_params(run, {"arm": arm, "ticket": ticket["id"], "seed": ticket["seed"]})
        values = _measured("", measured)
        if arm in ticket["validation"]:
            values["validation_accuracy_last"] = ticket["validation"][arm]
        self._log_metrics(run, _curve("", ticket["curves"].get(arm, [])), values)
        self.client.set_terminated(run, "FINISHED")

    @clear
    def register(self, ticket: Plain, model: torch.nn.Module, example_input: torch.Tensor) -> str:
        """Register a logged ticket's model as a version of rlcompress-<experiment>; the version.

        example_input  (N, ...), N >= 1: what `model` takes; the logged graph takes any N

        The model is logged as a pt2 graph, which loads without unpickling.
        The alias `champion` goes to the densest version on the validation split. Density counts at
        the accuracy floor only: a ticket below it never takes the alias from one that is not; see
        `ticket_rank`. Of experiments that register at once the last one to look sees all
        versions, so that none moves the alias backwards. Raises
        TrackingError if `log_ticket` has not logged this ticket, UnexportableError if `model`
        cannot be exported with a free batch size.
        """
        child = self._child(ticket)
        if "rlcompress.complete" not in self.client.get_run(child).data.tags:
            raise self._error(f"ticket {ticket['id']} is not there: log_ticket comes first")
        logged = self._logged_model(child) or self._log_model(child, model, example_input)
        at_floor, value = ticket_rank(ticket)
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name)
        found = self.client.search_model_versions(f"name = '{self.name}' and run_id = '{child}'")
        if not found:
            tags = {
                **self._tags,
                "rlcompress.ticket": str(ticket["id"]),
                "rlcompress.density": repr(value),
                "rlcompress.at_floor": str(at_floor),
            }
            source = logged.artifact_location  # models:/<id> would be looked up at the global URI
            ids = {"run_id": child, "model_id": logged.model_id}
            found = [self.client.create_model_version(self.name, source, tags=tags, **ids)]
        crown(
            self.client,
            self.name,
            "rlcompress.density",
            lambda tags: (
                tags["rlcompress.at_floor"] == "True",
                float(tags["rlcompress.density"]),
            ),
        )
        return str(found[0].version)

    @clear
    def log_figures(self, folder: Path) -> None:
        """Log the report's PNG files and index.html as the parent's artifacts, in report/."""
        for path in sorted([*folder.glob("*.png"), *folder.glob("index.html")]):
            self.client.log_artifact(self.parent_id, str(path), "report")

    @clear
    def finish(self, status: str = "FINISHED") -> None:
        """End the parent as FINISHED, FAILED or KILLED; whatever was cut short under it is FAILED.

        Raises ValueError on another status. A later Tracker on the same folder reopens it.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status {status!r}: FINISHED, FAILED or KILLED")
        for run in self._search(self._tags, "attributes.status = 'RUNNING'"):
            if run.info.run_id != self.parent_id:
                self.client.set_terminated(run.info.run_id, "FAILED")
        self.client.set_terminated(self.parent_id, status)

    def _error(self, reason: str) -> TrackingError:
        message = f"MLflow at {self.uri}: {reason}"
        return TrackingError(hidden(message))

    def _find_experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is None:
            # A server knows where artifacts go; a database would drop them into ./mlruns.
            served = urlsplit(self.uri).scheme in ("http", "https", "databricks")
            location = None if served else (self.run / "mlartifacts").as_uri()
            return str(self.client.create_experiment(self.name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise self._error(f"experiment {self.name} was deleted; to restore it: {restore}")
        return str(found.experiment_id)

    def _search(self, tags: Mapping[str, str], *more: str) -> list[Any]:
        """The runs that carry all `tags`, of which `more` is true, oldest first."""
        terms = [*(f"tags.`{name}` = '{value}'" for name, value in tags.items()), *more]
        runs = self.client.search_runs([self.experiment_id], " and ".join(terms))
        return sorted(runs, key=lambda run: run.info.start_time)

    def _find_or_create(self, tags: Mapping[str, str], name: str, **more: str) -> str:
        found = self._search(tags)
        if not found:
            every = {**tags, **more}
            found = [self.client.create_run(self.experiment_id, tags=every, run_name=name)]
        return str(found[0].info.run_id)

    def child(self, role: str, name: str, tags: Mapping[str, str], parent: str = "") -> str:
        """The run of this role and these tags under the parent run (or another), made if need
        be; its id."""
        every = {**self._tags, "rlcompress.role": role, **tags}
        under = {"mlflow.parentRunId": parent or self.parent_id}
        return self._find_or_create(every, name, **under)

    def _child(self, ticket: Plain) -> str:
        inputs = digest(str(ticket["inputs"]))
        tags = {"rlcompress.ticket": str(ticket["id"]), "rlcompress.ticket_inputs": inputs}
        return self.child("ticket", f"ticket {ticket['id']}", tags)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        known = self.client.get_run(run_id).data.params
        rows = [Param(k, str(v)) for k, v in params.items() if k not in known]
        for i in range(0, len(rows), _PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=rows[i : i + _PARAMS_PER_BATCH])

    def _history(self, run_id: str, key: str) -> dict[int, float]:
        """Step -> value of what MLflow holds of one metric; asked once, then kept up."""
        if (run_id, key) not in self._histories:
            points = self.client.get_metric_history(run_id, key)
            self._histories[run_id, key] = {point.step: point.value for point in points}
        return self._histories[run_id, key]

    def _log_metrics(self, run_id: str, rows: list[Row], values: Plain | None = None) -> None:
        """Log rows, and values at step 0, that MLflow does not hold of that metric and step."""
        rows = [*rows, *((name, 0, value) for name, value in (values or {}).items())]
        now = time.time_ns() // 1_000_000
        new = [row for row in rows if row[1] not in self._history(run_id, row[0])]
        items = [Metric(key, float(value), now, step) for key, step, value in new]
        for i in range(0, len(items), _METRICS_PER_BATCH):
            batch = items[i : i + _METRICS_PER_BATCH]
            self.client.log_batch(run_id, metrics=batch)
            for metric in batch:
                self._history(run_id, metric.key)[metric.step] = metric.value

    def _logged_model(self, child: str) -> LoggedModel | None:
        """The child's finished model. One that a crash cut short is deleted."""
        ready, where = None, f"source_run_id = '{child}'"
        for logged in self.client.search_logged_models([self.experiment_id], where):
            if logged.status == LoggedModelStatus.READY:
                ready = logged
            else:
                self.client.delete_logged_model(logged.model_id)
        return ready

    def _log_model(self, child: str, model: torch.nn.Module, example: torch.Tensor) -> LoggedModel:
        logged = self.client.create_logged_model(self.experiment_id, "model", child)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            about = Model(model_id=logged.model_id, run_id=child)
            try:
                save_pt2(model, example, folder, about)
            except Exception as error:  # torch.export raises what it likes
                raise UnexportableError(
                    f"MLflow's pt2 format cannot hold this network: {first_line(error)}"
                ) from error
            self.client.log_model_artifacts(logged.model_id, str(folder))
        self.client.log_outputs(child, [LoggedModelOutput(logged.model_id, step=0)])
        return self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def digest(text: str) -> str:
    """Twelve hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _run_id(path: Path) -> str:
    """The id in `mlflow.json`, made and written atomically the first time."""
    if not path.exists():
        save_json(path, {"run_id": uuid.uuid4().hex})
    return str(json.loads(path.read_text())["run_id"])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}; lists become JSON."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else str(value)
    return flat


def _measured(prefix: str, measurement: Mapping[str, Any]) -> dict[str, float]:
    values = Measurement.from_dict(measurement).to_dict()
    return {prefix + name: value for name, value in values.items() if value is not None}


def _curve(prefix: str, points: Iterable[Mapping[str, Any]]) -> list[Row]:
    names = ("loss", "validation_accuracy")
    return [(f"{prefix}{name}", int(p["step"]), p[name]) for p in points for name in names]


def _ticket_values(ticket: Plain) -> dict[str, float]:
    values = _measured("", ticket["ticket"]) | {"ratio": ticket["ratio"]}
    for name in ("dense", "search"):
        values |= _measured(f"{name}.", ticket[name])
    for name, control in ticket["controls"].items():
        values |= _measured(f"control.{name}.", control)
    return values | {f"validation.{arm}.accuracy": v for arm, v in ticket["validation"].items()}
