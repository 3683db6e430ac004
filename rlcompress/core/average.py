"""Moving averages of what training shows."""

from __future__ import annotations

import torch

#: Of the last ten values.
FAST = 0.9


class Average:
    """Named moving averages of tensors; the plain mean until there are 1 / (1 - decay) values."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: torch.Tensor, decay: float = FAST) -> None:
        count = self.counts[name] = self.counts.get(name, 0) + 1
        if count == 1:
            self.values[name] = value.detach().clone()
        else:
            self.values[name].lerp_(value.detach(), max(1 / count, 1 - decay))

    def drop(self, prefix: str) -> None:
        for name in [n for n in self.values if n.startswith(prefix)]:
            del self.values[name], self.counts[name]
