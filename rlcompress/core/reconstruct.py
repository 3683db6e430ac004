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
from torch.nn import functional as F

from rlcompress.core.calls import Call

RIDGE = 0.01


@dataclass(frozen=True)
class Positions:
    """P sampled output positions of one layer: image n_P, row_P and col_P of a convolution, or
    rows row_P of a linear layer's flattened output."""

    n_P: torch.Tensor
    row_P: torch.Tensor
    col_P: torch.Tensor
    convolution: bool

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        """(P, O) of an output (N, O, H, W), or of a linear layer's (N, ..., O)."""
        if self.convolution:
            return y[self.n_P, :, self.row_P, self.col_P]
        return y.reshape(-1, y.shape[-1])[self.row_P]


def sample_positions(
    call: Call, y_shape: torch.Size, lead: int, count: int, generator: torch.Generator
) -> Positions:
    """`count` distinct positions (all, if fewer) of the first `lead` entries (images) of a
    layer's output."""
    convolution = call.window is not None
    inner = (y_shape[2:] if convolution else y_shape[1:-1]).numel()
    flat = torch.randperm(lead * inner, generator=generator)[:count].sort().values
    if not convolution:
        return Positions(flat // inner, flat, torch.zeros_like(flat), False)
    rest, width = flat % inner, y_shape[3]
    return Positions(flat // inner, rest // width, rest % width, True)


def patches(call: Call, at: Positions, groups: int) -> torch.Tensor:
    """patches_PGD: what a layer reads to compute its outputs at the sampled positions."""
    x, window = call.x, call.window
    if window is None:
        return x.reshape(-1, x.shape[-1])[at.row_P].unsqueeze(1)
    (kh, kw), (sh, sw) = window.kernel, window.stride
    (ph, pw), (dh, dw) = window.padding, window.dilation
    if ph or pw:
        x = F.pad(x, (pw, pw, ph, ph))
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
    one that is still not, or not finite, leaves the weight as it was. With more inputs than
    positions the same minimum is found through X X', which is the smaller system.
    """
    count, groups, fan = patches_PGD.shape
    x_GPD = (patches_PGD - patches_PGD.mean(0)).permute(1, 0, 2)
    y_PO = targets_PO - targets_PO.mean(0)
    y_GPo = y_PO.reshape(len(y_PO), groups, -1).permute(1, 0, 2)
    w_GDo = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    r_G = ridge * x_GPD.square().sum((1, 2)) / fan + 1e-8
    x_GDP = x_GPD.transpose(1, 2)
    if fan <= count:
        fitted_GDo = _solve(x_GDP @ x_GPD, r_G, x_GDP @ y_GPo + r_G[:, None, None] * w_GDo)
    else:
        residual_GPo = y_GPo - x_GPD @ w_GDo
        fitted_GDo = _solve(x_GPD @ x_GDP, r_G, residual_GPo)
        fitted_GDo = None if fitted_GDo is None else w_GDo + x_GDP @ fitted_GDo
    if fitted_GDo is None or not bool(torch.isfinite(fitted_GDo).all()):
        return weight
    return fitted_GDo.transpose(1, 2).reshape(weight.shape)


def _solve(
    gram_Gnn: torch.Tensor, ridge_G: torch.Tensor, right_Gno: torch.Tensor
) -> torch.Tensor | None:
    """(gram + ridge I)^-1 right; None if that is not definite. Changes `gram_Gnn`."""
    gram_Gnn.diagonal(dim1=1, dim2=2).add_(ridge_G[:, None])
    factor, info = torch.linalg.cholesky_ex(gram_Gnn)
    return None if bool(info.any()) else torch.cholesky_solve(right_Gno, factor)
