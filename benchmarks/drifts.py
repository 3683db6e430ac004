"""Data that change: splits made from the real images of a split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from rlcompress.core.data import Split

DEGREES, NOISE, CONTRAST, RARE = 45.0, 0.25, 0.35, 0.1


def rotated(split: Split, generator: torch.Generator) -> Split:
    """Turned by `DEGREES`."""
    turned = rotate(split.raw_NCHW, DEGREES, interpolation=InterpolationMode.BILINEAR)
    return Split(turned, split.labels_N, split.mean, split.std)


def noisy(split: Split, generator: torch.Generator) -> Split:
    """With Gaussian noise of `NOISE` of the range of values."""
    top = 255.0 if split.raw_NCHW.dtype == torch.uint8 else float(split.raw_NCHW.max())
    noise = torch.randn(split.raw_NCHW.shape, generator=generator) * NOISE * top
    images = (split.raw_NCHW.float() + noise).clamp(0, top)
    return Split(images.to(split.raw_NCHW.dtype), split.labels_N, split.mean, split.std)


def flat(split: Split, generator: torch.Generator) -> Split:
    """With `CONTRAST` of the contrast."""
    raw = split.raw_NCHW.float()
    mean = raw.mean((1, 2, 3), keepdim=True)
    images = mean + CONTRAST * (raw - mean)
    return Split(images.to(split.raw_NCHW.dtype), split.labels_N, split.mean, split.std)


def shifted(split: Split, generator: torch.Generator) -> Split:
    """The first half of the classes `RARE` times as frequent as they were."""
    rare = split.labels_N < (int(split.labels_N.max()) + 1) // 2
    stay = torch.rand(len(split), generator=generator) < RARE
    return split.take(torch.nonzero(~rare | stay).flatten())


DRIFTS: dict[str, Callable[[Split, torch.Generator], Split]] = {
    "rotation": rotated,
    "noise": noisy,
    "contrast": flat,
    "priors": shifted,
}


def drifted(split: Split, kind: str, seed: int) -> Split:
    return DRIFTS[kind](split, torch.Generator().manual_seed(seed))
