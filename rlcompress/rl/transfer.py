"""The `transfer` searcher: a policy trained elsewhere compresses this network.

Zero-shot, one episode a size; what evaluations are left refine those schedules by local search.
Starts no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import gymnasium as gym

from rlcompress.core.learned import load_learned
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.policy import LEARNED, load_policy
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy
from rlcompress.schema import PPOSpec
from rlcompress.searchers.base import Measure, Settings, spread_order, targets
from rlcompress.searchers.local import refine

#: Sizes that the policy plays, in such an order that the first ones lie evenly too.
SIZES = 24


def prepared(problem: Problem, folder: Path) -> Problem:
    """The problem with a prior on the losses that the policy in `folder` has learned, if it has."""
    if not (folder / LEARNED).exists():
        return problem
    evaluator = problem.evaluator
    learned = load_learned(folder / LEARNED)
    losses = learned.corrected(problem.network, evaluator.costs, evaluator.estimates)
    return problem.with_losses(losses)


def search(
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    *,
    ppo: PPOSpec,
    folder: Path,
) -> Iterator[Record]:
    """Plays the policy in `folder` at up to `SIZES` sizes, then refines. Goes on behind
    `history`. Raises UserError where the policy is damaged or of another observation version."""
    problem.require_reachable(settings.target)
    policy, about = load_policy(folder, OBSERVATION_VERSION)
    problem = prepared(problem, folder)
    # The prior's temperature is part of what the policy learned on.
    options = environment_options(ppo) | {
        name: about[name] for name in ("temperature",) if name in about
    }
    env = gym.make(ENVIRONMENT, problem=problem, target=settings.target, **options)
    sizes, past = targets(settings, SIZES), list(history)
    zero_shot = [sizes[i] for i in spread_order(SIZES)][: settings.evaluations]
    for target in zero_shot[len(past) :]:
        info = greedy(policy, env, target)
        record = Record(
            Schedule.from_json(info["schedule"]),
            Measurement.from_dict(info["measurement"]),
            "transfer",
            settings.seed,
            len(past) + 1,
            target,
        )
        past.append(record)
        yield record
    yield from refine("transfer", problem, settings, past, measure, len(zero_shot))
