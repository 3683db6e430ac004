"""Batch norms folded into the layers before them, and networks rounded to what a file can hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from rlcompress.core.codec import pack_biases, pack_scales, reach, unpack_biases, unpack_scales
from rlcompress.core.graph import Network
from rlcompress.core.quant import encode
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


@torch.no_grad()
def snap(
    model: nn.Module,
    network: Network,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Rounds `model` in place to what an artifact can hold; returns the rounded scale_O.

    model  a cut network, its weights plain floats (no fake quantizer is attached)

    After it, packing and loading change nothing but the order of float operations. Every weight
    keeps its code; a channel's gain moves by 0.28 % at most where the layer's scales span 2
    octaves, by 1.1 % where they span 8. Encoded again with the rounded scale, weights between two
    codes would change sides: at 2 and 4 bits 9 to 110 times the KL, measured. The batch norms'
    gamma and beta take up the rounding; without one, the scale, the weights and the bias do.

    A channel that hardly varies has a gain some hundred times the others', which would take their
    scales' bytes: where the layer's scales span more than the file holds, it is damped around its
    mean to what leaves room for most.
    """
    modules = dict(model.named_modules())
    rounded = dict(scales)
    for name, layer in network.layers.items():
        width = bits.get(name, FULL_PRECISION)
        if width == FULL_PRECISION:
            continue
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        if norm is not None and norm.weight is None:
            # What takes up the rounding; a file holds it folded.
            norm.affine = True  # type: ignore[assignment]
            norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))  # type: ignore[arg-type]
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))  # type: ignore[arg-type]
        factor, bias = fold(module, norm)
        scale = scales[name].double().cpu()
        folded = scale * torch.from_numpy(factor).abs()
        most = reach(folded.numpy())
        if norm is not None and bool((folded > most).any()):
            norm.weight.mul_((most / folded).clamp(max=1.0).to(norm.weight))  # type: ignore[union-attr, operator]
            factor, bias = fold(module, norm)
            folded = scale * torch.from_numpy(factor).abs()
        target = torch.from_numpy(unpack_scales(*pack_scales(folded.numpy(), name))).double()
        shift = None if bias is None else unpack_biases(*pack_biases(bias, name))
        if norm is None:
            codes = encode(module.weight, scales[name], width)  # type: ignore[arg-type]
            rounded[name] = target.to(scales[name])
            column = rounded[name].view(-1, *[1] * (codes.dim() - 1))
            module.weight.copy_(codes * column)  # type: ignore[union-attr, operator]
            if shift is not None:
                module.bias.copy_(torch.from_numpy(shift))  # type: ignore[union-attr, operator]
            continue
        assert isinstance(norm, NORMS)
        assert shift is not None
        ratio = torch.where(folded != 0, target / folded, torch.ones_like(scale))
        norm.weight.mul_(ratio.to(norm.weight))
        norm.bias.zero_()
        norm.bias.copy_(torch.from_numpy(shift - fold(module, norm)[1]))  # type: ignore[operator]
    return rounded
