"""Closed-form recovery: refit a layer to what the dense network puts out, from its new inputs,
and quantize it so that later weights make up for the rounding of earlier ones.

Refit: ridge regression towards the wanted pre-activations, pulled to the weights that were there,

    min_W |Y - X W|^2 + r |W - W0|^2,   r one of `RIDGES` x mean diagonal of X'X

(its data-driven form for pruned channels is He et al., 2017, "Channel Pruning", eq. 4; pulling
towards W0 instead of zero keeps directions that the sample does not see as they were). The last
quarter of the positions is held out to choose r, and W0 stays if no r does better there. What puts
out the logits goes on from there (`logits`).

Rounding: inputs are quantized block by block, those with most energy first, and what a block's
rounding changes in the output is made up for by the blocks behind it (Frantar et al., 2023,
"GPTQ", eq. 4; blocks instead of single inputs, so that it takes a few matrix products).

Shapes: G convolution groups, D inputs per group (channels x kernel), O output channels, o outputs
per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from rlcompress.core.graph import Network
from rlcompress.core.logits import refit_logits
from rlcompress.core.moments import Factor, Rows, Sample, Sums
from rlcompress.core.quant import fake_quantize, round_codes, scale_of
from rlcompress.core.reading import estimated

#: Shares of the mean diagonal. Of nearly equal ones the first is as good as any.
RIDGES = (1.0, 0.1, 0.01)
#: Blocks that a layer's inputs are rounded in; small groups of inputs go one by one.
BLOCKS = 16
#: Share of the mean diagonal added before rounding: inputs hardly seen must not make up for much.
DAMPING = 0.01
#: Shares of the first scale that are tried, up to so many bits.
RESCALED, MOST_RESCALED = (1.0, 0.6, 0.75, 0.87, 1.15, 1.35), 3


@dataclass(frozen=True)
class Fit:
    """A refitted layer, before it is quantized.

    weight     the layer's shape;  mean_GD  its inputs' means;  mean_O  what it should put out there
    energy_GD  its inputs' mean squares around their means
    hessian    what rounding is weighed with; None where inputs outnumber the positions not held out
    ridge_G    the ridges chosen, 0 where the weights stayed
    """

    weight: torch.Tensor
    mean_GD: torch.Tensor
    mean_O: torch.Tensor
    energy_GD: torch.Tensor
    hessian: Factor | None
    ridge_G: torch.Tensor

    def nbytes(self) -> int:
        parts = [self.weight, self.mean_GD, self.mean_O, self.energy_GD, self.ridge_G]
        if self.hessian is not None:
            parts += [self.hessian.order_GD, self.hessian.lower_GDD]
        return sum(part.nbytes for part in parts)

    def scale(self, out: torch.Tensor, clip_O: torch.Tensor, bits: int) -> torch.Tensor:
        """The scale_O of the `out` channels that rounds them with the least squared error in the
        outputs, inputs taken as uncorrelated: the clip was chosen on the weights as they were.
        Of many bits `clip_O` is as good as any."""
        weight = self.weight.index_select(0, out)
        best_O = scale_of(weight, clip_O, bits)
        if bits > MOST_RESCALED:
            return best_O
        groups, fan = self.energy_GD.shape
        energy_GD1 = self.energy_GD.unsqueeze(2)
        units_GoD = (weight.flatten(1) / best_O.clamp_min(1e-30)[:, None]).view(groups, -1, fan)
        errors = []
        for share in RESCALED:
            left_GoD = round_codes(units_GoD / share, bits).mul_(share).sub_(units_GoD)
            errors.append((left_GoD.square_() @ energy_GD1).flatten())
        shares = torch.tensor(RESCALED, device=best_O.device)
        return best_O * shares[torch.stack(errors).argmin(0)]

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
        weight = self.weight.index_select(0, out)
        if self.hessian is None:
            return fake_quantize(weight, scale_O, bits)
        order_GD, lower_GDD = self.hessian.order_GD, self.hessian.lower_GDD
        groups, fan = order_GD.shape
        rows = len(weight) // groups
        at_GoD = order_GD.unsqueeze(1).expand(-1, rows, -1)
        # In units of the scale: all that follows is linear in each row.
        safe_O = torch.where(scale_O == 0, torch.ones_like(scale_O), scale_O)
        w_GoD = weight.reshape(groups, rows, fan) / safe_O.view(groups, rows, 1)
        w_GoD = w_GoD.gather(2, at_GoD)
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
            codes_Gob = round_codes(wanted_Gob, bits)
            codes_GoD[..., block] = codes_Gob
            torch.sub(w_GoD[..., block], codes_Gob, out=error_GoD[..., block])
        codes_GoD *= scale_O.view(groups, rows, 1)
        return torch.empty_like(w_GoD).scatter_(2, at_GoD, codes_GoD).reshape(weight.shape)


def free_means(model: nn.Module, network: Network) -> frozenset[str]:
    """Layers whose output's mean is made up for by their bias, or by a batch norm that is estimated
    anew: the only ones whose weights need not keep it."""
    modules = dict(model.named_modules())
    taken = {
        link.group
        for norm in network.norms
        for link in norm.links
        if norm.uses == 1 and estimated(modules[norm.name])
    }
    return frozenset(
        layer.name
        for layer in network.layers.values()
        if layer.has_bias or layer.batch_norm or taken & {link.group for link in layer.outputs}
    )


def refit(
    patches_PGD: torch.Tensor,
    targets_PO: torch.Tensor,
    weight: torch.Tensor,
    ridges: Sequence[float] = RIDGES,
    *,
    centred: bool = True,
    logits: bool = False,
) -> Fit:
    """Refits `weight` with the best of `ridges`. If `centred`, means are left to the bias or batch
    norm. Outputs that are `logits` are then fitted to say what the targets say (`refit_logits`).

    A singular system (dead inputs, fewer positions than inputs) is made definite by the ridge;
    one that is still not, or not finite, leaves the weight as it was, as does one that does not
    improve on it at the held-out positions. With more inputs than positions that are not held out
    the same minimum is found through X X'.
    """
    sample = Sample.of(patches_PGD, targets_PO, centred=centred)
    fit = refit_sample(sample, weight, ridges)
    if not logits or not centred or not bool((fit.ridge_G > 0).all()):
        return fit
    found = refit_logits(sample, targets_PO, grouped(fit.weight, 1), float(fit.ridge_G))
    return fit if found is None else replace(fit, weight=_flat(found[0], weight), mean_O=found[1])


def refit_sample(sample: Sample, weight: torch.Tensor, ridges: Sequence[float] = RIDGES) -> Fit:
    """`refit` of a sample that may be part of another."""
    groups = len(sample.mean_GD)
    w_GDo = grouped(weight, groups)
    known, held, whole = sample.known, sample.held, sample.whole
    # Every output counts alike, whatever its scale.
    spread_Go = whole.error(torch.zeros_like(w_GDo)) / sample.positions
    weight_Go = 1 / spread_Go.clamp_min(1e-12)
    least_G = weight_Go.new_full((groups,), torch.inf)
    if held is not None:
        least_G = (held.error(w_GDo) * weight_Go).sum(1)
    ridge_G = torch.zeros_like(least_G)
    for ridge in ridges if held is not None else ridges[:1]:
        change_GDo = known.change(w_GDo, torch.full_like(ridge_G, ridge))
        error_G = least_G.new_zeros(groups)
        if held is not None:
            error_G = (held.error(w_GDo + change_GDo) * weight_Go).sum(1)
        better_G = error_G < least_G
        least_G = torch.where(better_G, error_G, least_G)
        ridge_G = torch.where(better_G, ridge, ridge_G)
    # Where the weights stay, rounding has no ridge to go by.
    factor = None
    if isinstance(whole, Sums):
        factor = Factor.of(whole.gram_GDD, torch.where(ridge_G > 0, ridge_G, DAMPING))
    change_GDo = None
    if bool((ridge_G > 0).any()):
        if isinstance(whole, Rows):
            change_GDo = whole.change(w_GDo, torch.where(ridge_G > 0, ridge_G, ridges[0]))
        elif factor is not None:
            change_GDo = factor.solve(whole.left(w_GDo))
    if change_GDo is None:
        ridge_G = torch.zeros_like(ridge_G)
    else:
        finite_G = torch.isfinite(change_GDo).flatten(1).all(1)
        ridge_G = torch.where(finite_G, ridge_G, 0.0)
        w_GDo = torch.where((ridge_G > 0)[:, None, None], w_GDo + change_GDo, w_GDo)
    energy_GD = whole.energies() / sample.positions
    fitted = _flat(w_GDo, weight)
    return Fit(fitted, sample.mean_GD, sample.mean_O, energy_GD, factor, ridge_G)


def unfitted(sample: Sample, weight: torch.Tensor) -> Fit:
    """The weight as it is, to be rounded with regard to these inputs."""
    return refit_sample(sample, weight, ())


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """w_GDo of a layer's weight."""
    return weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)


def _flat(w_GDo: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the shape of `weight`."""
    return w_GDo.transpose(1, 2).reshape(weight.shape)
