"""Policies in MLflow: the registered model `rlcompress-policy`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from requests import RequestException  # type: ignore[import-untyped]
from sqlalchemy.exc import SQLAlchemyError

from rlcompress.core.errors import UserError, first_line
from rlcompress.tracking.champion import crown
from rlcompress.tracking.store import hidden, try_database
from rlcompress.tracking.tracker import Plain, Tracker, clear

POLICY = "rlcompress-policy"


@clear
def register_policy(tracker: Tracker, folder: Path, about: Plain, gain: float) -> str:
    """Logs a policy's folder as a child run and registers it; the version. The alias `champion`
    goes to the one of most `gain`. Called again it doubles nothing.

    Raises TrackingError when MLflow does not answer.
    """
    client = tracker.client
    digest = str(about["digest"])
    run = tracker.child("policy", f"policy {digest[:8]}", {"rlcompress.policy": digest})
    tracker.log_params(run, {k: v for k, v in about.items() if isinstance(v, int | float | str)})
    client.log_artifacts(run, str(folder), "policy")
    client.set_terminated(run, "FINISHED")
    if not client.search_registered_models(f"name = '{POLICY}'"):
        client.create_registered_model(POLICY)
    found = client.search_model_versions(f"name = '{POLICY}' and run_id = '{run}'")
    if not found:
        source = f"{client.get_run(run).info.artifact_uri}/policy"
        tags = {"rlcompress.gain": repr(gain), "rlcompress.policy": digest}
        found = [client.create_model_version(POLICY, source, run_id=run, tags=tags)]
    crown(client, POLICY, "rlcompress.gain", lambda tags: float(tags["rlcompress.gain"]))
    return str(found[0].version)


def fetch_policy(reference: str, into: Path, uri: str | None) -> Path:
    """Downloads "NAME@ALIAS" or "NAME@VERSION" and returns its folder.

    Raises UserError if there is no such policy or MLflow does not answer.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise UserError(
            f"policy {reference}: a registered policy needs MLflow; "
            "set MLFLOW_TRACKING_URI or tracking.uri, or name a run folder"
        )
    name, _, which = reference.partition("@")
    try:
        try_database(uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        version: Any = (
            client.get_model_version(name, which)
            if which.isdigit()
            else client.get_model_version_by_alias(name, which)
        )
        into.mkdir(parents=True, exist_ok=True)
        found = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source, dst_path=str(into), tracking_uri=uri
        )
    except (MlflowException, SQLAlchemyError, RequestException, OSError) as error:
        message = f"policy {reference}: MLflow at {uri}: {first_line(error)}"
        raise UserError(hidden(message)) from error
    return Path(found)
