"""The policy network: one scorer shared by all actions, added to the prior's logits.

logit(a) = prior(a) + f(row of a, state). The last layer of f starts at zero, so an untrained
policy is the prior. f sees rows, not layers or networks: any number of actions, any network.

Shapes: N observations, A actions, F action columns, S state columns, H hidden units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from rlcompress.core.cost import CostModel
from rlcompress.core.errors import UserError
from rlcompress.core.files import save_json
from rlcompress.core.graph import Network
from rlcompress.core.learned import LearnedLosses, load_learned
from rlcompress.core.prior import Losses
from rlcompress.core.process import seeded
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.tensors import load_tensors, save_tensors

ILLEGAL = -1e9
#: The folder of the policy that comes with this package.
DEFAULT = Path(__file__).parents[1] / "policies" / "default"
#: Of a policy's folder: the losses that its prior goes by, where they are learned.
LEARNED = "losses.safetensors"


@dataclass(frozen=True)
class PolicyShape:
    """What a policy was made for. Environments of another observation version refuse it."""

    action_columns: int
    state_columns: int
    hidden: int
    observation_version: int


class Policy(nn.Module):
    """Scores actions and values states."""

    def __init__(self, shape: PolicyShape) -> None:
        super().__init__()
        self.shape = shape
        hidden = shape.hidden
        self.rows = nn.Linear(shape.action_columns, hidden)
        self.state = nn.Linear(shape.state_columns, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.critic = nn.Sequential(
            nn.Linear(hidden + shape.state_columns, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, observation: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """observation: actions (N, A, F), state (N, S), mask (N, A) -> logits (N, A) with
        illegal ones at -1e9, values (N,)."""
        rows_NAF, state_NS = observation["actions"], observation["state"]
        legal_NA = observation["mask"] > 0.5
        hidden_NAH = F.silu(self.rows(rows_NAF) + self.state(state_NS).unsqueeze(1))
        hidden_NAH = F.silu(self.mix(hidden_NAH))
        logits_NA = rows_NAF[..., -1] + self.score(hidden_NAH).squeeze(-1)
        share_NA = legal_NA / legal_NA.sum(1, keepdim=True).clamp_min(1)
        pooled_NH = (hidden_NAH * share_NA.unsqueeze(-1)).sum(1)
        values_N = self.critic(torch.cat([pooled_NH, state_NS], 1)).squeeze(-1)
        return torch.where(legal_NA, logits_NA, torch.full_like(logits_NA, ILLEGAL)), values_N

    @torch.no_grad()
    def best_action(self, observation: Mapping[str, Any]) -> int:
        """The most probable legal action for one observation of numpy arrays."""
        batch = {name: torch.as_tensor(value).unsqueeze(0) for name, value in observation.items()}
        return int(self(batch)[0].argmax())


def save_policy(folder: Path, policy: Policy, about: Mapping[str, Any]) -> None:
    """Writes `policy.safetensors` and `policy.json` (its shape and `about`), each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "policy.safetensors", policy.state_dict())
    save_json(folder / "policy.json", {"shape": asdict(policy.shape), **about})


def load_policy(folder: Path, observation_version: int) -> tuple[Policy, dict[str, Any]]:
    """The policy in `folder` and what was said about it.

    Raises UserError if it is missing, damaged or of another observation version.
    """
    try:
        about = json.loads((folder / "policy.json").read_text())
        shape = PolicyShape(**about.pop("shape"))
        with seeded(0):  # weights that are replaced
            policy = Policy(shape)
        policy.load_state_dict(load_tensors(folder / "policy.safetensors")[0])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no intact policy: {error}") from error
    if shape.observation_version != observation_version:
        raise UserError(
            f"{folder}: the policy reads observation version {shape.observation_version}, "
            f"this environment gives version {observation_version}; train it again"
        )
    return policy.eval(), about


@dataclass(frozen=True)
class Agent:
    """What a folder of a policy holds, as it plays.

    policy       None where PPO never trained it: its prior's answers are its own
    learned      what corrects the estimates of its prior; None = they stay as they are
    temperature  of the prior, while PPO trained the policy
    """

    policy: Policy | None = None
    learned: LearnedLosses | None = None
    temperature: float = 1.0

    @classmethod
    def load(cls, folder: Path, observation_version: int) -> Agent:
        """Raises UserError as `load_policy` and `load_learned` do."""
        policy, about = load_policy(folder, observation_version)
        learned = load_learned(folder / LEARNED) if (folder / LEARNED).exists() else None
        played = policy if about.get("episodes") else None
        return cls(played, learned, float(about.get("temperature", 1.0)))

    def losses(self, network: Network, costs: CostModel, estimates: Estimates) -> Losses:
        """What the prior goes by, for layers that are refitted."""
        if self.learned is None:
            return Losses.of(network, estimates, refitted=True)
        return self.learned.corrected(network, costs, estimates)


#: The prior on the estimates, and nothing learned.
PRIOR = Agent()
