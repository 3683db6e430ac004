"""A policy, trained by PPO, that prunes and quantizes neural networks layer by layer.

Importing this package is cheap: nothing below it is imported until it is asked for.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcompress.core.artifact import ModelRef, load_artifact
    from rlcompress.core.dynamic import DynamicCompressor
    from rlcompress.core.schedule import Measurement, Record, Schedule
    from rlcompress.core.squeeze import Pace

# Before torch loads: OpenMP threads that spin at a barrier make two-core machines ten times
# slower as soon as anything else runs (46 s against 4.7 s for the same training epoch).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "DynamicCompressor",
    "Measurement",
    "ModelRef",
    "Pace",
    "Record",
    "Schedule",
    "__version__",
    "load_artifact",
]

try:
    __version__ = version("rlcompress")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

_HOMES = {
    "DynamicCompressor": "rlcompress.core.dynamic",
    "ModelRef": "rlcompress.core.artifact",
    "Pace": "rlcompress.core.squeeze",
    "load_artifact": "rlcompress.core.artifact",
    "Measurement": "rlcompress.core.schedule",
    "Record": "rlcompress.core.schedule",
    "Schedule": "rlcompress.core.schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
