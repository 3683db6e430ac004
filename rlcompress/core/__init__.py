"""Prune, quantize, measure and write networks in plain PyTorch; no Ray, no MLflow.

    from rlcompress import core

    network = core.build_network(model, images[:1])
    estimates = core.estimate(model, network, images[:64])
    evaluator = core.build_evaluator(model, network, fit, score, labels, estimates)
    schedule = network.uniform(keep=0.5, bits=4)
    evaluator.evaluate(schedule)
    small = core.fitted_network(model, evaluator, schedule)
    core.write_network("small.safetensors", small, network, ref, schedule)

Nothing is imported until it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcompress.core.artifact import Artifact, ModelRef, load_artifact, read_artifact
    from rlcompress.core.attention import plain_attention
    from rlcompress.core.cost import CostModel
    from rlcompress.core.errors import UserError
    from rlcompress.core.evaluate import Evaluator
    from rlcompress.core.evaluators import build_evaluator
    from rlcompress.core.fitted import fitted_network
    from rlcompress.core.graph import Network
    from rlcompress.core.prune import cut
    from rlcompress.core.schedule import Measurement, Schedule
    from rlcompress.core.sensitivity import Estimates, estimate
    from rlcompress.core.structure import build_network
    from rlcompress.core.ticket import cut_network, write_network

__all__ = [
    "Artifact",
    "CostModel",
    "Estimates",
    "Evaluator",
    "Measurement",
    "ModelRef",
    "Network",
    "Schedule",
    "UserError",
    "build_evaluator",
    "build_network",
    "cut",
    "cut_network",
    "estimate",
    "fitted_network",
    "load_artifact",
    "plain_attention",
    "read_artifact",
    "write_network",
]

_HOMES = {
    "artifact": ("Artifact", "ModelRef", "load_artifact", "read_artifact"),
    "attention": ("plain_attention",),
    "cost": ("CostModel",),
    "errors": ("UserError",),
    "evaluate": ("Evaluator",),
    "evaluators": ("build_evaluator",),
    "graph": ("Network",),
    "prune": ("cut",),
    "schedule": ("Measurement", "Schedule"),
    "sensitivity": ("Estimates", "estimate"),
    "structure": ("build_network",),
    "fitted": ("fitted_network",),
    "ticket": ("cut_network", "write_network"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
