"""Files that are whole or not there: bytes, JSON, and the archive of measured schedules."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rlcompress.core.errors import UserError
from rlcompress.core.schedule import Record


def save_bytes(path: Path, content: bytes) -> None:
    """By temporary file, flush and rename: a reader sees all or nothing, and of two processes that
    save it at a time the later one's."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with _named(path), open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)  # a full disk stays usable
        raise
    os.replace(part, path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of writing says where: Python's own does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def save_json(path: Path, content: Any) -> None:
    """JSON, written as `save_bytes` does."""
    save_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


class JsonLines:
    """An append-only file: the system has each line before `append` returns, so that it outlives
    this process, and the disk has it too if it was not asked within the last `interval` seconds.
    `sync` and `close` ask it. (It takes milliseconds: with one a line, no driver takes in more
    than some hundred lines a second.)

    A last line without its newline was cut off by a crash; it is removed on opening.
    """

    def __init__(self, path: Path, *, interval: float = 0.0) -> None:
        self.path, self.interval = path, interval
        self._synced = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line that did not fit is not tried again on closing.
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def append(self, line: str) -> None:
        rest = line.encode() + b"\n"
        with _named(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced >= self.interval:
                self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_json(path: Path) -> Any:
    """What `save_json` wrote. Raises UserError on a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: damaged ({error}); remove {path.parent} to make it again, or start over "
            "with --fresh"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file that `JsonLines` wrote; [] without a file. Raises UserError on a
    damaged line."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove it") from error
    return rows


def read_archive(path: Path) -> list[Record]:
    """All whole lines of an archive; [] without a file. Raises UserError on a damaged line."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            records.append(Record.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a measured schedule ({error}); "
                "remove it and its searcher's lines behind it, or start over with --fresh"
            ) from error
    return records
