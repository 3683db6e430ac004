"""Ray itself: starting or joining it, warming its workers, sharing a problem with them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import ray

from rlcompress.core.errors import OutsideError, UserError, first_line
from rlcompress.core.problem import Bundle, Problem
from rlcompress.schema import PPOSpec

OBJECT_STORE_BYTES = 2**30
#: For a cluster to say that it is there.
ANSWER_SECONDS = 10.0

#: Addresses of the Rays that this process has started.
_started: set[str] = set()
_shared: dict[int, tuple[Bundle, Any]] = {}
_problems: dict[str, Problem] = {}


def start_ray(ppo: PPOSpec) -> None:
    """Connects to `ppo.address` or RAY_ADDRESS, else starts Ray on this machine, quietly, with room
    for the env runners: processes that have imported all they need by the time they are asked for.

    Raises OutsideError if a cluster is named and cannot be reached or Ray does not start here,
    UserError if this machine has not the GPUs. (A cluster may get them later: it waits.)
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = ppo.address or os.environ.get("RAY_ADDRESS")
    if address:
        _require_answer(address)
        try:
            with _sigterm_kept():
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OutsideError(f"ppo.address = {address}: no Ray cluster there: {error}") from error
    else:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Torch and RLlib take a process ten seconds, which dense training can hide.
        os.environ.setdefault("RAY_preload_python_modules", "rlcompress.rl.ppo")
        try:
            # "local": never join the dying remains of a run that was killed.
            with _sigterm_kept():
                ray.init(
                    "local",
                    num_cpus=max(1, ppo.num_env_runners),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
        except Exception as error:  # a plain one, where its daemons take more than 30 s
            raise OutsideError(
                f"Ray did not start on this machine: {first_line(error)} The same command goes on "
                "when it is less busy; without Ray: --searcher transfer --set ppo.num_env_runners=0"
            ) from error
    for name in ("ray", "ray.rllib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not address:
        _started.add(ray.get_runtime_context().gcs_address)
        require_gpus(ppo, int(ray.cluster_resources().get("GPU", 0.0)))


def require_room(ppo: PPOSpec) -> None:
    """Raises UserError where env runners would wait for ever: a Ray that an earlier call started
    here, with fewer CPUs, gets no more."""
    if ray.get_runtime_context().gcs_address not in _started:
        return
    there = ray.cluster_resources().get("CPU", 0.0)
    if ppo.num_env_runners > there:
        raise UserError(
            f"ppo.num_env_runners = {ppo.num_env_runners}: this process started Ray with "
            f"{there:g} CPUs; ray.shutdown() first"
        )


def require_gpus(ppo: PPOSpec, there: int) -> None:
    """Raises UserError, with the share that would do, where `there` GPUs have no room for the env
    runners. A runner's share is of one GPU: three at 0.6 need three."""
    runners, share = ppo.num_env_runners, ppo.num_gpus_per_env_runner
    if not runners or not share:
        return
    # In floats 1 / (1 / 93) is less than 93.
    needed = math.ceil(runners / int(1 / share + 1e-6)) if share <= 1 else runners * share
    if needed <= there:
        return
    remedy = "--set device=cpu --set ppo.num_gpus_per_env_runner=0 runs without"
    if there:
        # Ray counts in ten-thousandths.
        fitting = math.floor(1e4 / math.ceil(runners / there)) / 1e4
        remedy = f"enough with --set ppo.num_gpus_per_env_runner={fitting:g}"
    raise UserError(
        f"ppo.num_gpus_per_env_runner = {share:g}: {runners} env runners need {needed:g} GPUs, "
        f"this machine has {there}; {remedy}"
    )


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` puts a handler of its own in place of ours."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _require_answer(address: str) -> None:
    """Raises OutsideError where nobody speaks Ray's protocol: Ray itself waits minutes, and may end
    the process. Names like "auto" are looked up at once."""
    place = address.rpartition("://")[2].partition("/")[0]
    if ":" not in place or os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise OutsideError(
                f"ppo.address = {address}: no Ray cluster answers there within "
                f"{ANSWER_SECONDS:.0f} s; start one (ray start --head), or unset ppo.address and "
                "RAY_ADDRESS to use this machine"
            ) from None


def share(bundle: Bundle) -> Any:
    """The bundle's object reference: one copy a node, put once."""
    if id(bundle) not in _shared:
        _shared.clear()
        _shared[id(bundle)] = (bundle, ray.put(bundle))
    return _shared[id(bundle)][1]


def problem_of(reference: Any, held: int = 1) -> Problem:
    """The problem that this process has built of a shared bundle, or builds now. It keeps the
    `held` last used: an evaluator's cache is bounded, a list of evaluators is not."""
    key = reference.hex()
    problem = _problems.pop(key, None) or ray.get(reference).problem()
    _problems[key] = problem
    while len(_problems) > held:
        _problems.pop(next(iter(_problems)))
    return problem
