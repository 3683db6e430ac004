"""Weight quantization: per-channel, symmetric, 1-8 bits.

A weight is `scale[o] * code`, code an integer. At 4-8 bits the codes are
-(2^(b-1)-1) ... 2^(b-1)-1. At 1 to 3 bits they are the odd numbers -(2^b-1) ... 2^b-1: a
symmetric grid with zero wastes one of its 2^b levels, which costs a normal distribution
0.19 against 0.12 of its variance at 2 bits (Max, 1960; at 1 bit, where the codes are signs, 0.36),
and nothing that matters at 4 and up.

Shapes: w_O... a weight with O output channels first; scale_O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from rlcompress.core.errors import UserError, blame, did_you_mean
from rlcompress.core.graph import Network
from rlcompress.core.models import find_factory
from rlcompress.core.schedule import FULL_PRECISION

ODD_BITS = (1, 2, 3)
#: Clip candidates: the largest representable magnitude as a share of the channel's largest.
CLIP_GRID = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HISTOGRAM_BINS = 64
#: Deviation, as a share of the values, up to which a channel is constant in float32.
CONSTANT = 1e-6
#: Bounds of the clip rules' work on very large layers.
MOST_INPUTS, MOST_OUTPUTS = 8192, 256


#: How a clip share is chosen; see `choose_clip`.
RULES = ("auto", "kl", "mse")


def max_code(bits: int) -> int:
    """Largest code at `bits`."""
    return 2**bits - 1 if bits in ODD_BITS else 2 ** (bits - 1) - 1


def _per_channel(scale_O: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale_O.view(-1, *[1] * (weight.dim() - 1))


def round_codes(scaled: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest codes (float) of weights already divided by their scale."""
    top = max_code(bits)
    codes = 2 * torch.floor(scaled / 2) + 1 if bits in ODD_BITS else torch.round(scaled)
    return codes.clamp(-top, top)


