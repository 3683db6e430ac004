"""What the Fisher estimates share: predictions soft enough to have gradients, the backward pass of
labels drawn from them, and who reads a group."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.errors import UserError
from rlcompress.core.graph import Link, Network

#: Share of its maximum that the mean entropy of the softened predictions comes to.
ENTROPY_SHARE = 0.25


def sound_logits(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """The logits (N, classes). Raises UserError where they give no probabilities: a class may be
    ruled out by a logit of -inf, all of them may not."""
    bad = int((~logits.softmax(1).isfinite().all(1)).sum())
    if bad:
        raise UserError(
            f"{type(model).__name__} puts out logits that are not finite, for {bad} of "
            f"{len(logits)} images; allowed: finite ones (see its weights, and the images' range)"
        )
    return logits


def temperature_of(logits: torch.Tensor) -> float:
    """At least 1: what brings the mean entropy of (N, classes) up to `ENTROPY_SHARE` of its
    maximum.

    A network that is sure of every calibration image has no gradient; softened predictions
    rank its weights all the same.
    """
    wanted = ENTROPY_SHARE * math.log(logits.shape[1])

    def entropy(temperature: float) -> float:
        logp = (logits / temperature).log_softmax(1)
        return -float((logp.exp() * logp).sum(1).mean())

    if entropy(1.0) >= wanted:
        return 1.0
    low, high = 0.0, 10.0  # log2 of the temperature
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(2**middle) < wanted else (low, middle)
    return 2**high


def backward(
    model: nn.Module, images: torch.Tensor, temperature: float, generator: torch.Generator
) -> None:
    """Gradients of -log p(y|x), summed over the images, with y drawn from the model's own softened
    predictions."""
    logits = model(images) / temperature
    model.zero_grad(set_to_none=True)
    labels = _sampled_labels(logits, generator)
    F.cross_entropy(logits, labels, reduction="sum").backward()


def _sampled_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(N,) classes drawn from the predictions."""
    probabilities = logits.detach().softmax(1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


def readers_of(network: Network) -> dict[str, list[tuple[str, Link]]]:
    """Group -> the layers that read it (depthwise ones pass it on, they are not readers); none
    of a protected group."""
    readers: dict[str, list[tuple[str, Link]]] = {g: [] for g in network.groups}
    for layer in network.layers.values():
        for link in layer.inputs if layer.kind != "depthwise" else ():
            if not network.groups[link.group].protected:
                readers[link.group].append((layer.name, link))
    return readers
