"""The `transfer` searcher: a policy trained elsewhere compresses this network.

Zero-shot, one episode a size; what evaluations are left refine those schedules by local search. A
policy that PPO never trained is its prior, the knapsack on the losses that it learned: each size
gets the ladder's answer, which is within a percent of the integer program's losses. Starts no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym

from rlcompress.core.policy import Agent
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy
from rlcompress.schema import PPOSpec
from rlcompress.searchers.base import (
    Measure,
    Proposal,
    Settings,
    measured,
    spread_order,
    targets,
)
from rlcompress.searchers.local import refine

#: Sizes that the policy plays, in such an order that the first ones lie evenly too.
SIZES = 24


def prepared(problem: Problem, agent: Agent) -> Problem:
    """The problem with a prior on the losses that `agent` has learned. They are of layers that
    are refitted: where the search does not refit, the prior stays as it is; as it does where the
    agent has learned none."""
    evaluator = problem.evaluator
    if agent.learned is None or evaluator.recovery != "reconstruct":
        return problem
    losses = agent.losses(problem.network, evaluator.costs, evaluator.estimates)
    return problem.with_losses(losses)


def tempered(ppo: PPOSpec, agent: Agent) -> PPOSpec:
    """With the prior's temperature that the agent's policy was trained at, if it was: it is part of
    what the policy learned on."""
    if agent.policy is None:
        return ppo
    return ppo.model_copy(update={"temperature": agent.temperature})


def search(
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    *,
    ppo: PPOSpec,
    agent: Agent,
) -> Iterator[Record]:
    """`agent` plays up to `SIZES` sizes, then they are refined. Goes on behind `history`."""
    problem.require_reachable(settings.target)
    problem = prepared(problem, agent)
    sizes, past = targets(settings, SIZES), list(history)
    zero_shot = [sizes[i] for i in spread_order(len(sizes))][: settings.evaluations]
    answers = (problem.prior.schedule(problem.dense.bytes / target) for target in zero_shot)
    proposals: Iterator[Proposal] = zip(answers, zero_shot, strict=True)
    if agent.policy is not None:
        options = environment_options(tempered(ppo, agent))
        env = gym.make(ENVIRONMENT, problem=problem, target=settings.target, **options)
        played = (greedy(agent.policy, env, target) for target in zero_shot[len(past) :])
        found: Iterator[Record] = (_record(info, settings, len(past) + 1) for info in played)
    else:
        first = replace(settings, evaluations=len(zero_shot))
        found = measured("transfer", first, past, measure, proposals)
    for record in found:
        past.append(record)
        yield record
    yield from refine("transfer", problem, settings, past, measure, len(zero_shot))


def _record(info: dict[str, Any], settings: Settings, evaluation: int) -> Record:
    return Record(
        Schedule.from_json(info["schedule"]),
        Measurement.from_dict(info["measurement"]),
        "transfer",
        settings.seed,
        evaluation,
        float(info["target"]),
    )
