"""Closed-form recovery: refit a layer to what the dense network puts out, from its new inputs,
and quantize it so that later weights make up for the rounding of earlier ones.

Refit: ridge regression towards the wanted pre-activations, pulled to the weights that were there,

    min_W |Y - X W|^2 + r |W - W0|^2,   r one of `RIDGES` x mean diagonal of X'X

(its data-driven form for pruned channels is He et al., 2017, "Channel Pruning", eq. 4; pulling
towards W0 instead of zero keeps directions that the sample does not see as they were). The last
quarter of the positions is held out to choose r, and W0 stays if no r does better there.

Rounding: inputs are quantized block by block, those with most energy first, and what a block's
rounding changes in the output is made up for by the blocks behind it (Frantar et al., 2023,
"GPTQ", eq. 4; blocks instead of single inputs, so that it takes a few matrix products).

Shapes: P sampled output positions, G convolution groups, D inputs per group (channels x kernel),
O output channels, o outputs per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlcompress.core.calls import Call
from rlcompress.core.quant import fake_quantize

#: Shares of the mean diagonal. Of nearly equal ones the first is as good as any.
RIDGES = (1.0, 0.1, 0.01)
#: Positions of a layer: beyond them the error of the estimate is a few percent of the error left.
LEAST, PER_INPUT = 512, 16
HELD_OUT = 4  # one position of so many
#: Blocks that a layer's inputs are rounded in; small groups of inputs go one by one.
BLOCKS = 16
#: Inputs from where on a Gram matrix is computed in parts.
NARROW = 128
#: Share of the mean diagonal added before rounding: inputs hardly seen must not make up for much.
DAMPING = 0.01


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


@dataclass(frozen=True)
class Factor:
    """L of X'X + damping = L L', inputs in the order of their energy, least first."""

    order_GD: torch.Tensor
    lower_GDD: torch.Tensor

    @classmethod
    def of(cls, gram_GDD: torch.Tensor, damping_G: torch.Tensor) -> Factor | None:
        """`damping_G` as shares of the mean diagonal. None if that is not positive definite."""
        diagonal_GD = gram_GDD.diagonal(dim1=1, dim2=2)
        order_GD = diagonal_GD.argsort(dim=1)
        damped_GDD = _permuted(gram_GDD, order_GD)
        damping_G = damping_G * diagonal_GD.mean(1) + 1e-8
        damped_GDD.diagonal(dim1=1, dim2=2).add_(damping_G[:, None])
        lower_GDD, info = torch.linalg.cholesky_ex(damped_GDD)
        if bool(info.any()) or not bool(torch.isfinite(lower_GDD).all()):
            return None
        return cls(order_GD, lower_GDD)

    def solve(self, right_GDo: torch.Tensor) -> torch.Tensor:
        """(X'X + damping)^-1 right."""
        at_GDo = self.order_GD.unsqueeze(2).expand_as(right_GDo)
        found_GDo = torch.cholesky_solve(right_GDo.gather(1, at_GDo), self.lower_GDD)
        return torch.empty_like(found_GDo).scatter_(1, at_GDo, found_GDo)


def _permuted(gram_GDD: torch.Tensor, order_GD: torch.Tensor) -> torch.Tensor:
    """Rows and columns in this order."""
    if len(gram_GDD) == 1:
        (order_D,) = order_GD
        return gram_GDD.index_select(1, order_D).index_select(2, order_D)
    fan = order_GD.shape[1]
    gram_GDD = gram_GDD.gather(1, order_GD.unsqueeze(2).expand(-1, -1, fan))
    return gram_GDD.gather(2, order_GD.unsqueeze(1).expand(-1, fan, -1))


class Fit:
    """A refitted layer, before it is quantized.

    weight     the layer's shape;  mean_GD  its inputs' means
    hessian    what rounding is weighed with; None where there are more inputs than positions
    ridge_G    the ridges chosen, 0 where the weights stayed
    """

    def __init__(
        self,
        weight: torch.Tensor,
        mean_GD: torch.Tensor,
        hessian: Factor | None,
        ridge_G: torch.Tensor,
    ) -> None:
        self.weight, self.mean_GD, self.ridge_G = weight, mean_GD, ridge_G
        self._hessian = hessian

    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self._hessian is None else self._hessian.lower_GDD.nbytes)

    def mean_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """(O,) mean output of `weight`, bias aside."""
        groups = len(self.mean_GD)
        w_GoD = weight.reshape(groups, weight.shape[0] // groups, -1)
        return torch.einsum("gd,god->go", self.mean_GD, w_GoD).flatten()

    def quantize(self, out: torch.Tensor, scale_O: torch.Tensor, bits: int) -> torch.Tensor:
        """The `out` channels of the weight as codes x scale_O, each block of inputs rounded to
        make up for the blocks before it.

        With X'X = R'R, R upper triangular, the error left is |R (w - q)|^2, and what a block
        should be once those behind it in R are rounded is w + R_bb^-1 R_bj (w_j - q_j): nearest
        plane, which is GPTQ without an inverse (Chen et al., 2025, "The Geometry of LLM
        Quantization").
        """
        weight = self.weight[out]
        if self._hessian is None:
            return fake_quantize(weight, scale_O, bits)
        order_GD, lower_GDD = self._hessian.order_GD, self._hessian.lower_GDD
        groups, fan = order_GD.shape
        rows = len(weight) // groups
        at_GoD = order_GD.unsqueeze(1).expand(-1, rows, -1)
        w_GoD = weight.reshape(groups, rows, fan).gather(2, at_GoD)
        codes_GoD, error_GoD = torch.empty_like(w_GoD), torch.empty_like(w_GoD)
        width = max(1, math.ceil(fan / BLOCKS)) if fan > BLOCKS else 1
        for end in range(fan, 0, -width):
            block, behind = slice(max(0, end - width), end), slice(end, fan)
            wanted_Gob = w_GoD[..., block]
            if end < fan:
                owed_Gob = error_GoD[..., behind] @ lower_GDD[:, behind, block]
                wanted_Gob = wanted_Gob + torch.linalg.solve_triangular(
                    lower_GDD[:, block, block], owed_Gob, upper=False, left=False
                )
            rounded = fake_quantize(wanted_Gob.flatten(0, 1), scale_O, bits)
            codes_GoD[..., block] = rounded.view_as(wanted_Gob)
            error_GoD[..., block] = w_GoD[..., block] - codes_GoD[..., block]
        return torch.empty_like(w_GoD).scatter_(2, at_GoD, codes_GoD).reshape(weight.shape)


def refit(
    patches_PGD: torch.Tensor,
    targets_PO: torch.Tensor,
    weight: torch.Tensor,
    ridges: Sequence[float] = RIDGES,
    *,
    centred: bool = True,
) -> Fit:
    """Refits `weight` with the best of `ridges`. If `centred`, means are left to the bias or batch
    norm.

    A singular system (dead inputs, fewer positions than inputs) is made definite by the ridge;
    one that is still not, or not finite, leaves the weight as it was, as does one that does not
    improve on it at the held-out positions. With more inputs than positions the same minimum is
    found through X X', which is the smaller system.
    """
    count, groups, fan = patches_PGD.shape
    mean_GD = patches_PGD.mean(0) * centred
    x_GPD = (patches_PGD - mean_GD).permute(1, 0, 2)
    y_PO = targets_PO - targets_PO.mean(0) * centred
    w_GDo = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    left_GPo = y_PO.reshape(count, groups, -1).permute(1, 0, 2) - x_GPD @ w_GDo
    known = count - count // HELD_OUT
    x_held, left_held = x_GPD[:, known:], left_GPo[:, known:]
    dual = fan > known
    fitted = _normal(x_GPD[:, :known], left_GPo[:, :known], dual)
    if dual:
        everything = _normal(x_GPD, left_GPo, dual)
    else:
        everything = _add(fitted, _normal(x_held, left_held, dual))

    # Every output counts alike, whatever its scale.
    weight_Go = 1 / y_PO.square().mean(0).clamp_min(1e-12).reshape(groups, -1)

    def error(left: torch.Tensor) -> torch.Tensor:
        return (left.square().mean(1) * weight_Go).sum(1)

    least_G = error(left_held) if count > known else mean_GD.new_full((groups,), torch.inf)
    ridge_G = torch.zeros_like(least_G)
    for ridge in ridges if count > known else ridges[:1]:
        change_GDo = fitted.solve(torch.full_like(ridge_G, ridge))
        if change_GDo is not None:
            error_G = error(left_held - x_held @ change_GDo).nan_to_num(0.0)  # of nothing: 0
            better_G = error_G < least_G
            least_G = torch.where(better_G, error_G, least_G)
            ridge_G = torch.where(better_G, ridge, ridge_G)
    # Where the weights stay, rounding has no ridge to go by.
    factor = None
    if not dual:
        shares_G = torch.where(ridge_G > 0, ridge_G, DAMPING)
        factor = Factor.of(everything.gram_Gnn, shares_G)
    change_GDo = None
    if bool((ridge_G > 0).any()):
        if dual:
            change_GDo = everything.solve(torch.where(ridge_G > 0, ridge_G, ridges[0]))
        elif factor is not None:
            change_GDo = factor.solve(everything.right_Gno)
    if change_GDo is not None and bool(torch.isfinite(change_GDo).all()):
        w_GDo = w_GDo + change_GDo * (ridge_G > 0)[:, None, None]
    return Fit(w_GDo.transpose(1, 2).reshape(weight.shape), mean_GD, factor, ridge_G)


@dataclass(frozen=True)
class _Normal:
    """The normal equations of left = X change + noise, or their dual: change = X' solution."""

    gram_Gnn: torch.Tensor
    right_Gno: torch.Tensor
    energy_G: torch.Tensor  # mean diagonal of X'X
    x_GnD: torch.Tensor | None = None

    def solve(self, ridge_G: torch.Tensor) -> torch.Tensor | None:
        """change_GDo at a ridge of `ridge_G` x the mean diagonal; None if that is not finite."""
        gram_Gnn = self.gram_Gnn.clone()
        gram_Gnn.diagonal(dim1=1, dim2=2).add_((ridge_G * self.energy_G + 1e-8)[:, None])
        factor, info = torch.linalg.cholesky_ex(gram_Gnn)
        if bool(info.any()):
            return None
        change = torch.cholesky_solve(self.right_Gno, factor)
        if self.x_GnD is not None:
            change = self.x_GnD.transpose(1, 2) @ change
        return change if bool(torch.isfinite(change).all()) else None


def _normal(x_GPD: torch.Tensor, left_GPo: torch.Tensor, dual: bool) -> _Normal:
    energy_G = x_GPD.square().sum((1, 2)) / x_GPD.shape[2]
    x_GDP = x_GPD.transpose(1, 2)
    if dual:
        return _Normal(gram(x_GDP), left_GPo, energy_G, x_GPD)
    return _Normal(gram(x_GPD), x_GDP @ left_GPo, energy_G)


def gram(x_GPD: torch.Tensor) -> torch.Tensor:
    """X'X (G, D, D), its equal halves computed once: a third less time for wide layers."""
    fan = x_GPD.shape[2]
    if fan <= NARROW:
        return x_GPD.transpose(1, 2) @ x_GPD
    half = fan // 2
    a, b = x_GPD[..., :half], x_GPD[..., half:]
    found = x_GPD.new_empty(len(x_GPD), fan, fan)
    found[:, :half, :half], found[:, half:, half:] = gram(a), gram(b)
    torch.matmul(a.transpose(1, 2), b, out=found[:, :half, half:])
    found[:, half:, :half] = found[:, :half, half:].transpose(1, 2)
    return found


def _add(a: _Normal, b: _Normal) -> _Normal:
    return _Normal(a.gram_Gnn + b.gram_Gnn, a.right_Gno + b.right_Gno, a.energy_G + b.energy_G)
