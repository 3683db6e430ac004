"""Sampled output positions of a layer, and what it reads there.

Shapes: P sampled output positions, G convolution groups, D inputs per group (channels x kernel),
O output channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlcompress.core.calls import Call

#: Positions of a layer: beyond them the error of the estimate is a few percent of the error left.
LEAST, PER_INPUT = 512, 16


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
            height, width = y.shape[2:]
            at_P = (self.n_P * height + self.row_P) * width + self.col_P
            return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).index_select(0, at_P.to(y.device))
        return y.reshape(-1, y.shape[-1]).index_select(0, self.row_P.to(y.device))


def enough_positions(fan: int, most: int) -> int:
    """How many positions a layer of `fan` inputs needs: `PER_INPUT` for each, `LEAST` at least."""
    return min(most, max(LEAST, PER_INPUT * fan))


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
        return x.reshape(-1, x.shape[-1]).index_select(0, at.row_P.to(x.device)).unsqueeze(1)
    (kh, kw), (sh, sw) = window.kernel, window.stride
    (ph, pw), (dh, dw) = window.padding, window.dilation
    rows = at.row_P[:, None, None] * sh + torch.arange(kh)[None, :, None] * dh - ph
    cols = at.col_P[:, None, None] * sw + torch.arange(kw)[None, None, :] * dw - pw
    height, width = x.shape[2:]
    # NHWC memory makes this a gather of contiguous channel vectors.
    at_Phw = at.n_P[:, None, None] * height + rows.clamp(0, height - 1)
    at_Phw = at_Phw * width + cols.clamp(0, width - 1)
    vectors = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    patch_PhwC = vectors.index_select(0, at_Phw.flatten().to(x.device)).view(*at_Phw.shape, -1)
    if ph or pw:
        inside_Phw = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
        patch_PhwC = patch_PhwC * inside_Phw.unsqueeze(-1).to(x)
    count, channels = patch_PhwC.shape[0], patch_PhwC.shape[-1]
    patch = patch_PhwC.reshape(count, kh * kw, groups, channels // groups)
    return patch.permute(0, 2, 3, 1).reshape(count, groups, -1)


def spread_rows(y: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` of the rows (R, C) of `y` (N, C, ...), or all; every position of an image takes
    its turn."""
    rows = y.movedim(1, -1).flatten(0, -2)
    stride = max(1, len(rows) // count)
    while math.gcd(stride, len(rows) // len(y)) > 1:
        stride += 1
    return rows[::stride]
