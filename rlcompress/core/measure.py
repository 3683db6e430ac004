"""What a network's logits are worth, against labels and against the dense network's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

#: Nats.
WORST = 1e4


def divergence(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL (nats) from `taught`, log-probabilities (N, classes), to what `logits` say; mean over
    images. A class that is ruled out by a logit of -inf adds nothing."""
    terms = F.kl_div(logits.log_softmax(1), taught, log_target=True, reduction="none")
    return terms.masked_fill(taught == -torch.inf, 0.0).sum() / len(taught)


def compare(
    logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, float]:
    """Accuracy (0-1), cross-entropy and KL(dense || other) (nats) of logits (S, classes); both
    at most `WORST`, which is what logits that are no numbers get; their image counts as wrong."""
    logits, dense_logits = logits.float(), dense_logits.float()
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    accuracy = float(right.float().mean())
    loss = F.cross_entropy(logits, labels)
    kl = divergence(logits, dense_logits.log_softmax(1))
    loss, kl = (float(value.nan_to_num(nan=WORST).clamp(0, WORST)) for value in (loss, kl))
    return accuracy, loss, kl
