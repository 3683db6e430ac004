"""Which evaluator a network gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.graph import Network
from rlcompress.core.incremental import IncrementalEvaluator
from rlcompress.core.inputs import (
    class_problems,
    count_of,
    estimate_problems,
    image_problems,
    label_problems,
    option_problems,
    require,
)
from rlcompress.core.schedule import parse_recovery
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.trace import TraceError
from rlcompress.core.whole import WholeEvaluator


def build_evaluator(
    model: nn.Module,
    network: Network,
    fit: torch.Tensor,
    score: torch.Tensor,
    labels: torch.Tensor | None,
    estimates: Estimates,
    *,
    recovery: str = "reconstruct",
    positions: int = 2048,
    precision: str = "float32",
    cache_bytes: int = 256 * 2**20,
    seed: int = 0,
) -> Evaluator:
    """The incremental evaluator; for a model that torch.fx cannot trace the one that runs the
    whole network each time (`Evaluator.slow` says why).

    Arguments as `Evaluator` has them, on one device; `cache_bytes` bounds what intermediate results
    take. `model` is left in eval mode and must not change as long as the evaluator is used.

    Raises UserError, a line for each thing that is wrong with images, labels, estimates and
    options.
    """
    require(
        [
            *image_problems("fit", fit, model, network),
            *image_problems("score", score, model, network),
            *label_problems(labels, count_of(score)),
            *option_problems(recovery, positions, precision),
            *estimate_problems(estimates, network),
        ]
    )
    if parse_recovery(recovery)[1] and len(fit) == 1:
        raise UserError(f"fit: one image; allowed: 2 or more, to be trained on by {recovery}")
    model.eval()
    require(class_problems(labels, model, score[:1]))
    data = (model, network, fit, score, labels, estimates)
    options: dict[str, Any] = {
        "recovery": recovery,
        "positions": positions,
        "precision": precision,
        "seed": seed,
    }
    try:
        return IncrementalEvaluator(*data, cache_bytes=cache_bytes, **options)
    except TraceError as error:
        evaluator = WholeEvaluator(*data, **options)
        evaluator.slow = str(error)
        return evaluator
