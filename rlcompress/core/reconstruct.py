"""Closed-form recovery: refit a layer to what the dense network puts out, from its new inputs.

Ridge regression towards the dense pre-activations, pulled to the weights that were there:

    min_W |Y - X W|^2 + r |W - W0|^2,  r = 0.01 x mean diagonal of X'X

Its data-driven form for pruned channels is He et al. (2017, "Channel Pruning", eq. 4); pulling
towards W0 instead of zero keeps directions that the sample does not see as they were.

Shapes: P sampled output positions, G convolution groups, D inputs per group (channels x kernel),
O output channels, o outputs per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.graph import LayerModule

RIDGE = 0.01


@dataclass(frozen=True)
class Positions:
    """P sampled output positions of one layer: image n_P and, for a convolution, row_P, col_P."""

    n_P: torch.Tensor
    row_P: torch.Tensor
    col_P: torch.Tensor

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        """(P, O) of an output (N, O, H, W), or of a linear layer's (N, ..., O)."""
        if y.dim() == 4:
            return y[self.n_P, :, self.row_P, self.col_P]
        return y.reshape(-1, y.shape[-1])[self.row_P]


def sample_positions(
    output_shape: torch.Size, images: int, count: int, generator: torch.Generator
) -> Positions:
    """`count` distinct positions (all, if fewer) of the first `images` of an output."""
    convolution = len(output_shape) == 4
    height, width = (output_shape[2], output_shape[3]) if convolution else (1, 1)
    per_image = height * width if convolution else output_shape[1:-1].numel()
    total = images * per_image
    flat = torch.randperm(total, generator=generator)[:count].sort().values
    if not convolution:
        return Positions(flat // per_image, flat, torch.zeros_like(flat))
    rest = flat % per_image
    return Positions(flat // per_image, rest // width, rest % width)


def patches(module: LayerModule, x: torch.Tensor, at: Positions, groups: int) -> torch.Tensor:
    """patches_PGD: what a layer reads to compute its outputs at the sampled positions."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[at.row_P].unsqueeze(1)
    (kh, kw), (sh, sw) = module.kernel_size, module.stride
    (ph, pw), (dh, dw) = module.padding, module.dilation  # type: ignore[misc]
    if ph or pw:  # type: ignore[has-type]
        x = F.pad(x, (pw, pw, ph, ph))  # type: ignore[has-type]
    rows = at.row_P[:, None, None] * sh + torch.arange(kh)[None, :, None] * dh
    cols = at.col_P[:, None, None] * sw + torch.arange(kw)[None, None, :] * dw
    # NHWC memory makes this a gather of contiguous channel vectors.
    patch_PhwC = x.permute(0, 2, 3, 1)[at.n_P[:, None, None], rows, cols]
    count, channels = patch_PhwC.shape[0], patch_PhwC.shape[-1]
    patch = patch_PhwC.reshape(count, kh * kw, groups, channels // groups)
    return patch.permute(0, 2, 3, 1).reshape(count, groups, -1)


def refit(
    patches_PGD: torch.Tensor,
    targets_PO: torch.Tensor,
    weight: torch.Tensor,
    ridge: float = RIDGE,
) -> torch.Tensor:
    """The refitted weight, in `weight`'s shape. Means are left to the bias or batch norm.

    A singular system (dead inputs, fewer positions than inputs) is made definite by the ridge;
    one that is still not, or not finite, leaves the weight as it was.
    """
    groups = patches_PGD.shape[1]
    x_GPD = (patches_PGD - patches_PGD.mean(0)).permute(1, 0, 2)
    y_PO = targets_PO - targets_PO.mean(0)
    y_GPo = y_PO.reshape(len(y_PO), groups, -1).permute(1, 0, 2)
    w_GDo = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    gram_GDD = x_GPD.transpose(1, 2) @ x_GPD
    diagonal_GD = gram_GDD.diagonal(dim1=1, dim2=2)
    r_G = ridge * diagonal_GD.mean(1) + 1e-8
    right_GDo = x_GPD.transpose(1, 2) @ y_GPo + r_G[:, None, None] * w_GDo
    diagonal_GD += r_G[:, None]
    factor, info = torch.linalg.cholesky_ex(gram_GDD)
    if bool(info.any()):
        return weight
    fitted_GDo = torch.cholesky_solve(right_GDo, factor)
    if not bool(torch.isfinite(fitted_GDo).all()):
        return weight
    return fitted_GDo.transpose(1, 2).reshape(weight.shape)
