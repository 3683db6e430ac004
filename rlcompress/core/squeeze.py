"""Parts of compression during training: when decisions fall, and how a weight pretends to be cut
and quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.quant import max_code, round_codes, scale_of
from rlcompress.core.schedule import FULL_PRECISION


@dataclass(frozen=True)
class Pace:
    """When decisions are taken, in minibatches.

    warmup          before the first;  recovery_steps  from one to the next
    rounds          passes over the layers;  watch  minibatches that a pass is prepared on
    """

    warmup: int = 100
    recovery_steps: int = 10
    rounds: int = 2
    watch: int = 20

    def __post_init__(self) -> None:
        least = {"warmup": 2 * self.watch + 1, "recovery_steps": 1, "rounds": 1, "watch": 2}
        found = [
            f"{name} = {getattr(self, name)}: must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if found:
            raise UserError(*found)

    def steps(self, layers: int) -> int:
        """Until the last decision's recovery is over."""
        return self.warmup + self.rounds * layers * self.recovery_steps


class Squeeze(nn.Module):
    """Parametrization: the weight as it will be when the network is cut and quantized.

    mask   over the inputs, broadcast to the weight;  bits  of the weights
    clip_O share of a channel's largest kept weight that is representable
    """

    mask: torch.Tensor
    clip_O: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.bits = FULL_PRECISION
        ones = torch.ones(1, *weight.shape[1:2], *[1] * (weight.dim() - 2)).to(weight)
        # Not in the model's own state: the compressor's says what they are.
        self.register_buffer("mask", ones, persistent=False)
        self.register_buffer("clip_O", ones.new_ones(weight.shape[0]), persistent=False)

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """scale_O at this moment."""
        return scale_of(weight * self.mask, self.clip_O, self.bits)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.bits == FULL_PRECISION:
            value, through = weight, weight
        else:
            step = self.scale(weight).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))
            top = max_code(self.bits)
            value = round_codes(weight.detach() / step, self.bits) * step
            through = torch.maximum(torch.minimum(weight, top * step), -top * step)
        return (value * self.mask).detach() + (through - through.detach())
