"""The verb `train-policy`: one policy learns on a zoo of networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.table import Table

from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_archive, save_json
from rlcompress.core.lessons import Lessons, clone
from rlcompress.core.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS
from rlcompress.core.policy import Policy, PolicyShape, load_policy, save_policy
from rlcompress.core.prior import Losses
from rlcompress.core.problem import Member
from rlcompress.core.schedule import Measurement, Record
from rlcompress.live import console, stage
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy
from rlcompress.searchers import Settings, in_process
from rlcompress.searchers.base import Measure, probed
from rlcompress.spec import spec_hash
from rlcompress.stages.dense import train_dense
from rlcompress.stages.ticket import commit
from rlcompress.stages.workspace import MEASUREMENTS, Workspace

#: Of the largest ratio that a network can reach: beyond it there is nothing left to choose.
REACH = 0.8


def members(run: Workspace) -> dict[str, Workspace]:
    """A workspace for each network of the zoo, in `zoo/NAME`: the experiment with another model
    and other data. Raises UserError if there are none."""
    networks = run.experiment.zoo.networks
    if not networks:
        raise UserError(
            f"{run.name}: zoo.networks is empty; the policy needs networks to learn on "
            "(experiments.yaml has an example: zoo)"
        )
    return {
        name: Workspace(
            name,
            run.experiment.model_copy(update={"model": network.model, "data": network.data}),
            run.folder / "zoo" / name,
        )
        for name, network in networks.items()
    }


def target_of(run: Workspace) -> tuple[float, float]:
    """Of the zoo's size ratios those that this network can reach."""
    low, high = run.experiment.zoo.target
    high = min(high, REACH * run.problem.max_ratio())
    return min(low, high / 2), high


def learn_from(run: Workspace) -> tuple[Member, Lessons]:
    """Measures one network's sensitivities with the readers refitted, plays its lessons, and keeps
    both in `lessons/`; found there, they are not made again. The network's lessons, and what the
    prior's own episodes paid."""
    e, folder = run.experiment, run.folder / "lessons"
    zoo = e.zoo
    run.folder.mkdir(parents=True, exist_ok=True)
    train_dense(run)
    inputs = spec_hash(e, "model", "data", "dense", "seed", "calibration", "search")
    run.claim(folder, f"{MEASUREMENTS} {inputs} {zoo.probes} {zoo.lessons} {zoo.target}")
    paths = [folder / f"{i:03}.safetensors" for i in range(zoo.lessons)]
    target = target_of(run)
    if not all(path.exists() for path in paths):
        _play_lessons(run, paths, target)
    parts, found = zip(*(Lessons.load(path) for path in paths), strict=True)
    own = sorted((row["target"], row["return"]) for row in found if row["player"] == "prior")
    ratios, qualities = zip(*own, strict=True)
    return Member(run.name, target, ratios, qualities), Lessons.joined(parts)


