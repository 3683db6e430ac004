"""Files that are whole or not there: tensors, JSON, and the archive of measured schedules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlcompress.core.errors import UserError
from rlcompress.core.schedule import Record


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    """safetensors with JSON metadata, by temporary file and rename."""
    part = path.with_name(path.name + ".part")
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, part, metadata={"json": json.dumps(metadata)})
    os.replace(part, path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads((file.metadata() or {}).get("json", "{}"))


def save_json(path: Path, content: Any) -> None:
    """JSON by temporary file, flush and rename."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class JsonLines:
    """An append-only file: each line is flushed to the disk before `append` returns.

    A last line without its newline was cut off by a crash; it is removed on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115 (closed by `close`)
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
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
                "remove the line, or start over with --fresh"
            ) from error
    return records
