"""Ray itself: starting or joining it, warming its workers, sharing a problem with them."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from rlcompress.core.errors import UserError
from rlcompress.core.problem import Bundle

OBJECT_STORE_BYTES = 2**30

_shared: dict[int, tuple[Bundle, Any]] = {}


def start_ray(address: str | None) -> None:
    """Connects to `address` or RAY_ADDRESS, else starts Ray on this machine, quietly.

    Raises UserError if a cluster is named and cannot be reached.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"ppo.address = {address}: no Ray cluster there: {error}") from error
    else:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Workers on this machine use this very environment: no second `uv run` for each.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        # "local": never join the dying remains of a run that was killed.
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    for name in ("ray", "ray.rllib"):
        logging.getLogger(name).setLevel(logging.ERROR)


@ray.remote(num_cpus=1)
def _import() -> None:
    import rlcompress.rl.ppo  # noqa: F401


def warm_up(address: str | None, workers: int) -> None:
    """Starts Ray and lets `workers` of its processes import what they will need: torch and
    RLlib take them ten seconds, which dense training can hide."""
    start_ray(address)
    for _ in range(workers):
        _import.remote()


def share(bundle: Bundle) -> Any:
    """The bundle's object reference: one copy a node, put once."""
    if id(bundle) not in _shared:
        _shared.clear()
        _shared[id(bundle)] = (bundle, ray.put(bundle))
    return _shared[id(bundle)][1]
