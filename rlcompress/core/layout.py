"""How an artifact lies on the disk: a safetensors header of constant length, records, numbers.

The one tensor, `data` (uint8), begins with three counts (uint16) and as many records of each kind,
little-endian:

    layer     module, norm + 1 (0: none absorbed), out, fan, bits, spacing, top, step
    norm      module, channels
    left out  module

`module` and `norm` are places in the order of `named_modules`; `out` and `fan` the weight's first
two dimensions; spacing, top and step how the scales and biases count (`codec.py`). The metadata
hold a manifest (JSON, padded with blanks to `HEADER_BYTES`): the format, how to build the network,
and the SHA-256 of itself and `data`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from rlcompress.core.errors import UserError

FORMAT = "rlcompress/3"
HEADER_BYTES = 512
MAX_FILE_BYTES = 2**31
_COUNTS = struct.Struct("<3H")
_LAYER = struct.Struct("<HHIIBBhh")
_NORM = struct.Struct("<HI")
_UNUSED = struct.Struct("<H")


class ArtifactError(UserError):
    """The file is not an artifact, or not intact."""


@dataclass(frozen=True)
class LayerRecord:
    """A layer: its module, the norm it absorbs (-1: none), its weight's first two dimensions,
    bits, and below 32 bits what its scales and biases count in."""

    module: int
    norm: int
    out: int
    fan: int
    bits: int
    spacing: int = 0
    top: int = 0
    step: int = 0


@dataclass(frozen=True)
class NormRecord:
    """A batch norm that no layer absorbs."""

    module: int
    channels: int


@dataclass(frozen=True)
class Table:
    """All records of a file; `unused`: the modules that are left out."""

    layers: tuple[LayerRecord, ...]
    norms: tuple[NormRecord, ...]
    unused: tuple[int, ...]

    def pack(self) -> bytes:
        """The records as bytes. Raises UserError for a number that a record cannot hold."""
        try:
            pieces = [_COUNTS.pack(len(self.layers), len(self.norms), len(self.unused))]
            for layer in self.layers:
                module, norm, *rest = astuple(layer)
                pieces.append(_LAYER.pack(module, norm + 1, *rest))
            pieces += [_NORM.pack(*astuple(norm)) for norm in self.norms]
            pieces += [_UNUSED.pack(module) for module in self.unused]
        except struct.error as error:
            raise UserError(f"the network does not fit the artifact's records: {error}") from error
        return b"".join(pieces)

    @staticmethod
    def unpack(data: bytes) -> tuple[Table, int]:
        """The records at the head of `data`, and where they end. Raises ValueError if cut off."""
        if len(data) < _COUNTS.size:
            raise ValueError("no records")
        counts = _COUNTS.unpack_from(data)
        if len(data) < (end := table_bytes(*counts)):
            raise ValueError(f"{len(data)} bytes of data, the records alone need {end}")
        at = _COUNTS.size
        rows: list[list[tuple[int, ...]]] = []
        for count, record in zip(counts, (_LAYER, _NORM, _UNUSED), strict=True):
            rows.append([*record.iter_unpack(data[at : at + count * record.size])])
            at += count * record.size
        layers, norms, unused = rows
        return Table(
            tuple(LayerRecord(module, norm - 1, *rest) for module, norm, *rest in layers),
            tuple(NormRecord(*row) for row in norms),
            tuple(module for (module,) in unused),
        ), end


def table_bytes(layers: int, norms: int, unused: int) -> int:
    """Bytes of so many records and of their counts."""
    return _COUNTS.size + _LAYER.size * layers + _NORM.size * norms + _UNUSED.size * unused


def digest(manifest: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 of a manifest (but for its own `sha256`) and the data behind it."""
    plain = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode() + data).hexdigest()


def seal(model: list[Any], data: bytes) -> bytes:
    """The file: a manifest with `model` (how to build the network) before `data`.

    Raises UserError if the manifest does not fit the header.
    """
    manifest: dict[str, Any] = {"format": FORMAT, "model": model}
    manifest["sha256"] = digest(manifest, data)
    text = json.dumps(manifest, separators=(",", ":"))
    tensors = {"data": np.frombuffer(data, np.uint8)}
    packed = save_safetensors(tensors, metadata={"rlcompress": text})
    spare = HEADER_BYTES - (len(packed) - len(data))
    if spare < 0:
        raise UserError(f"model args {model[1]} do not fit the artifact's header")
    packed = save_safetensors(tensors, metadata={"rlcompress": text + " " * spare})
    assert len(packed) == HEADER_BYTES + len(data)
    return packed


def unseal(path: Path) -> tuple[dict[str, Any], bytes]:
    """Manifest and data of a file. Raises ArtifactError unless they match their digest."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path}: {size} bytes; an artifact has at most {MAX_FILE_BYTES}")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if list(file.keys()) != ["data"]:
                raise ArtifactError(f"{path}: not an rlcompress artifact (tensors: {file.keys()})")
            data = file.get_tensor("data")
        manifest = json.loads(metadata["rlcompress"])
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: not an intact rlcompress artifact: {error}") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if written != FORMAT:
        other = isinstance(written, str) and re.fullmatch(r"rlcompress/\d{1,9}", written)
        found = f"in format {written}, " if other else ""
        raise ArtifactError(f"{path}: {found}not in {FORMAT}, which this version reads and writes")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ArtifactError(f"{path}: `data` must be one row of uint8")
    raw = data.tobytes()
    if digest(manifest, raw) != manifest.get("sha256"):
        raise ArtifactError(f"{path}: the content does not match its SHA-256: the file is damaged")
    return manifest, raw
