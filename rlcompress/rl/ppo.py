"""The `ppo` searcher: RLlib's PPO trains the policy by playing compression episodes.

Of the evaluations, the first pay for the prior's sensitivities where these are to be measured, a
few are the untrained policy's own schedules (the prior's, so the search is never below its prior),
most are training episodes at random sizes, and the last ones
are the trained policy's best guesses over the sizes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

from rlcompress.core.errors import UserError
from rlcompress.core.policy import Policy, PolicyShape, load_policy, save_policy
from rlcompress.core.problem import Bundle, Problem
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.rl.cluster import share, start_ray
from rlcompress.rl.environment import RECORDS, CompressionCallbacks, make
from rlcompress.rl.module import PolicyModule
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy, policy_shape
from rlcompress.rl.pool import Pool
from rlcompress.schema import PPOSpec
from rlcompress.searchers.base import Settings, in_process, probed, targets

#: Share of the evaluations for the untrained and for the trained policy's own schedules.
FIRST, LAST = 0.05, 0.15
#: Iterations without a finished episode before the search gives up.
MOST_IDLE = 5
REGISTERED = "rlcompress-environment"


def config(
    bundle: Any,
    problem: Problem,
    settings: Settings,
    ppo: PPOSpec,
    shape: PolicyShape,
    weights: dict[str, Any] | None,
    episodes: int,
    stream: int,
) -> PPOConfig:
    """RLlib's configuration. `bundle` is an object reference; `episodes` are those of an
    iteration (see `_episodes`); `stream` tells restarts apart."""
    runners = max(1, ppo.num_env_runners)
    lanes = runners * ppo.num_envs_per_env_runner
    fragment = episodes // lanes * len(problem.network.layers)
    env = gym.make(ENVIRONMENT, problem=problem, target=settings.target, **environment_options(ppo))
    register_env(REGISTERED, make)
    return (
        PPOConfig()
        .environment(
            env=REGISTERED,
            env_config={
                "bundle": bundle,
                "threads": 1 if ppo.num_env_runners else torch.get_num_threads(),
                "seed": [settings.seed, stream],
                "options": {
                    "target": settings.target,
                    "explore": ppo.explore,
                    **environment_options(ppo),
                },
                "losses": problem.prior.losses,
            },
            observation_space=env.observation_space,
            action_space=env.action_space,
        )
        .env_runners(
            num_env_runners=ppo.num_env_runners,
            num_envs_per_env_runner=ppo.num_envs_per_env_runner,
            num_gpus_per_env_runner=ppo.num_gpus_per_env_runner,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=fragment,
            sample_timeout_s=None,
        )
        .learners(num_learners=0)
        .training(
            train_batch_size_per_learner=fragment * lanes,
            minibatch_size=min(ppo.minibatch_size, fragment * lanes),
            num_epochs=ppo.epochs,
            lr=ppo.lr,
            gamma=ppo.gamma,
            lambda_=ppo.gae_lambda,
            clip_param=ppo.clip,
            vf_clip_param=float("inf"),
            vf_loss_coeff=ppo.vf_coeff,
            entropy_coeff=ppo.entropy,
            use_kl_loss=False,
            grad_clip=0.5,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=PolicyModule,
                model_config={"shape": asdict(shape), "weights": weights},
            )
        )
        .callbacks(CompressionCallbacks)
        .fault_tolerance(restart_failed_env_runners=True)
        .debugging(seed=settings.seed + 1000 * stream, log_level="ERROR")
    )


def _episodes(ppo: PPOSpec, most: int) -> int:
    """Episodes of an iteration: the same number in each environment, and if that leaves one
    each, not above `most`."""
    lanes = max(1, ppo.num_env_runners) * ppo.num_envs_per_env_runner
    return lanes * max(1, min(-(-ppo.episodes_per_iteration // lanes), most // lanes))


def search(
    bundle: Bundle,
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    *,
    ppo: PPOSpec,
    folder: Path,
    on_iteration: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Iterator[Record]:
    """Trains and yields every measured schedule. Goes on behind `history` with the policy last
    saved in `folder` (`policy.safetensors`), which is written after every iteration.

    on_iteration  gets a row of the learning curve: evaluation, mean_return, entropy, loss
    """
    problem.require_reachable(settings.target)
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
    first = len(spent) + min(free, max(1, round(FIRST * free)))
    last = min(total - first, max(1, round(LAST * free)))
    batch = _episodes(ppo, total - first - last)
    # Whole iterations only: an episode that is played is an episode in the archive.
    end = first + (total - first - last) // batch * batch

    def record(info: dict[str, Any]) -> Record:
        nonlocal count
        count += 1
        return Record(
            Schedule.from_json(info["schedule"]),
            Measurement.from_dict(info["measurement"]),
            "ppo",
            settings.seed,
            count,
            float(info["target"]),
        )

    policy = Policy(shape)
    if resumed:
        policy, _ = load_policy(folder, shape.observation_version)
    untrained, guesses = Policy(shape), targets(settings, first - len(spent))
    while count < first:
        yield record(greedy(untrained, env, guesses[count - len(spent)]))

    if count + batch <= end:
        start_ray(ppo)
        reference = share(bundle)
        weights = {n: t.numpy() for n, t in policy.state_dict().items()} if resumed else None
        algorithm = config(
            reference, problem, settings, ppo, shape, weights, batch, stream=count
        ).build_algo()
        idle = 0
        try:
            while count + batch <= end:
                result = algorithm.train()
                rows = result.get("env_runners", {}).get(RECORDS, [])
                if isinstance(rows, dict):
                    rows = [rows]  # RLlib unpacks a list of one
                # Runner by runner: the archive's order does not depend on who was faster.
                for info in sorted(rows, key=lambda info: info["runner"]):
                    if count < total:
                        yield record(info)
                idle = 0 if rows else idle + 1
                if idle == MOST_IDLE:
                    raise UserError(
                        f"ppo: the env runners ended no episode in {idle} iterations; their "
                        "messages are in /tmp/ray/session_latest/logs"
                    )
                policy = _trained(algorithm, shape)
                about = {"evaluations": count, "seed": settings.seed, **environment_options(ppo)}
                save_policy(folder, policy, about)
                if rows:
                    on_iteration(_curve_row(result, rows, count))
        finally:
            algorithm.stop()
            with contextlib.suppress(OSError):
                os.rmdir(algorithm.logdir)  # of nobody's use, empty, in ~/ray_results
    policy.eval()
    begin = min(count, end)
    wanted = targets(settings, total - begin)[count - begin :]
    if ppo.num_env_runners and wanted:
        start_ray(ppo)
        options = {"target": settings.target, **environment_options(ppo)}
        yield from map(record, pool.play(policy, ENVIRONMENT, options, wanted, losses))
    else:
        yield from (record(greedy(policy, env, target)) for target in wanted)


def _trained(algorithm: PPO, shape: PolicyShape) -> Policy:
    policy = Policy(shape)
    state = algorithm.learner_group.get_state(components="learner/rl_module")
    weights = state["learner"]["rl_module"]["default_policy"]
    policy.load_state_dict(
        {n.removeprefix("policy."): torch.as_tensor(w) for n, w in weights.items()}
    )
    return policy


def _curve_row(result: dict[str, Any], rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    learner = result.get("learners", {}).get("default_policy", {})
    row: dict[str, Any] = {
        "searcher": "ppo",
        "evaluation": count,
        "mean_return": sum(r["return"] for r in rows) / len(rows),
    }
    for name, key in (("entropy", "entropy"), ("loss", "total_loss"), ("vf_loss", "vf_loss")):
        if key in learner:
            row[name] = float(learner[key])
    return row
