"""Ray jobs: a folder goes up, a command runs on the head node, its log and its run folder come
back. All over the one port of the cluster's job server.

How the run folder comes back: a run that is a job links its folder into the logs of Ray's session,
which the job server hands out file by file, whatever became of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import ray
import requests
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rlcompress.core.errors import OutsideError, UserError, first_line
from rlcompress.schema import PPOSpec

for _name in (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
):
    logging.getLogger(_name).setLevel(logging.ERROR)

#: What Ray tells a job's driver about it.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
#: In the session's logs.
_LINKS = "rlcompress"
#: Seconds: for the first answer; for a cluster that has just started, or a lost connection.
ANSWER, PATIENCE = 10.0, 60.0


def publish(folder: Path, ppo: PPOSpec) -> None:
    """Called by a run that is a job: makes its folder one that `Cluster.fetch` finds."""
    from rlcompress.rl.cluster import start_ray  # torch, which `submit` can do without

    start_ray(ppo)
    context = ray.get_runtime_context()
    job = json.loads(os.environ[JOB_CONFIG])["metadata"]["job_submission_id"]
    link = Path(context.get_temp_dir(), context.get_session_name(), "logs", _LINKS, job)
    link.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder.resolve())


def pack(folder: Path, excludes: list[str], path: Path) -> int:
    """Zips what a job takes along, as `ray job submit --working-dir` does; bytes.

    excludes  patterns as in .gitignore; the folder's own .gitignore counts too
    Raises UserError if it is more than Ray takes.
    """
    patterns = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(folder), path, include_gitignore=True, excludes=patterns)
    size = path.stat().st_size
    if size >= GCS_STORAGE_MAX_SIZE:
        raise UserError(
            f"{folder.resolve()}: {size / 2**20:.0f} MiB to upload, Ray takes less than "
            f"{GCS_STORAGE_MAX_SIZE / 2**20:.0f}; leave out more with `excludes` in the runtime "
            "environment's file"
        )
    return size


class Cluster:
    """A cluster's job server at http://HEAD:8265.

    Raises OutsideError where it cannot be reached, or refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--address {address}: must be http://HEAD:8265, of Ray's job server")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise UserError(f"--address {address}: {error}") from None
        try:  # requests would wait for minutes
            socket.create_connection((parts.hostname, port), ANSWER).close()
        except OSError as error:
            raise OutsideError(
                f"{self.address}: no answer: {error.strerror or error}; is the cluster up, "
                "and its dashboard's port forwarded?"
            ) from None
        # Ray lets its own variables overrule the argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._clear():
            self.client = JobSubmissionClient(self.address)

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise OutsideError(
                f"{self.address}: refused: it wants its token; RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN) name it"
            ) from None
        except (RuntimeError, OSError, requests.RequestException, ValueError) as error:
            raise OutsideError(f"{self.address}: {first_line(error)}") from error

    def submit(
        self, package: Path, runtime_env: Mapping[str, Any], entrypoint: str, name: str
    ) -> str:
        """Uploads `package` and starts `entrypoint` in it; the job's id. A cluster that has just
        started is asked again for a while."""
        rest = {key: value for key, value in runtime_env.items() if key != "excludes"}
        env, deadline = {**rest, "working_dir": str(package)}, time.monotonic() + PATIENCE
        with self._clear():
            while True:
                try:
                    return str(
                        self.client.submit_job(
                            entrypoint=entrypoint, runtime_env=env, metadata={"experiment": name}
                        )
                    )
                except RuntimeError as error:
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1.0)

    def follow(self, job: str, write: Callable[[str], object]) -> int:
        """Hands the job's log to `write` as it grows; in the end the job's exit code. A lost
        connection is made again for a while."""
        self._info(job)  # a job that is not there will not come
        seen, lost = 0, 0.0

        async def tail() -> None:
            nonlocal seen, lost
            begin = 0
            async for text in self.client.tail_job_logs(job):
                # A log that is followed anew comes from its beginning.
                write(text[max(0, seen - begin) :])
                begin += len(text)
                seen, lost = max(seen, begin), 0.0

        while True:
            try:
                asyncio.run(tail())
                info = self._info(job)
            except Exception as error:  # Ray's, aiohttp's and the system's
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE:
                    said = f"{self.address}: lost: {first_line(error)}"
                    raise OutsideError(said) from error
            else:
                lost = 0.0
                if info.status.is_terminal():
                    return _exit_code(info, write)
            time.sleep(1.0)

    def fetch(self, job: str, folder: Path) -> int:
        """Writes the files of the job's run folder to `folder`, each whole or not at all; how many.
        0 if it made none."""
        with self._clear():
            node = self._info(job).driver_node_id
            if node is None:
                return 0
            found = self._logs("", node_id=node, glob=f"{_LINKS}/{job}/**/*").json()
            files = [
                name
                for names in found["data"]["result"].values()
                for name in names
                if not name.endswith("/")
            ]
            for name in files:
                path = folder / Path(name).relative_to(_LINKS, job)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                with (
                    self._logs("/file", node_id=node, filename=name, lines=-1) as answer,
                    part.open("wb") as out,
                ):
                    for chunk in answer.iter_content(2**20):
                        out.write(chunk)
                os.replace(part, path)
        return len(files)

    def _info(self, job: str) -> Any:
        with self._clear():
            return self.client.get_job_info(job)

    def _logs(self, what: str, **query: Any) -> requests.Response:
        # Ray's own `get_log` knows a cluster by the address of its GCS only.
        path = f"/api/v0/logs{what}?{urlencode(query)}"
        answer: requests.Response = self.client._do_request("GET", path, stream=True)
        answer.raise_for_status()
        return answer


def _exit_code(info: Any, write: Callable[[str], object]) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        write("the job was stopped\n")
        return 1
    code = info.driver_exit_code
    if not code:
        write(f"the job failed: {info.message}\n")
        return 1
    return int(code) if code > 0 else 128 - int(code)
