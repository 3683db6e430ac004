"""How well the channels that a cut leaves predict those that it takes: what refits make up for.

Shapes: N inputs, C channels of a group, P positions of a flattened map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlcompress.core.graph import Link
from rlcompress.core.sensitivity import root_activation


def predictor(covariance: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """(kept, cut): the ridge regression of the cut channels on the kept ones."""
    keep, gone = torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(np.flatnonzero(~kept))
    a = covariance[keep][:, keep].double()
    ridge = 1e-2 * a.diagonal().mean() + 1e-12
    identity = torch.eye(len(keep), dtype=a.dtype)
    return torch.linalg.solve(a + ridge * identity, covariance[keep][:, gone].double()).float()


def covariance(
    inputs: Mapping[str, torch.Tensor], readers: Sequence[tuple[str, Link]], channels: int
) -> torch.Tensor | None:
    """(C, C) of a group, summed over its readers; None where none of their inputs is there.
    `inputs`: layer -> (N, features) rows of what it reads."""
    total = None
    for reader, link in readers:
        if reader not in inputs:
            continue
        seen = inputs[reader]
        a_NCP = root_activation(seen, link, channels, len(seen), convolution=False)
        rows = a_NCP.transpose(1, 2).flatten(0, 1)
        rows = rows - rows.mean(0)
        square = (rows.T @ rows).cpu() / len(rows)
        total = square if total is None else total + square
    return total