def encode(weight: torch.Tensor, scale_O: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes (int16, the weight's shape)."""
    safe = torch.where(scale_O == 0, torch.ones_like(scale_O), scale_O)
    return round_codes(weight / _per_channel(safe, weight), bits).to(torch.int16)


def fake_quantize(weight: torch.Tensor, scale_O: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights as they come back: code x scale."""
    safe = torch.where(scale_O == 0, torch.ones_like(scale_O), scale_O)
    return round_codes(weight / _per_channel(safe, weight), bits) * _per_channel(scale_O, weight)


def scale_of(weight: torch.Tensor, clip: torch.Tensor | float, bits: int) -> torch.Tensor:
    """scale_O for clipping at `clip` (a share, scalar or (O,)) of each channel's largest weight."""
    return clip * weight.detach().abs().flatten(1).amax(1) / max_code(bits)


def mse_clip(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """clip_O in `CLIP_GRID` with the least squared error of the weights, channel by channel; of
    evenly spaced ones where a channel has more than `MOST_INPUTS`."""
    full = scale_of(weight, 1.0, bits)
    flat = weight.flatten(1)
    flat = flat[:, :: -(-flat.shape[1] // MOST_INPUTS)]
    errors = torch.stack(
        [(fake_quantize(flat, c * full, bits) - flat).square().sum(1) for c in CLIP_GRID]
    )
    return torch.tensor(CLIP_GRID, dtype=weight.dtype, device=weight.device)[errors.argmin(0)]


def histogram_kl(reference_PO: torch.Tensor, other_PO: torch.Tensor) -> float:
    """Mean over channels of KL(P || Q), nats: P, Q the histograms of a channel's outputs.

    Migacz (2017) calibrates activations so; here both sides share `HISTOGRAM_BINS` equal bins
    over the reference's range (outliers of `other` fall into the end bins), with half a count
    added to every bin.
    """
    low, high = reference_PO.amin(0), reference_PO.amax(0)
    width = (high - low).clamp_min(1e-12) / HISTOGRAM_BINS

    def histogram(values_PO: torch.Tensor) -> torch.Tensor:
        bins = ((values_PO - low) / width).long().clamp_(0, HISTOGRAM_BINS - 1)
        counts = torch.full(
            (values_PO.shape[1], HISTOGRAM_BINS), 0.5, device=values_PO.device
        ).scatter_add_(1, bins.T, torch.ones_like(values_PO.T))
        return counts / counts.sum(1, keepdim=True)

    p, q = histogram(reference_PO), histogram(other_PO)
    return float((p * (p / q).log()).sum(1).mean())


def unexplained(reference_PO: torch.Tensor, other_PO: torch.Tensor) -> torch.Tensor:
    """Share (O,) of each channel's variance that a scale and a shift of `other` leave: 1 - r^2.
    All of it where `other` says nothing or is not finite, none where the reference has none."""
    a, b = reference_PO - reference_PO.mean(0), other_PO - other_PO.mean(0)
    size_O = a.norm(dim=0)
    r_O = (a * b).sum(0) / (size_O * b.norm(dim=0))
    left_O = (1 - r_O.square()).nan_to_num(nan=1.0).clamp(0, 1)
    # What rounding leaves of a constant is no variance.
    return torch.where(size_O > CONSTANT * reference_PO.norm(dim=0), left_O, 0.0)


def choose_clip(
    weight: torch.Tensor, patches_PGD: torch.Tensor, bits: int, rule: str = "auto"
) -> tuple[torch.Tensor, float]:
    """The clip share of each channel and the KL of what the layer then puts out.

    patches_PGD  P sampled input patches, G convolution groups, D inputs per group
    rule         "kl": the one share in `CLIP_GRID` whose outputs are closest to the dense ones
                 in `histogram_kl`; "mse": `mse_clip`; "auto": of the two, the one that leaves
                 less of the outputs' variance unexplained (neither rule wins everywhere);
                 "package.module:function": one's own, called as `mse_clip` is

    Raises UserError for another rule, or if one's own gives anything but a share in (0, 1] for each
    channel.
    """
    if rule not in RULES and ":" not in rule:
        allowed = f'{", ".join(RULES)} or "package.module:function"'
        raise UserError(f'clip = "{rule}": allowed: {allowed}{did_you_mean(rule, RULES)}')

    # A share of the convolution groups, or of the one group's output channels.
    every = -(-weight.shape[0] // MOST_OUTPUTS)
    sampled = weight
    if every > 1:
        groups = patches_PGD.shape[1]
        whole = weight.unflatten(0, (groups, -1))
        if groups >= MOST_OUTPUTS:
            patches_PGD, sampled = patches_PGD[:, ::every], whole[::every].flatten(0, 1)
        elif groups == 1:
            sampled = weight[::every]

    def outputs(clip: torch.Tensor | float) -> torch.Tensor:
        scale = scale_of(sampled, clip, bits)
        return layer_outputs(patches_PGD, fake_quantize(sampled, scale, bits))

    reference = layer_outputs(patches_PGD, sampled)
    if ":" in rule:
        return own_clip(rule, weight, bits), histogram_kl(
            reference, outputs(own_clip(rule, sampled, bits))
        )
    by_mse = mse_clip(weight, bits)
    out_mse = outputs(mse_clip(sampled, bits))
    kl_mse = histogram_kl(reference, out_mse)
    if rule == "mse":
        return by_mse, kl_mse
    best_kl, best_clip, best_out = math.inf, 1.0, out_mse
    for clip in CLIP_GRID:
        out = outputs(clip)
        kl = histogram_kl(reference, out)
        if kl < best_kl:
            best_kl, best_clip, best_out = kl, clip, out
    by_kl = torch.full_like(by_mse, best_clip)
    if rule == "kl":
        return by_kl, best_kl
    worse = unexplained(reference, best_out).mean() > unexplained(reference, out_mse).mean()
    return (by_mse, kl_mse) if worse else (by_kl, best_kl)


def own_clip(rule: str, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What "package.module:function" gives, called as `mse_clip` is. Raises UserError for anything
    but a share in (0, 1] for each channel."""
    function = find_factory(rule, {})
    try:
        clip_O = function(weight, bits)
    except Exception as error:  # the user's own code raises what it likes
        raise UserError(f'clip "{rule}", called with (weight, bits): {blame(error)}') from error
    shaped = isinstance(clip_O, torch.Tensor) and clip_O.shape == weight.shape[:1]
    if not shaped or not bool(((clip_O > 0) & (clip_O <= 1)).all()):
        raise UserError(
            f'clip "{rule}": gave no tensor of {weight.shape[0]} shares in (0, 1], one a channel'
        )
    return clip_O.to(weight)


def layer_outputs(patches_PGD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(P, O) outputs without bias of a convolution or linear layer at sampled patches."""
    groups = patches_PGD.shape[1]
    w_GOD = weight.reshape(groups, weight.shape[0] // groups, -1)
    return torch.einsum("pgd,god->pgo", patches_PGD, w_GOD).flatten(1)


class FakeQuant(nn.Module):
    """Parametrization: straight-through quantization with a learned per-channel step.

    Bengio et al. (2013) for the straight-through gradient of the weights; the step's logarithm is
    what is learned (Jain et al., 2020, "Trained Quantization Thresholds", section 3.2): its updates
    are relative. Learned as it is (LSQ), a step of 8 bits, a hundredth of its clipping range,
    collapsed to nothing within an epoch of SGD in depthwise layers.
    """

    def __init__(self, bits: int, scale_O: torch.Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("start_O", scale_O.detach().clamp_min(1e-12))
        self.log_O = nn.Parameter(torch.zeros_like(self.start_O))

    @property
    def scale(self) -> torch.Tensor:
        """scale_O as it is now."""
        return self.start_O * self.log_O.exp()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        step = _per_channel(self.scale, weight)
        scaled = weight / step
        top = max_code(self.bits)
        # Inside the range the weight's gradient passes; outside only the step's does.
        clipped = scaled.clamp(-top, top)
        return (clipped + (round_codes(scaled, self.bits) - clipped).detach()) * step


def attach_fake_quant(
    model: nn.Module, network: Network, bits: Mapping[str, int], scales: Mapping[str, torch.Tensor]
) -> None:
    """Quantizes the forward pass of `model` in place; `scales` gives each layer's scale_O."""
    modules = dict(model.named_modules())
    for name in network.layers:
        if bits.get(name, FULL_PRECISION) == FULL_PRECISION:
            continue
        weight = modules[name].weight
        quantizer = FakeQuant(bits[name], scales[name].to(weight))
        parametrize.register_parametrization(modules[name], "weight", quantizer)


def float_weight(module: nn.Module) -> torch.Tensor:
    """The weight before any parametrization."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations.weight.original.detach()  # type: ignore[union-attr, return-value]
    return module.weight.detach()  # type: ignore[operator, union-attr, return-value]


def learned_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer -> scale_O of every fake quantizer attached to `model`."""
    return {
        name: quantizer.scale.detach()
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        for quantizer in module.parametrizations.weight  # type: ignore[union-attr]
        if isinstance(quantizer, FakeQuant)
    }
