"""Batch norms folded into the layers before them, and networks rounded to what a file can hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from rlcompress.core.codec import pack_half, unpack_half
from rlcompress.core.graph import Network
from rlcompress.core.reading import NORMS
from rlcompress.core.schedule import FULL_PRECISION


def fold(module: nn.Module, norm: nn.Module | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Factor and bias (float64, per output channel) of a layer with its batch norm folded in."""
    out = module.weight.shape[0]  # type: ignore[union-attr]
    bias = module.bias.detach().double() if module.bias is not None else None  # type: ignore[union-attr, operator]
    if norm is None:
        return np.ones(out), None if bias is None else bias.cpu().numpy()
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma = norm.weight.detach().double() if norm.affine else torch.ones(out, dtype=torch.double)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros(out, dtype=torch.double)
    factor = gamma / (norm.running_var.double() + norm.eps).sqrt()
    shift = beta - norm.running_mean.double() * factor
    if bias is not None:
        shift = shift + bias * factor
    return factor.cpu().numpy(), shift.cpu().numpy()


def _half(values: torch.Tensor, name: str) -> torch.Tensor:
    """What `pack_half` makes of them."""
    packed = pack_half(values.double().cpu().numpy(), name)
    return torch.from_numpy(unpack_half(*packed)).double()


@torch.no_grad()
def snap(
    model: nn.Module,
    network: Network,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Rounds `model` in place to what an artifact can hold; returns the rounded scale_O.

    After it, packing and loading change nothing but the order of float operations. The batch
    norms' gamma and beta take up the rounding; without one, the scale and the bias do.
    """
    modules = dict(model.named_modules())
    rounded = dict(scales)
    for name, layer in network.layers.items():
        if bits.get(name, FULL_PRECISION) == FULL_PRECISION:
            continue
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        factor_np, bias_np = fold(module, norm)
        factor, scale = torch.from_numpy(factor_np), scales[name].double().cpu()
        target = _half(scale * factor, name)
        bias = None if bias_np is None else _half(torch.from_numpy(bias_np), name)
        if norm is None:
            rounded[name] = target.to(scales[name])
            if bias is not None:
                module.bias.copy_(bias)  # type: ignore[union-attr, operator]
            continue
        assert isinstance(norm, NORMS)
        assert bias is not None
        ratio = torch.where(scale * factor != 0, target / (scale * factor), torch.ones_like(scale))
        norm.weight.mul_(ratio.to(norm.weight))
        norm.bias.zero_()
        norm.bias.copy_(bias - torch.from_numpy(fold(module, norm)[1]))
    return rounded
