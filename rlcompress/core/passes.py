"""What the passes of one minibatch say of a network's channels; see `signals`.

Shapes: N images of a pass that are looked at, C channels of a group, K keep ratios.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Passes:
    """Passes of training since the last `clear`: one, or several where gradients are accumulated or
    a loss has two views. Terms of a pass are sums over the layers that read a group; those of
    several passes are of other images."""

    def __init__(self) -> None:
        self._images: list[int] = []
        self._seen: set[int] = set()
        self._terms: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def begin(self, images: int) -> None:
        """A forward pass of so many images."""
        self._images.append(images)

    @property
    def place(self) -> int:
        """The number of the pass at hand; -1 before the first."""
        return len(self._images) - 1

    def images_of(self, place: int) -> int:
        """0 of a pass that is over."""
        return self._images[place] if 0 <= place < len(self._images) else 0

    def images(self) -> int:
        """Of all passes that were gone through backwards, or begun, if none says so."""
        return sum(self._images[place] for place in self._seen) or sum(self._images)

    def add(
        self, group: str, place: int, taylor_NC: torch.Tensor, predicted_NK: torch.Tensor | None
    ) -> None:
        """What one reader says. `predicted_NK` is what the kept channels make up for, where that is
        known."""
        self._seen.add(place)
        known_NC, known_NK = self._terms.get((group, place), (None, None))
        if known_NC is not None:
            taylor_NC = taylor_NC + known_NC
        if predicted_NK is not None and known_NK is not None:
            predicted_NK = predicted_NK + known_NK
        self._terms[group, place] = taylor_NC, predicted_NK

    def terms(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """(group, (N, C), (N, K)) of all passes together."""
        for group in dict.fromkeys(group for group, _ in self._terms):
            parts = [terms for (name, _), terms in self._terms.items() if name == group]
            taylor = [part for part, _ in parts]
            predicted = [part for _, part in parts if part is not None]
            known = len(predicted) == len(parts)
            yield group, torch.cat(taylor), torch.cat(predicted) if known else None

    def clear(self) -> None:
        self._images.clear()
        self._seen.clear()
        self._terms.clear()
