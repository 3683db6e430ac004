"""What a network's logits are worth, against labels and against the dense network's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

#: Nats.
WORST = 1e4


def compare(
    logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, float]:
    """Accuracy (0-1), cross-entropy and KL(dense || other) (nats) of logits (S, classes); both
    at most `WORST`, which is what logits that are not finite get."""
    logits, dense_logits = logits.float(), dense_logits.float()
    accuracy = float((logits.argmax(1) == labels).float().mean())
    loss = F.cross_entropy(logits, labels)
    kl = F.kl_div(
        logits.log_softmax(1), dense_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss, kl = (float(value.nan_to_num(nan=WORST).clamp(0, WORST)) for value in (loss, kl))
    return accuracy, loss, kl
