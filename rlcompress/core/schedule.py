"""Schedules and measurements: the two plain values that travel through the whole project.

A `Schedule` says what to do with a network, a `Measurement` what came of it. Both are
frozen, compare by value and go to JSON and back without loss.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

#: Weight bits that mean "not quantized": the layer keeps 32-bit floats.
FULL_PRECISION = 32
MIN_BITS, MAX_BITS = 1, 8
#: Keep ratios and weight bits that a search chooses from, unless it is told otherwise.
KEEPS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)
BITS = (2, 3, 4, 5, 6, 8)
#: What a measurement can be judged by.
SCORES = ("kl", "accuracy", "unexplained")
#: What a candidate gets before it is scored.
RECOVERIES = ("none", "bn", "reconstruct", "steps:K")
#: Where a ticket's training can begin (see `ticket`), and those that are played by default.
EVERY_ARM = (
    "reconstructed", "finetuned", "distilled", "inherited", "rewind", "init", "fresh", "shuffled",
    "scratch",
)  # fmt: skip
ARMS = ("reconstructed", "finetuned", "rewind", "fresh")


def parse_recovery(recovery: str) -> tuple[str, int]:
    """What a layer's step does, and how many training steps follow the last one. Raises ValueError
    on what is not one of `RECOVERIES`."""
    if (match := re.fullmatch(r"steps:([1-9]\d*)", recovery)) is not None:
        return "bn", int(match[1])
    if recovery not in RECOVERIES[:-1]:
        raise ValueError(f"recovery {recovery!r}; allowed: {', '.join(RECOVERIES)}")
    return recovery, 0


@dataclass(frozen=True, eq=True)
class Schedule:
    """What survives: group -> keep ratio in (0, 1], layer -> weight bits (1-8, or 32 = float).

    A group or layer that is not named keeps everything: ratio 1.0, 32 bits. Raises ValueError on
    other ratios and bits.

    >>> Schedule(keep={"features.0": 0.5}, bits={"features.0": 4}).to_json()
    '{"bits":{"features.0":4},"keep":{"features.0":0.5}}'
    """

    keep: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, ratio in self.keep.items():
            if not isinstance(ratio, Real) or not 0.0 < ratio <= 1.0:
                raise ValueError(f"keep[{group!r}] = {ratio!r}: a keep ratio lies in (0, 1]")
        for layer, bits in self.bits.items():
            whole = isinstance(bits, Integral) and not isinstance(bits, bool)
            if not whole or (bits != FULL_PRECISION and not MIN_BITS <= bits <= MAX_BITS):
                raise ValueError(
                    f"bits[{layer!r}] = {bits!r}: weight bits are {MIN_BITS}-{MAX_BITS}, "
                    f"or {FULL_PRECISION} for floats"
                )
        # Equal schedules, equal text: 1 and 1.0, and NumPy's numbers.
        object.__setattr__(self, "keep", {g: float(ratio) for g, ratio in self.keep.items()})
        object.__setattr__(self, "bits", {name: int(bits) for name, bits in self.bits.items()})

    def __hash__(self) -> int:
        return hash(self.to_json())

    def ratio(self, group: str) -> float:
        """Share of a group's channels that survive, (0, 1]; 1.0 for a group that is not named."""
        return self.keep.get(group, 1.0)

    def width(self, layer: str) -> int:
        """Weight bits of a layer; 32 for one that is not named."""
        return self.bits.get(layer, FULL_PRECISION)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces. Equal schedules give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """`{"keep": {group: ratio}, "bits": {layer: bits}}`, as JSON takes it."""
        return {"keep": dict(self.keep), "bits": dict(self.bits)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_dict`. Raises ValueError on ratios or bits out of range."""
        return cls(
            keep={str(k): float(v) for k, v in data["keep"].items()},
            bits={str(k): int(v) for k, v in data["bits"].items()},
        )

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        return cls.from_dict(json.loads(text))

    def digest(self) -> str:
        """Eight hex digits that name this schedule."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Measurement:
    """What one schedule came to, on one named set of images.

    accuracy   top-1, 0-1
    loss       mean cross-entropy against the labels, nats
    kl         mean KL(dense || compressed) of the logits, nats
    bytes      size of the packed artifact on disk
    params     parameters that survive
    macs       multiply-accumulates of one image
    bops       sum over layers of MACs x weight bits x activation bits
    density    accuracy in % per 10^6 bytes
    unexplained  mean over the layers of the share of their outputs' variance that the dense
               outputs keep to themselves, [0, 1]; None where no evaluator measured
    """

    accuracy: float
    loss: float
    kl: float
    bytes: int
    params: int
    macs: int
    bops: int
    density: float
    unexplained: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """Its fields by name; the inverse of `from_dict`."""
        return dict(vars(self))  # `asdict` would copy every number deeply

    def error(self, score: str = "kl") -> float:
        """How far from the dense network, by one of `SCORES`; less is better. Raises ValueError for
        unexplained variance that was not measured."""
        value = {"kl": self.kl, "accuracy": 1 - self.accuracy, "unexplained": self.unexplained}
        error = value[score]
        if error is None:
            raise ValueError("unexplained variance was not measured")
        return error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_dict`; numpy scalars become plain numbers."""
        kinds: dict[str, type] = {"bytes": int, "params": int, "macs": int, "bops": int}
        names = [f.name for f in fields(cls) if data.get(f.name) is not None]
        return cls(**{name: kinds.get(name, float)(data[name]) for name in names})


def performance_density(accuracy: float, size_bytes: int) -> float:
    """Accuracy in % per 10^6 bytes of the written artifact."""
    return 100.0 * accuracy / (size_bytes / 1e6)


@dataclass(frozen=True)
class Record:
    """One line of `search/archive.jsonl`: a measured schedule and where it came from.

    evaluation   1-based count of the searcher's evaluations
    target       the size ratio (dense bytes / artifact bytes) aimed at; None without one
    """

    schedule: Schedule
    measurement: Measurement
    searcher: str
    seed: int
    evaluation: int
    target: float | None = None

    def to_json(self) -> str:
        return json.dumps(
            {
                "schedule": self.schedule.to_dict(),
                "measurement": self.measurement.to_dict(),
                "searcher": self.searcher,
                "seed": self.seed,
                "evaluation": self.evaluation,
                "target": self.target,
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError, KeyError or TypeError on a line that is not a record."""
        data = json.loads(text)
        return cls(
            schedule=Schedule.from_dict(data["schedule"]),
            measurement=Measurement.from_dict(data["measurement"]),
            searcher=str(data["searcher"]),
            seed=int(data["seed"]),
            evaluation=int(data["evaluation"]),
            target=None if data["target"] is None else float(data["target"]),
        )
