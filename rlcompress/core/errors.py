"""The one exception that the command line shows as plain lines, and others in a line."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user: shown as plain lines, exit code 2."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


class OutsideError(UserError):
    """What lies outside does not answer (cluster, MLflow, disk, network): exit code 3."""

    exit_code = 3


#: What the disk or the system says no to, whatever the program does.
_OUTSIDE = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EROFS: "it is on a read-only file system; name another folder with --out DIR",
    errno.EACCES: "no permission; change it, or name another folder with --out DIR",
    errno.EPERM: "no permission; change it, or name another folder with --out DIR",
    errno.EIO: "the disk fails; see the system's log",
}


def outside(error: OSError, place: object) -> OutsideError | None:
    """The error in a line where the system is what refuses; None where it may be a bug. `place`:
    what it is about, if the error does not say."""
    words = _OUTSIDE.get(error.errno or 0)
    if words is None:
        return None
    again = "the same command goes on from what is kept"
    return OutsideError(f"{error.filename or place}: {words}; {again}")


def blame(error: BaseException) -> str:
    """An error of the user's own code in a line: class, message, file and line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.lineno is not None]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def first_line(error: BaseException) -> str:
    """The first line of what it says; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(word: object, allowed: Sequence[str]) -> str:
    """`; did you mean "NEAREST"?`, or nothing when no allowed word is near."""
    by_lower = {name.lower(): name for name in reversed(allowed)}
    matches = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f'; did you mean "{by_lower[matches[0]]}"?' if matches else ""
