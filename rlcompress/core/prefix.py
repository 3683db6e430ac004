"""A partly compressed network: what an evaluator's pass has come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlcompress.core.schedule import FULL_PRECISION


@dataclass(frozen=True)
class FittedLayer:
    """A layer as the evaluator left it: cut and refitted floats, scales, and the statistics of
    the batch norm that it absorbs."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale_O: torch.Tensor | None
    mean_O: torch.Tensor | None = None
    variance_O: torch.Tensor | None = None


@dataclass
class Prefix:
    """A partly compressed network: the choices so far and what later layers need.

    live         activations (an incremental evaluator's own keys)
    unexplained  one number in [0, 1] a layer done: share of its outputs' variance that the
                 dense outputs keep to themselves (mean over surviving channels)
    fitted       what each layer became, where it was asked for;  norms  statistics (mean,
                 variance) of the batch norms that no layer absorbs
    """

    choices: tuple[tuple[float, int], ...]
    live: dict[Any, torch.Tensor]
    kept: dict[str, np.ndarray]
    unexplained: tuple[float, ...]
    fitted: dict[str, FittedLayer] = field(default_factory=dict)
    norms: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Of all that it keeps alive; what other prefixes share counts in each of them."""
        tensors = [*_tensors(list(self.live.values())), *(f.weight for f in self.fitted.values())]
        storages = {t.untyped_storage().data_ptr(): t for t in tensors}
        return sum(t.untyped_storage().nbytes() for t in storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in a value that may be lists and tuples of them (`torch.split` gives one)."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@dataclass(frozen=True)
class Step:
    """One layer done: what it puts out, its parameters, and its unexplained share.

    centre_O  what was subtracted from the output, for the batch norm behind it to give back
    """

    y: torch.Tensor
    fitted: FittedLayer
    residue: float
    centre_O: torch.Tensor | None = None


def touched(prefix: Prefix) -> bool:
    """Whether anything has been cut or quantized yet."""
    return any(bits != FULL_PRECISION for _, bits in prefix.choices) or not all(
        mask.all() for mask in prefix.kept.values()
    )
