"""The run folder's second place: a folder or bucket that outlives the machine that runs."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Set
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSystem, FileType, LocalFileSystem, copy_files

from rlcompress.core.errors import OutsideError, UserError, first_line
from rlcompress.core.files import read_json, save_json

#: What grows as a run goes on.
_ARCHIVE = Path("search") / "archive.jsonl"
#: In the run folder: what it has put where, so that a later command knows what went since.
_PLACED = "storage.json"
#: How the names end of what is not whole yet, here or there.
_UNFINISHED = (".part", "-journal")


class Storage:
    """`uri`/`name`, of a mounted folder, s3:// or gs://: what pyarrow opens.

    Raises OutsideError where it cannot be reached.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri = f"{uri.rstrip('/')}/{name}"
        self._mine = uuid.uuid4().hex[:8]
        self._known: dict[Path, tuple[int, int]] = {}
        with self._clear():
            if "://" in uri:
                self._files, self._root = FileSystem.from_uri(self.uri)
            else:
                self._files, self._root = LocalFileSystem(), str(Path(self.uri).absolute())

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowInvalid, NotImplementedError) as error:
            raise OutsideError(f"storage: {self.uri}: {first_line(error)}") from error

    def has_run(self) -> bool:
        with self._clear():
            there = self._files.get_file_info(f"{self._root}/spec.yaml")
        return bool(there.type == FileType.File)

    def load(self, folder: Path) -> None:
        """Brings what is kept to `folder`, if no run is there: one that goes on elsewhere.

        Raises UserError if one is there and the kept one has gone further.
        """
        with self._clear():
            if (folder / "spec.yaml").exists():
                mine = folder / _ARCHIVE
                kept = self._files.get_file_info(f"{self._root}/{_ARCHIVE.as_posix()}").size or 0
                if kept > (mine.stat().st_size if mine.exists() else 0):
                    raise UserError(
                        f"{folder}: {self.uri} has gone further; move {folder} away to go on from "
                        "there, or name another place with --set storage=PLACE"
                    )
            elif self._files.get_file_info(self._root).type == FileType.Directory:
                folder.mkdir(parents=True, exist_ok=True)
                copy_files(self._root, str(folder.absolute()), self._files, LocalFileSystem())
                for left in folder.rglob("*.part"):  # by a machine that stopped while it saved
                    left.unlink()
                self._known = _state(folder)
                self._note(folder, self._known.keys())

    def save(self, folder: Path) -> None:
        """Copies the files that changed since the last time, each whole or not at all, and removes
        those that went, also before this process: what is set aside must not come back as done."""
        now = _state(folder)
        gone = self._placed(folder) - now.keys()
        self._note(folder, now.keys() | gone)
        with self._clear():
            for path, state in list(now.items()):
                if self._known.get(path) == state:
                    continue
                try:
                    self._copy(folder / path, f"{self._root}/{path.as_posix()}")
                except FileNotFoundError:
                    if (folder / path).exists():
                        raise
                    del now[path]  # gone in the meantime
                else:
                    self._known[path] = state
            for path in gone:
                with contextlib.suppress(FileNotFoundError):
                    self._files.delete_file(f"{self._root}/{path.as_posix()}")
        self._known = now
        self._note(folder, now.keys())

    def _placed(self, folder: Path) -> set[Path]:
        """The files that this run folder has put here."""
        return {Path(name) for name in _notes(folder).get(self.uri, [])}

    def _note(self, folder: Path, paths: Set[Path]) -> None:
        notes, names = _notes(folder), sorted(path.as_posix() for path in paths)
        if notes.get(self.uri, []) != names:
            save_json(folder / _PLACED, {**notes, self.uri: names})

    def _copy(self, source: Path, target: str) -> None:
        """By another name, which no other process that saves here uses."""
        part = f"{target}.{self._mine}.part"
        self._files.create_dir(target.rpartition("/")[0], recursive=True)
        try:
            copy_files(str(source.absolute()), part, LocalFileSystem(), self._files)
            self._files.move(part, target)
        except OSError:
            with contextlib.suppress(OSError):
                self._files.delete_file(part)
            raise


def _notes(folder: Path) -> dict[str, list[str]]:
    """Place -> the files that the run folder has put there."""
    path = folder / _PLACED
    return dict(read_json(path)) if path.exists() else {}


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    """File -> size and time of its last change, of all that is to be kept; other processes may be
    at work in the folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if name in ("lock", _PLACED) or name.endswith(_UNFINISHED):
                continue
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                found[path.relative_to(folder)] = (about.st_size, about.st_mtime_ns)
    return found
