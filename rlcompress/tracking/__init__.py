"""The only package that knows MLflow."""

import os

# MLflow reads these on import or at each request; what the user set stands. Its own defaults,
# 7 retries of 120 s, make an unreachable server a wait of a quarter of an hour.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from rlcompress.tracking.listing import Found, find_tickets, show_ticket, stores
from rlcompress.tracking.policies import POLICY, fetch_policy, register_policy
from rlcompress.tracking.store import TrackingError, UnexportableError, prepare, probe
from rlcompress.tracking.tracker import Tracker

__all__ = [
    "POLICY",
    "Found",
    "Tracker",
    "TrackingError",
    "UnexportableError",
    "fetch_policy",
    "find_tickets",
    "prepare",
    "probe",
    "register_policy",
    "show_ticket",
    "stores",
]
