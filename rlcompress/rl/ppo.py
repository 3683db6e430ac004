"""The `ppo` searcher: RLlib's PPO trains the policy by playing compression episodes.

Of the evaluations, the first pay for the prior's sensitivities where these are to be measured; then
come the untrained policy's own schedules over the sizes (the prior's, so that the search is not
below its prior at any of them), training episodes at random sizes, and in the end the trained
policy's best guesses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from ray.tune.registry import register_env

from rlcompress.core.policy import LEARNED, PRIOR, Agent, Policy, load_policy, save_policy
from rlcompress.core.problem import Bundle, Problem
from rlcompress.core.schedule import Record
from rlcompress.rl.cluster import require_room, share, start_ray
from rlcompress.rl.config import (
    arrays,
    config,
    curve_row,
    episodes_of,
    playing,
    record_of,
    trained,
    within,
)
from rlcompress.rl.environment import make
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy, policy_shape
from rlcompress.rl.pool import Pool
from rlcompress.rl.transfer import prepared, tempered
from rlcompress.schema import PPOSpec
from rlcompress.searchers.base import Settings, in_process, probed, targets

#: Share of the evaluations for the untrained and for the trained policy's own schedules, and how
#: many of the former at most: more sizes than that differ by a few channels.
FIRST, LAST = 0.4, 0.15
MOST_FIRST = 24
REGISTERED = "rlcompress-environment"
#: Between two times that the policy is written, where iterations are shorter.
SAVE_SECONDS = 1.0


def search(
    bundle: Bundle,
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    *,
    ppo: PPOSpec,
    folder: Path,
    begin: Agent = PRIOR,
    on_iteration: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Iterator[Record]:
    """Trains and yields every measured schedule. Goes on behind `history` with the policy last
    saved in `folder` (`policy.safetensors`), which is written after every iteration
    (of short ones, every second, and after the last).

    begin         whose prior it plays on, and whose policy it starts from, if that was trained: it
                  then plays at the temperature that this was trained at
    on_iteration  gets a row of the learning curve: evaluation, mean_return, entropy, loss
    """
    if len(history) >= settings.evaluations:
        return
    problem.require_reachable(settings.target)
    problem = prepared(problem, begin)
    ppo = tempered(ppo, begin)
    pool = Pool(bundle, ppo.num_env_runners, ppo.num_gpus_per_env_runner)
    measure = in_process(problem)
    if settings.sensitivity != "estimated" and ppo.num_env_runners:
        start_ray(ppo)
        measure = pool.measure
    losses, spent = yield from probed("ppo", problem, settings, history, measure)
    problem = problem.with_losses(losses)
    env = gym.make(ENVIRONMENT, problem=problem, target=settings.target, **environment_options(ppo))
    shape = policy_shape(env, ppo.hidden)
    total, count = settings.evaluations, max(len(history), len(spent))
    resumed = count > len(spent) and (folder / "policy.json").exists()
    free = total - len(spent)
    guesses = targets(settings, min(free, MOST_FIRST, max(1, round(FIRST * free))))
    first = len(spent) + len(guesses)
    last = len(targets(settings, min(total - first, max(1, round(LAST * free)))))
    # Never more environments than episodes: nothing would be trained.
    lanes = within(ppo, max(1, total - first - last))
    batch = episodes_of(lanes, total - first - last)
    # Whole iterations only: an episode that is played is an episode in the archive.
    end = first + (total - first - last) // batch * batch

    def record(info: dict[str, Any]) -> Record:
        nonlocal count
        count += 1
        return record_of(info, settings.seed, count)

    policy = begin.policy or Policy(shape)
    if resumed:
        policy = load_policy(folder, shape.observation_version)[0]
    known = resumed or begin.policy is not None
    shape = policy.shape
    while count < first:
        yield record(greedy(policy, env, guesses[count - len(spent)]))

    if count + batch <= end:
        start_ray(ppo)
        require_room(lanes)
        register_env(REGISTERED, make)
        options = {"target": settings.target, **environment_options(ppo)}
        algorithm_config = config(
            lanes,
            shape,
            arrays(policy) if known else None,
            environment=REGISTERED,
            env_config={
                "bundle": share(bundle),
                "losses": losses,
                "seed": [settings.seed, count],
                "options": {"explore": ppo.explore, **options},
            },
            spaces=env,
            steps=len(problem.network.layers),
            episodes=batch,
            # `count` tells restarts apart.
            seed=settings.seed + 1000 * count,
        )
        with playing(algorithm_config) as (algorithm, iteration):
            saved = -SAVE_SECONDS
            while count + batch <= end:
                result, rows = iteration()
                for info in rows:
                    if count < total:
                        yield record(info)
                if count + batch > end or time.monotonic() - saved >= SAVE_SECONDS:
                    policy = trained(algorithm, shape)
                    about = {"episodes": count - first, "seed": settings.seed}
                    if begin.learned is None:
                        (folder / LEARNED).unlink(missing_ok=True)
                    else:
                        folder.mkdir(parents=True, exist_ok=True)
                        begin.learned.save(folder / LEARNED)
                    save_policy(folder, policy, about | environment_options(ppo))
                    saved = time.monotonic()
                if rows:
                    on_iteration(curve_row(result, rows, "ppo", count))
        trained_by = count
    else:
        trained_by = max(first, _trained_by(settings, history, first))
    policy.eval()
    wanted = targets(settings, total - trained_by)[count - trained_by :]
    if ppo.num_env_runners and wanted:
        start_ray(ppo)
        options = {"target": settings.target, **environment_options(ppo)}
        yield from map(record, pool.play(policy, ENVIRONMENT, options, wanted, losses))
    else:
        yield from (record(greedy(policy, env, target)) for target in wanted)


def _trained_by(settings: Settings, history: Sequence[Record], first: int) -> int:
    """How many evaluations of `history`, at least `first`, came before the trained policy's last
    guesses: those are the sizes that it ends with."""
    aimed = [record.target for record in history]
    return next(
        (
            done
            for done in range(first, len(history))
            if targets(settings, settings.evaluations - done)[: len(history) - done] == aimed[done:]
        ),
        len(history),
    )
