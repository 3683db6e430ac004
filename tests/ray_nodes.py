"""A Ray cluster of separate nodes on one machine: each a `ray start` of its own, as root in a
network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import requests

NETWORK = "10.237.41"
#: A node's memory and object store, bytes.
MEMORY, STORE = 2 * 2**30, 200 * 2**20


class Nodes:
    """A head at `address`, its job server at `jobs`; `worker` adds a node. All stop behind the
    `with`. `env` is what a client needs to be let in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.namespaces = os.geteuid() == 0 and shutil.which("ip") is not None
        self.tag = secrets.token_hex(3)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        python = str(Path(sys.executable).parent)
        drop = ("PYTHONPATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI")
        base = {name: value for name, value in os.environ.items() if name not in drop}
        self.env = {**base, **self.auth, "PATH": f"{python}:{os.environ['PATH']}"}
        self.address = self.jobs = ""

    def __enter__(self) -> Nodes:
        if self.namespaces:
            self._ip(f"link add br{self.tag} type bridge")
            self._ip(f"addr add {NETWORK}.1/24 dev br{self.tag}")
            self._ip(f"link set br{self.tag} up")
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes[::-1]:
            self.kill(process, signal.SIGTERM)
        if self.namespaces:
            for number in range(len(self.processes)):
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._ip(f"netns del {self._name(number)}")
            self._ip(f"link del br{self.tag}")
        for number in range(len(self.processes)):
            shutil.rmtree(f"/tmp/r{self.tag}{number}", ignore_errors=True)

    def head(self, cpus: int) -> None:
        ip = f"{NETWORK}.10" if self.namespaces else "127.0.0.1"
        port = 6379 if self.namespaces else 26379
        dashboard = 8265 if self.namespaces else 28265
        words = ["--head", f"--port={port}", f"--node-ip-address={ip}"]
        words += [f"--dashboard-host={ip}", f"--dashboard-port={dashboard}"]
        self.address, self.jobs = f"{ip}:{port}", f"http://{ip}:{dashboard}"
        self._start(cpus, words, [])

    def worker(self, cpus: int, hide: Sequence[Path] = ()) -> subprocess.Popen[bytes]:
        """`hide`: folders that the node sees empty, as another machine would."""
        words = [f"--address={self.address}"]
        if self.namespaces:
            words.append(f"--node-ip-address={NETWORK}.{10 + len(self.processes)}")
        return self._start(cpus, words, hide)

    def kill(self, process: subprocess.Popen[bytes], kind: int = signal.SIGKILL) -> None:
        """Ends a node and all it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(kind)
            if kind != signal.SIGKILL:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=10)
        process.kill()
        process.wait()

    def alive(self) -> list[str]:
        """Ids of the nodes that are up."""
        answer = requests.get(f"{self.jobs}/api/v0/nodes", headers=self._header(), timeout=10)
        rows = answer.json()["data"]["result"]["result"]
        return [row["node_id"] for row in rows if row["state"] == "ALIVE"]

    def _header(self) -> dict[str, str]:
        token = Path(self.auth["RAY_AUTH_TOKEN_PATH"]).read_text()
        return {"Authorization": f"Bearer {token}"}

    def _joined(self, process: subprocess.Popen[bytes]) -> bool:
        """Waits until as many nodes are up as were started; false if this one gave up."""
        while process.poll() is None:
            with contextlib.suppress(requests.RequestException, KeyError, ValueError, TypeError):
                if len(self.alive()) >= len(self.processes):
                    return True
            time.sleep(0.5)
        return False

    def _name(self, number: int) -> str:
        return f"n{self.tag}{number}"

    def _start(
        self, cpus: int, words: Sequence[str], hide: Sequence[Path]
    ) -> subprocess.Popen[bytes]:
        number = len(self.processes)
        home = self.folder / f"home{number}"
        home.mkdir()
        # Ray's sockets must have short names.
        scratch = f"/tmp/r{self.tag}{number}"
        command = ["ray", "start", *words, f"--num-cpus={cpus}", f"--memory={MEMORY}"]
        command += [f"--object-store-memory={STORE}", f"--temp-dir={scratch}"]
        command += ["--disable-usage-stats", "--block"]
        if self.namespaces:
            name, ip = self._name(number), f"{NETWORK}.{10 + number}"
            self._ip(f"netns add {name}")
            self._ip(f"link add v{name} type veth peer name eth0 netns {name}")
            self._ip(f"link set v{name} master br{self.tag} up")
            for each in (f"addr add {ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
                self._ip(f"-n {name} {each}")
            # `ip netns exec` has a mount namespace of its own.
            mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(p))} && " for p in hide)
            script = f"{mounts}exec {shlex.join(command)}"
            command = ["ip", "netns", "exec", name, "sh", "-c", script]
        env = {**self.env, "HOME": str(home), "RAY_TMPDIR": scratch}
        path = self.folder / f"node{number}.log"
        # Ray gives a node 30 s to come up, which on a busy machine it may not have.
        for _ in range(4):
            with path.open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True
                )
            self.processes[number:] = [process]
            if self._joined(process):
                return process
        raise TimeoutError(path.read_text()[-3000:])

    @staticmethod
    def _ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)
