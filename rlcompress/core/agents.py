"""Which policy plays: what a user may name, and whether it is of the kind that is played here."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from rlcompress.core.errors import UserError
from rlcompress.core.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS
from rlcompress.core.policy import DEFAULT, Agent, Policy, PolicyShape

#: "default", the one that comes with rlcompress; a folder; None for the knapsack answer alone.
AnyPolicy: TypeAlias = Agent | Policy | Path | str | None


def agent_of(policy: AnyPolicy) -> Agent:
    """Raises UserError where it is missing, damaged or reads other observations."""
    if policy is None or isinstance(policy, Policy):
        policy = Agent(policy and policy.eval())
    elif not isinstance(policy, Agent):
        folder = DEFAULT if policy == "default" else Path(policy)
        policy = Agent.load(folder, OBSERVATION_VERSION)
    if policy.policy is not None:
        mine = policy.policy.shape
        wanted = PolicyShape(
            len(ACTION_COLUMNS), len(STATE_COLUMNS), mine.hidden, OBSERVATION_VERSION
        )
        if mine != wanted:
            raise UserError(f"policy: it is of shape {mine}, {wanted} is needed")
    return policy
