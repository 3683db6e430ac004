"""Every use of a layer's weight, seen where PyTorch computes with it.

A convolution or linear layer ends in `conv2d` or `linear` whether its module is called or its
weight is read by other code (attention does that). `LayerCalls` stands there: it needs no hook
on modules and no traceable control flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rlcompress.core.quant import float_weight

Pair = tuple[int, int]


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@dataclass(frozen=True)
class Window:
    """How a convolution walks over its (padded) input."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


@dataclass(frozen=True)
class Call:
    """One use of a layer: its name, its input, the parameters given and, for a convolution,
    its window."""

    name: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    window: Window | None = None
    conv_groups: int = 1

    def apply(
        self, weight: torch.Tensor, bias: torch.Tensor | None, conv_groups: int
    ) -> torch.Tensor:
        """The layer's output for its input and these parameters, in the input's precision."""
        weight = weight.to(self.x.dtype)
        bias = None if bias is None else bias.to(self.x.dtype)
        if self.window is None:
            return F.linear(self.x, weight, bias)
        w = self.window
        return F.conv2d(
            self.x,
            weight.contiguous(memory_format=torch.channels_last),
            bias,
            w.stride,
            w.padding,
            w.dilation,
            conv_groups,
        )

    def run(self) -> torch.Tensor:
        """What it computes if nobody interferes."""
        return self.apply(self.weight, self.bias, self.conv_groups)


def _convolution(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Call:
    kernel, spread = _pair(tuple(weight.shape[2:])), _pair(dilation)
    if padding == "same":
        down, right = (d * (k - 1) for k, d in zip(kernel, spread, strict=True))
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    numbers = _pair((0, 0) if isinstance(padding, str) else padding)
    window = Window(kernel, _pair(stride), numbers, spread)
    return Call(name, x, weight, bias, window, groups)


def _linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> Call:
    return Call(name, x, weight, bias)


_KINDS: Mapping[Any, Callable[..., Call]] = {F.conv2d: _convolution, F.linear: _linear}


class LayerCalls(TorchFunctionMode):
    """While active, `handle` is given every `Call` of the named weights and computes its output.

    weights  layer -> the very tensor that its module holds
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        handle: Callable[[Call], torch.Tensor],
    ) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        # Addresses may be used again: the tensors must live as long as the names.
        self._weights = weights
        self._handle = handle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is not None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(id(weight))
            if name is not None:
                given = {"x" if key == "input" else key: value for key, value in kwargs.items()}
                # Whatever surrounds it: a handler solves equations, which is no work for bfloat16.
                with torch.autocast(weight.device.type, enabled=False):
                    return self._handle(kind(name, *args, **given))
        return func(*args, **kwargs)


def as_call(name: str, module: nn.Conv2d | nn.Linear, x: torch.Tensor) -> Call:
    """A module's own use of its weight, before any parametrization of it, on the input `x`."""
    weight = float_weight(module)
    if isinstance(module, nn.Linear):
        return _linear(name, x, weight, module.bias)
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)
        padding = 0
    return _convolution(
        name, x, weight, module.bias, module.stride, padding, module.dilation, module.groups
    )


def layer_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> weight of every Conv2d and Linear in `model`."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
