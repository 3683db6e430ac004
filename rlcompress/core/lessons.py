"""Cloning: the policy learns, from what is cheap to see, the choices of a teacher that knows what
is dear to measure.

The teacher is the knapsack's prior on losses that were measured with the readers refitted; the
policy sees estimates of one backward pass. A lesson is a step of an episode: what the policy sees
and the teacher's logits (soft labels: Hinton et al., 2015), in episodes that the teacher played,
that the policy's own prior played and that both played by turns, so that the policy knows what to
do where its own mistakes lead (Ross et al., 2011).

Shapes: N lessons, A actions, F action columns, S state columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from rlcompress.core.policy import ILLEGAL, Policy
from rlcompress.core.tensors import load_tensors, save_tensors

BATCH = 256


@dataclass(frozen=True)
class Lessons:
    """Steps of one network's episodes, float32. returns_N: rewards from the step to the end."""

    actions_NAF: torch.Tensor
    state_NS: torch.Tensor
    mask_NA: torch.Tensor
    teacher_NA: torch.Tensor
    returns_N: torch.Tensor

    @classmethod
    def of(cls, steps: Sequence[tuple[dict[str, np.ndarray], np.ndarray, float]]) -> Lessons:
        """From (observation, teacher's logits, reward) of an episode's steps in order."""
        rewards = np.array([reward for _, _, reward in steps])
        actions, state, mask = (
            torch.tensor(np.stack([seen[name] for seen, _, _ in steps]))
            for name in ("actions", "state", "mask")
        )
        return cls(
            actions,
            state,
            mask,
            torch.tensor(np.stack([logits for _, logits, _ in steps])),
            torch.tensor(rewards[::-1].cumsum()[::-1].copy(), dtype=torch.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Lessons]) -> Lessons:
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.returns_N)

    def save(self, path: Path, **about: Any) -> None:
        """With JSON values beside it."""
        save_tensors(path, {f.name: getattr(self, f.name) for f in fields(self)}, **about)

    @classmethod
    def load(cls, path: Path) -> tuple[Lessons, dict[str, Any]]:
        tensors, about = load_tensors(path)
        return cls(**tensors), about


def clone(
    policy: Policy, networks: Sequence[Lessons], *, epochs: int, lr: float, seed: int
) -> list[dict[str, float]]:
    """Trains the policy in place, every network weighing the same. A row an epoch: `loss`, the
    cross-entropy to the teacher above the teacher's own entropy (nats), and `value`, the critic's
    squared error.

    epochs  passes over as many lessons as there are;  lr  peak learning rate of AdamW
    """
    every = Lessons.joined(networks)
    # The teacher's choice among what is legal.
    legal_NA = every.mask_NA > 0.5
    teacher_NA = torch.where(legal_NA, every.teacher_NA, torch.full_like(every.teacher_NA, ILLEGAL))
    chance_NA = teacher_NA.softmax(1)
    entropy_N = torch.special.entr(chance_NA).sum(1)
    weight_N = torch.cat([torch.full((len(n),), 1.0 / len(n)) for n in networks])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=1e-3)
    steps = -(-len(every) // BATCH)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(1, epochs * steps))
    rows = []
    policy.train()
    for _ in range(epochs):
        losses, errors = [], []
        for _ in range(steps):
            index = torch.multinomial(weight_N, BATCH, replacement=True, generator=generator)
            logits_BA, values_B = policy(
                {
                    "actions": every.actions_NAF[index],
                    "state": every.state_NS[index],
                    "mask": every.mask_NA[index],
                }
            )
            cross_B = -(chance_NA[index] * logits_BA.log_softmax(1)).sum(1)
            loss = (cross_B - entropy_N[index]).mean()
            error = F.mse_loss(values_B, every.returns_N[index])
            optimizer.zero_grad()
            # Little of the critic: it must not pull at what it shares with the scorer.
            (loss + 0.1 * error).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            plan.step()
            losses.append(float(loss.detach()))
            errors.append(float(error.detach()))
        rows.append({"loss": float(np.mean(losses)), "value": float(np.mean(errors))})
    policy.eval()
    return rows
