"""What became of gradients between the backward pass and the weights: scaled losses are unscaled,
large gradients clipped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def leaf(module: nn.Module) -> torch.Tensor:
    """The weight before any parametrization."""
    if "weight" in getattr(module, "parametrizations", {}):
        return module.parametrizations.weight.original  # type: ignore[union-attr, return-value]
    return module.weight  # type: ignore[return-value]


class GradientScale:
    """Catches one weight's gradient as it comes out of the backward passes of a minibatch."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._raw: torch.Tensor | None = None
        self._tap: RemovableHandle | None = None

    def catch(self, modules: Iterable[nn.Module]) -> None:
        """From now on, of the smallest weight that is trained."""
        trained = [module for module in modules if leaf(module).requires_grad]
        if self._tap is not None or not trained:
            return
        self._module = min(trained, key=lambda module: leaf(module).numel())
        self._tap = leaf(self._module).register_hook(self._take)

    def _take(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().float()
        self._raw = gradient.clone() if self._raw is None else self._raw + gradient

    def value(self) -> float:
        """The weights' gradients by now over what the backward passes gave; 1 where none was
        caught."""
        if self._raw is None or self._module is None:
            return 1.0
        now, size = leaf(self._module).grad, float(self._raw.norm())
        return float(now.float().norm()) / size if now is not None and size > 0 else 1.0

    def let_go(self) -> None:
        """A minibatch is over."""
        if self._tap is not None:
            self._tap.remove()
        self._module = self._raw = self._tap = None
