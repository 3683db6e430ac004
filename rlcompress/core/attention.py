"""Multi-head attention with its projections as plain linear layers.

`torch.nn.MultiheadAttention` keeps three quarters of its weights in one bare parameter, where no
layer-wise tool finds them. `plain_attention` puts the same weights into `nn.Linear` modules, which
load state dicts of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init


class Attention(nn.Module):
    """Computes what the given `nn.MultiheadAttention` does (Vaswani et al., 2017, section 3.2).

    Shapes: N images, T queries, S keys, E features, H heads.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout = source.num_heads, source.dropout
        self.batch_first = source.batch_first
        weight = source.in_proj_weight
        parts = (
            weight.chunk(3)
            if weight is not None
            else (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        )
        bias = source.in_proj_bias
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        self.q, self.k, self.v = map(_linear, parts, biases)
        self.out = _linear(source.out_proj.weight, source.out_proj.bias)
        #: What nn.TransformerEncoderLayer asks before it takes a short cut past this module.
        self.in_proj_bias = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before its parts are given what is theirs.
        _rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Batched inputs, as nn.MultiheadAttention's; masks are added to the scores, or True
        where boolean ones forbid."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q_NHTD, k_NHSD, v_NHSD = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _added(attn_mask, q_NHTD)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.heads))
        padding = _added(key_padding_mask, q_NHTD)
        if padding is not None:
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        weights = None
        if need_weights:
            scores = q_NHTD @ k_NHSD.transpose(-2, -1) / q_NHTD.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, self.dropout, self.training) @ v_NHSD
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            drop = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q_NHTD, k_NHSD, v_NHSD, mask, drop)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), weights


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out, fan = weight.shape
    # Weights of its own would move the caller's random numbers.
    layer: nn.Linear = skip_init(
        nn.Linear, fan, out, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _added(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as numbers to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _rename(state: dict[str, Any], prefix: str) -> None:
    """Gives the parameters of nn.MultiheadAttention below `prefix` their plain names, in place."""
    for leaf in ("weight", "bias"):
        joined = state.get(f"{prefix}in_proj_{leaf}")
        if isinstance(joined, torch.Tensor) and joined.dim() and len(joined) % 3 == 0:
            for name, part in zip("qkv", joined.chunk(3), strict=True):
                state[f"{prefix}{name}.{leaf}"] = part
            del state[f"{prefix}in_proj_{leaf}"]
        if f"{prefix}out_proj.{leaf}" in state:
            state[f"{prefix}out.{leaf}"] = state.pop(f"{prefix}out_proj.{leaf}")
    for name in "qkv":
        if f"{prefix}{name}_proj_weight" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_proj_weight")


def plain_names(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict by the names that `model` has, whose attention `plain_attention` replaced."""
    renamed = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Attention):
            _rename(renamed, f"{name}." if name else "")
    return renamed


def replaceable(name: str, module: nn.Module) -> bool:
    """Whether `plain_attention` puts plain layers in this module's place."""
    if type(module) is not nn.MultiheadAttention or not name:
        return False
    return module.bias_k is None and not module.add_zero_attn


def plain_attention(model: nn.Module) -> nn.Module:
    """Replaces every `nn.MultiheadAttention` in `model`, in place, and returns it.

    Those with learned or zero rows added to the keys stay as they are.
    """
    plain: dict[nn.Module, Attention] = {}  # one that has several names is one still
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if replaceable(name, module):
            if module not in plain:
                plain[module] = Attention(module).train(module.training)  # type: ignore[arg-type]
            model.set_submodule(name, plain[module])
    return model
