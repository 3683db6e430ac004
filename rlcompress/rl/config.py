"""RLlib's configuration, shared by the search and by training in the dynamic environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rlcompress.core.errors import UserError
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.policy import Policy, PolicyShape, load_policy, save_policy
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.rl.environment import RECORDS, CompressionCallbacks
from rlcompress.rl.module import PolicyModule
from rlcompress.schema import PPOSpec

#: Iterations without a finished episode before it gives up.
MOST_IDLE = 5

#: RLlib's result, and what the episodes sent.
Iteration = tuple[Mapping[str, Any], list[dict[str, Any]]]


def episodes_of(ppo: PPOSpec, most: int) -> int:
    """Episodes of an iteration: the same number in each environment, and if that leaves one
    each, not above `most`."""
    lanes = max(1, ppo.num_env_runners) * ppo.num_envs_per_env_runner
    return lanes * max(1, min(-(-ppo.episodes_per_iteration // lanes), most // lanes))


def within(ppo: PPOSpec, most: int) -> PPOSpec:
    """The settings with no more environments than there are episodes to play."""
    runners = min(ppo.num_env_runners, most)
    each = min(ppo.num_envs_per_env_runner, most // max(1, runners))
    return ppo.model_copy(update={"num_env_runners": runners, "num_envs_per_env_runner": each})


def config(
    ppo: PPOSpec,
    shape: PolicyShape,
    weights: Mapping[str, Any] | None,
    *,
    environment: str,
    env_config: Mapping[str, Any],
    spaces: gym.Env[Any, Any],
    steps: int,
    episodes: int,
    seed: int,
    whole: bool = False,
) -> PPOConfig:
    """PPO on a registered environment whose maker returns N episodes.

    weights   a policy's state dict as arrays, to start from;  spaces  an environment like it
    steps     of an episode;  episodes  of an iteration (see `episodes_of`)
    whole     episodes differ in length, by `steps` on average: an iteration ends with an episode
    """
    runners = max(1, ppo.num_env_runners)
    lanes = runners * ppo.num_envs_per_env_runner
    fragment = episodes // lanes * steps
    return (
        PPOConfig()
        .environment(
            env=environment,
            env_config={
                "threads": 1 if ppo.num_env_runners else torch.get_num_threads(),
                **env_config,
            },
            observation_space=spaces.observation_space,
            action_space=spaces.action_space,
        )
        .env_runners(
            num_env_runners=ppo.num_env_runners,
            num_envs_per_env_runner=ppo.num_envs_per_env_runner,
            num_gpus_per_env_runner=ppo.num_gpus_per_env_runner,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=fragment,
            batch_mode="complete_episodes" if whole else "truncate_episodes",
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
        # NumPy takes 32 bits; runners count on from it.
        .debugging(seed=seed % 2**31, log_level="ERROR")
    )


def arrays(policy: Policy) -> dict[str, Any]:
    """A policy's weights for `config`."""
    return {name: tensor.numpy() for name, tensor in policy.state_dict().items()}


def trained(algorithm: PPO, shape: PolicyShape) -> Policy:
    """The policy as the learner has it."""
    policy = Policy(shape)
    state = algorithm.learner_group.get_state(components="learner/rl_module")
    weights = state["learner"]["rl_module"]["default_policy"]
    policy.load_state_dict(
        {n.removeprefix("policy."): torch.as_tensor(w) for n, w in weights.items()}
    )
    return policy


def records_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the episodes of an iteration sent. Runner by runner: the archive's order does not
    depend on who was faster."""
    rows = result.get("env_runners", {}).get(RECORDS, [])
    if isinstance(rows, dict):
        rows = [rows]  # RLlib unpacks a list of one
    return sorted(rows, key=lambda info: info["runner"])


def curve_row(
    result: Mapping[str, Any], rows: list[dict[str, Any]], searcher: str, count: int
) -> dict[str, Any]:
    """A row of the learning curve after `count` episodes."""
    learner = result.get("learners", {}).get("default_policy", {})
    row: dict[str, Any] = {
        "searcher": searcher,
        "evaluation": count,
        "mean_return": sum(r["return"] for r in rows) / len(rows),
    }
    for name, key in (("entropy", "entropy"), ("loss", "total_loss"), ("vf_loss", "vf_loss")):
        if key in learner:
            row[name] = float(learner[key])
    return row


@contextlib.contextmanager
def playing(settings: PPOConfig) -> Iterator[tuple[PPO, Callable[[], Iteration]]]:
    """A built algorithm, stopped in the end, and what plays its next iteration: RLlib's result and
    `records_of` it. That raises UserError after `MOST_IDLE` iterations in a row without an episode.
    """
    algorithm, idle = settings.build_algo(), 0

    def iteration() -> Iteration:
        nonlocal idle
        result = algorithm.train()
        rows = records_of(result)
        idle = 0 if rows else idle + 1
        if idle == MOST_IDLE:
            raise UserError(
                f"ppo: the env runners ended no episode in {MOST_IDLE} iterations; their "
                "messages are in /tmp/ray/session_latest/logs"
            )
        return result, rows

    try:
        yield algorithm, iteration
    finally:
        algorithm.stop()
        with contextlib.suppress(OSError):
            os.rmdir(algorithm.logdir)  # of nobody's use, empty, in ~/ray_results


def going_on(
    ppo: PPOSpec, policy: Policy, folder: Path, episodes: int, played: int
) -> tuple[PPOSpec, int, Policy] | None:
    """The settings for so many episodes, those of an iteration, and the policy to go on with: the
    saved one of a training that was cut off after some. None if no iteration is left of that."""
    lanes = within(ppo, episodes)
    batch = episodes_of(lanes, episodes)
    if played and (folder / "policy.json").exists():
        if played + batch > episodes:
            return None
        policy = load_policy(folder, OBSERVATION_VERSION)[0]
    return lanes, batch, policy


def learn(
    settings: PPOConfig,
    shape: PolicyShape,
    *,
    episodes: int,
    batch: int,
    folder: Path,
    about: Mapping[str, Any],
    on_iteration: Callable[[dict[str, Any]], None],
    played: int = 0,
) -> Iterator[dict[str, Any]]:
    """Plays on from `played` to `episodes` in whole iterations of `batch`, at least one, and yields
    what each sent. After each iteration the policy is saved in `folder`, with the episodes up to
    there, and `on_iteration` gets a row of the learning curve."""
    count, rows = played, list[dict[str, Any]]()
    with playing(settings) as (algorithm, iteration):
        while not rows or count + batch <= episodes:
            result, rows = iteration()
            count += len(rows)
            yield from rows
            save_policy(folder, trained(algorithm, shape), {"episodes": count, **about})
            if rows:
                on_iteration(curve_row(result, rows, "ppo", count))


def record_of(info: Mapping[str, Any], seed: int, evaluation: int) -> Record:
    """An archive's line from what an episode sent."""
    return Record(
        Schedule.from_json(info["schedule"]),
        Measurement.from_dict(info["measurement"]),
        "ppo",
        seed,
        evaluation,
        float(info["target"]),
    )
