"""One command at a time in a run folder; and how a run makes room for a fresh one."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shlex
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType

from rlcompress.core.errors import UserError


class Lock:
    """Holds `folder` (made if need be) until `close`, or the end of the process: the kernel
    frees it then, however the process ended.

    Raises UserError that says who holds it: process, host, since when, command.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (until `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another command"
            self._file.close()
            raise UserError(
                f"{folder}: in use by {holder}; wait until it ends, stop it, "
                "or name another folder with --out DIR"
            ) from None
        except OSError as error:
            # Some network file systems have no locks: one command there is the user's care.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        since = datetime.now().isoformat(" ", "seconds")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()} since {since}: {command}\n")
        self._file.flush()

    def close(self) -> None:
        """Frees the folder. The file stays: who removes it may remove another's lock."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_movable(folder: Path) -> bool:
    """Whether something is there. Raises UserError unless it is a run."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "spec.yaml").exists():
        raise UserError(
            f"{folder}: not a run folder (no spec.yaml in it), so it is not moved;"
            " name another with --out DIR"
        )
    return True


def move_aside(folder: Path) -> None:
    """A run that is there becomes FOLDER.1, FOLDER.2, … Raises UserError as `check_movable`
    does, and where another command is at work in it."""
    folder = folder.resolve()
    if not check_movable(folder):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with Lock(folder):
        folder.rename(aside)
    print(f"the old run is now in {aside}", file=sys.stderr)
