"""Where MLflow keeps its records: reaching it, and what it raises told in a line."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import sqlalchemy
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from rlcompress.core.errors import first_line


class TrackingError(RuntimeError):
    """MLflow could not be reached or refused; the message names its URI (password hidden)."""


class UnexportableError(TrackingError):
    """torch.export cannot follow the network."""


def hidden(text: str) -> str:
    """The text without the passwords of URIs."""
    return re.sub(r"(://[^/@\s]*?):[^/@\s]*@", r"\1:***@", text)


def probe(uri: str) -> None:
    """Raises TrackingError if the server at `uri` does not answer; a database in a file needs no
    asking."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except (MlflowException, RequestException) as error:
        raise TrackingError(f"MLflow at {hidden(uri)}: {hidden(first_line(error))}") from error


def prepare(run: Path, uri: str | None = None) -> None:
    """Does ahead what takes a new `Tracker` seconds: making the embedded database."""
    if not (uri or os.environ.get("MLFLOW_TRACKING_URI")):
        make_database(run.resolve() / "mlflow.db")


_making = threading.Lock()


def make_database(path: Path) -> None:
    """Make MLflow's tables aside: killed half-way, MLflow could never open the file again."""
    with _making:
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="mlflow-") as scratch:
            mlflow.MlflowClient(f"sqlite:///{scratch}/made.db").search_experiments(max_results=1)
            os.replace(f"{scratch}/made.db", path)


def try_database(uri: str) -> None:
    """Connect once: MLflow itself tries ten times, over 100 s, before it says so."""
    if "://" not in uri or urlsplit(uri).scheme in ("http", "https", "file", "databricks"):
        return
    try:
        url = sqlalchemy.make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect().close()
    except (OSError, ImportError) as error:
        raise SQLAlchemyError(str(error)) from error