def _play_lessons(run: Workspace, paths: list[Path], target: tuple[float, float]) -> None:
    from rlcompress.rl.lessons import PLAYERS, lesson

    e, history = run.experiment, read_archive(paths[0].with_name("archive.jsonl"))
    settings = Settings(2 * e.zoo.probes, target, e.seed, "refitted")
    options = environment_options(e.ppo)
    count = -(-len(paths) // len(PLAYERS))
    ratios = [float(x) for x in np.geomspace(*target, count)]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    calls = [
        (PLAYERS[i % len(PLAYERS)], ratios[i // len(PLAYERS)], [e.seed, i], options) for i in todo
    ]
    measure: Measure = in_process(run.problem)
    workers = None
    if e.ppo.num_env_runners:
        from rlcompress.rl import cluster, pool

        cluster.start_ray(e.ppo)
        workers = pool.Pool(run.bundle, e.ppo.num_env_runners, e.ppo.num_gpus_per_env_runner)
        measure = workers.measure
    found: list[Losses] = []

    def probing() -> Iterator[Record]:
        losses, _ = yield from probed("teacher", run.problem, settings, history, measure)
        found.append(losses)

    total = e.zoo.probes + len(paths)
    with (
        JsonLines(paths[0].with_name("archive.jsonl")) as archive,
        stage(run.name, total) as shown,
    ):
        for record in probing():
            archive.append(record.to_json())
            shown.update(record.evaluation, "sensitivities, readers refitted")
        losses = found[0]
        lessons_of = (
            workers.lessons(losses, calls)
            if workers
            else (lesson(run.problem, losses, *call) for call in calls)
        )
        played = zip(todo, calls, lessons_of, strict=True)
        for done, (i, call, (info, lessons)) in enumerate(played, start=total - len(todo) + 1):
            kl = Measurement.from_dict(info["measurement"]).kl
            about = {name: info[name] for name in ("target", "schedule", "measurement", "return")}
            lessons.save(paths[i], player=call[0], **about)
            shown.update(done, f"{call[0]} at {call[1]:.1f}x: KL {kl:.3f}")


def train_policy(run: Workspace) -> dict[str, Any]:
    """Trains the policy on the zoo into `policy/` and judges it on the experiment's own network,
    which is not in the zoo: the content of `policy/policy.json`. Done already, it is not trained
    again."""
    e, folder = run.experiment, run.folder / "policy"
    zoo, inputs = e.zoo, f"{MEASUREMENTS} {spec_hash(e)}"
    networks = members(run)
    if (folder / "policy.json").exists():
        _, about = load_policy(folder, OBSERVATION_VERSION)
        if about.get("inputs") == inputs and "judged" in about:
            return about
    taught = [learn_from(network) for network in networks.values()]
    run.claim(folder, inputs)
    torch.manual_seed(e.seed)
    policy = new_policy(e.ppo.hidden)
    curve = clone(
        policy,
        [lessons for _, lessons in taught],
        epochs=zoo.clone_epochs,
        lr=zoo.clone_lr,
        seed=e.seed,
    )
    save_json(folder / "clone.json", curve)
    if zoo.ppo_episodes:
        policy = _play_zoo(run, networks, [member for member, _ in taught], policy)
    about = {
        "inputs": inputs,
        "networks": list(networks),
        "lessons": sum(len(lessons) for _, lessons in taught),
        "evaluations": len(networks) * (zoo.probes + zoo.lessons),
        "episodes": zoo.ppo_episodes,
        "seed": e.seed,
        "spec_hash": run.hash,
        "commit": commit(),
        "command": run.next("train-policy"),
        **environment_options(e.ppo),
    }
    train_dense(run)
    about["judged"] = judge(run, policy)
    save_policy(folder, policy, about)
    return about


def new_policy(hidden: int) -> Policy:
    """Untrained, for every environment here."""
    return Policy(PolicyShape(len(ACTION_COLUMNS), len(STATE_COLUMNS), hidden, OBSERVATION_VERSION))


def _play_zoo(
    run: Workspace, networks: dict[str, Workspace], known: list[Member], policy: Policy
) -> Policy:
    from rlcompress.rl import zoo

    e, folder = run.experiment, run.folder / "policy"
    with (
        JsonLines(folder / "episodes.jsonl") as episodes,
        JsonLines(folder / "curve.jsonl") as curve,
        stage("ppo", e.zoo.ppo_episodes) as shown,
    ):
        played = zoo.train(
            known,
            [network.bundle for network in networks.values()],
            policy,
            e.ppo,
            episodes=e.zoo.ppo_episodes,
            held=e.zoo.held,
            seed=e.seed,
            folder=folder,
            on_iteration=lambda row: curve.append(json.dumps(row)),
        )
        for done, info in enumerate(played, start=1):
            episodes.append(json.dumps(info))
            shown.update(done, f"{info['network']}  {info['return']:+.2f} over the prior")
    return load_policy(folder, OBSERVATION_VERSION)[0]


def judge(run: Workspace, policy: Policy, sizes: int = 8) -> list[dict[str, float]]:
    """The policy's own episodes and its prior's at sizes over the experiment's target range, on the
    experiment's network: target, and bytes, KL and accuracy of each."""
    ppo, target = run.experiment.ppo, run.experiment.search.target
    run.problem.require_reachable(target)
    env = gym.make(ENVIRONMENT, problem=run.problem, target=target, **environment_options(ppo))
    rows = []
    with stage("judge", 2 * sizes) as shown:
        for i, ratio in enumerate(float(x) for x in np.geomspace(*target, sizes)):
            row = {"target": ratio}
            for who, player in (("prior", new_policy(ppo.hidden).eval()), ("policy", policy)):
                m = Measurement.from_dict(greedy(player, env, ratio)["measurement"])
                row |= {f"{who}_bytes": m.bytes, f"{who}_kl": m.kl, f"{who}_accuracy": m.accuracy}
            rows.append(row)
            shown.update(2 * (i + 1), f"{ratio:.1f}x: KL {row['policy_kl']:.3f}")
    return rows


def gain(judged: list[dict[str, float]]) -> float:
    """Decades of KL that the policy saves over its prior, mean over the sizes."""
    return float(np.mean([np.log10(row["prior_kl"] / row["policy_kl"]) for row in judged]))


def last_lines(run: Workspace, about: dict[str, Any]) -> None:
    """The terminal's: prior and policy on the network that the zoo does not have."""
    table = Table(box=None, title_justify="left")
    for name in ("target", "prior: KL", "accuracy", "policy: KL", "accuracy"):
        table.add_column(name, justify="right")
    for row in about["judged"]:
        cells = [f"{row['target']:.1f}x"]
        for who in ("prior", "policy"):
            cells += [f"{row[f'{who}_kl']:.3f}", f"{row[f'{who}_accuracy']:.1%}"]
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"on {run.name}'s own network the policy's KL is {10 ** -gain(about['judged']):.2f} times "
        f"its prior's; it learned on {len(about['networks'])} networks, {about['evaluations']} "
        f"evaluations and {about['episodes']} episodes of PPO"
    )
    console.print(f"policy   {run.folder / 'policy'}")
    console.print(f"next     rlcompress transfer EXPERIMENT --policy {run.folder}")
