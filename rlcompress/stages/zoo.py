"""The verb `train-policy`: one policy learns on a zoo of networks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.table import Table

from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_archive, read_lines, save_bytes
from rlcompress.core.learned import LearnedLosses, Lessons, agreement, fit
from rlcompress.core.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS
from rlcompress.core.policy import LEARNED, Policy, PolicyShape, load_policy, save_policy
from rlcompress.core.problem import Member
from rlcompress.core.schedule import Measurement, Record
from rlcompress.live import console, stage
from rlcompress.report.policy_card import policy_card
from rlcompress.rl.play import ENVIRONMENT, environment_options, greedy
from rlcompress.searchers import Settings, in_process
from rlcompress.searchers.base import Measure, Proposal, measured
from rlcompress.stages.deliver import tracker_of
from rlcompress.stages.dense import train_dense
from rlcompress.stages.policies import digest_of
from rlcompress.stages.ticket import commit
from rlcompress.stages.workspace import Workspace

#: Of the largest ratio that a network can reach: beyond it there is nothing left to choose.
REACH = 0.8
#: Sampled schedules: the stream of their random numbers, deviations that the prior's losses are
#: shaken by, and rungs of a shaken prior.
STREAM, DEVIATIONS, RUNGS = 7, (0.0, 0.5, 1.0, 1.5), 32
#: As `MEASUREMENTS` of inputs.py, of samples: another prior draws others, but what a schedule
#: measures is the same.
SAMPLES = "4"


def members(run: Workspace) -> dict[str, Workspace]:
    """A workspace for each network of the zoo, in `zoo/NAME`: the experiment with another model
    and other data. Raises UserError if there are none."""
    networks = run.experiment.zoo.networks
    if not networks:
        raise UserError(
            f"{run.name}: zoo.networks is empty; the policy needs networks to learn on "
            "(experiments.yaml has an example: zoo)"
        )
    # Loaded weights are those of the experiment's own network.
    dense = run.experiment.dense.model_copy(update={"weights": None})
    return {
        name: Workspace(
            name,
            run.experiment.model_copy(
                update={"model": network.model, "data": network.data, "dense": dense}
            ),
            run.folder / "zoo" / name,
        )
        for name, network in networks.items()
    }


def target_of(run: Workspace) -> tuple[float, float]:
    """Of the zoo's size ratios those that this network can reach."""
    low, high = run.experiment.zoo.target
    high = min(high, REACH * run.problem.max_ratio())
    return max(1.0, min(low, high / 2)), high


def sample(run: Workspace) -> list[Record]:
    """Measures schedules of one network: the prior's, mostly on shaken losses, at sizes over the
    range. They are kept in `samples/archive.jsonl`; found there, they are not measured again."""
    e, folder = run.experiment, run.folder / "samples"
    run.folder.mkdir(parents=True, exist_ok=True)
    train_dense(run)
    run.claim(folder, f"{SAMPLES} {run.inputs.samples} {e.zoo.target}")
    records = read_archive(folder / "archive.jsonl")[: e.zoo.samples]
    if len(records) == e.zoo.samples:
        return records
    measure: Measure = in_process(run.problem)
    if e.ppo.num_env_runners:
        from rlcompress.rl import cluster, pool

        cluster.start_ray(e.ppo)
        measure = pool.Pool(
            run.bundle, e.ppo.num_env_runners, e.ppo.num_gpus_per_env_runner
        ).measure
    target = target_of(run)
    settings = Settings(e.zoo.samples, target, e.seed)
    history = list(records)
    with JsonLines(folder / "archive.jsonl") as archive, stage(run.name, e.zoo.samples) as shown:
        for record in measured("sample", settings, history, measure, _draws(run, target)):
            archive.append(record.to_json())
            records.append(record)
            kl = record.measurement.kl
            shown.update(record.evaluation, f"{record.target or 1:.1f}x  KL {kl:.4f}")
    return records


def _draws(run: Workspace, target: tuple[float, float]) -> Iterator[Proposal]:
    prior, dense = run.problem.prior, run.problem.dense.bytes
    for i in itertools.count():
        rng = np.random.default_rng([run.experiment.seed + STREAM, i])
        ratio = float(np.exp(rng.uniform(*np.log(target))))
        deviation = float(rng.choice(DEVIATIONS))
        shaken = prior.shaken(rng, deviation, RUNGS) if deviation else prior
        yield shaken.schedule(dense / ratio), ratio


def lessons_of(run: Workspace, records: list[Record]) -> Lessons:
    network, evaluator = run.problem.network, run.problem.evaluator
    return Lessons.of(network, evaluator.costs, evaluator.estimates, records)


def train_policy(run: Workspace, networks: Mapping[str, Workspace]) -> dict[str, Any]:
    """Trains the policy on the zoo (`members`) into `policy/` and judges it on the experiment's own
    network, which is not in the zoo: the content of `policy/policy.json`. Done already, it is not
    trained again."""
    e, folder = run.experiment, run.folder / "policy"
    zoo, inputs = e.zoo, run.inputs.policy
    run.exchange(folder, inputs, "policy.json")
    if (folder / "policy.json").exists():
        _, about = load_policy(folder, OBSERVATION_VERSION)
        if about.get("inputs") == inputs and "judged" in about:
            return about
    sampled = {name: sample(network) for name, network in networks.items()}
    run.claim(folder, inputs, "policy.json")
    lessons = {name: lessons_of(networks[name], records) for name, records in sampled.items()}
    learned = fit(list(lessons.values()), seed=e.seed)
    learned.save(folder / LEARNED)
    policy, episodes = new_policy(e.ppo.hidden), 0
    if zoo.ppo_episodes:
        policy, episodes = play_zoo(run, networks, sampled, learned, folder, zoo.ppo_episodes)
    about = {
        "inputs": inputs,
        "networks": list(networks),
        "agreement": {
            name: [agreement(known, None), agreement(known, learned)]
            for name, known in lessons.items()
        },
        "evaluations": sum(map(len, sampled.values())),
        "recovery": e.search.recovery,
        "episodes": episodes,
        "seed": e.seed,
        "spec_hash": run.hash,
        "commit": commit(),
        "command": run.next("train-policy"),
        **environment_options(e.ppo),
    }
    train_dense(run)
    about["judged"] = judge(run, policy if episodes else None, learned)
    save_policy(folder, policy, about)
    where = f"{run.experiment.model.factory} {run.experiment.model.args} on {e.data.factory}"
    save_bytes(folder / "card.md", policy_card(about, where).encode())
    return about


def register(run: Workspace, about: dict[str, Any]) -> str:
    """Logs and registers the policy in MLflow; its version there."""
    from rlcompress.tracking import register_policy

    folder = run.folder / "policy"
    with tracker_of(run) as tracker:
        told = {**about, "digest": digest_of(folder)}
        return register_policy(tracker, folder, told, gain(about["judged"]))


def new_policy(hidden: int) -> Policy:
    """Untrained, for every environment here."""
    return Policy(PolicyShape(len(ACTION_COLUMNS), len(STATE_COLUMNS), hidden, OBSERVATION_VERSION))


def play_zoo(
    run: Workspace,
    networks: Mapping[str, Workspace],
    sampled: Mapping[str, list[Record]],
    learned: LearnedLosses,
    folder: Path,
    episodes: int,
) -> tuple[Policy, int]:
    """A policy that PPO trains on the prior that goes by `learned`, with the settings of `run`, and
    the episodes it has played: whole iterations. In `folder` are left the policy, every episode
    (`episodes.jsonl`) and the learning curve; cut off, it goes on from them."""
    from rlcompress.rl import zoo
    from rlcompress.rl.config import record_of

    members, bundles = [], []
    for name, network in networks.items():
        evaluator, target = network.problem.evaluator, target_of(network)
        losses = learned.corrected(network.structure, evaluator.costs, evaluator.estimates)
        bundles.append(replace(network.bundle, losses=losses))
        # What the sampled schedules paid, smoothed over the size.
        options = environment_options(run.experiment.ppo)
        env = gym.make(ENVIRONMENT, problem=network.problem, target=target, **options)
        quality = env.get_wrapper_attr("quality")
        ratios = np.geomspace(*target, 8)
        sizes = np.log([network.problem.dense.bytes / r.measurement.bytes for r in sampled[name]])
        paid = [quality(r.measurement) for r in sampled[name]]
        expected = np.polyval(np.polyfit(sizes, paid, 2), np.log(ratios))
        members.append(Member(name, target, tuple(ratios.tolist()), tuple(expected.tolist())))
    e, played = run.experiment, len(read_lines(folder / "episodes.jsonl"))
    with (
        JsonLines(folder / "episodes.jsonl") as lines,
        JsonLines(folder / "curve.jsonl") as curve,
        stage("ppo", episodes, played) as shown,
    ):
        rows = zoo.train(
            members,
            bundles,
            new_policy(e.ppo.hidden),
            e.ppo,
            episodes=episodes,
            held=e.zoo.held,
            seed=e.seed,
            folder=folder,
            played=played,
            on_iteration=lambda row: curve.append(json.dumps(row)),
        )
        for done, info in enumerate(rows, start=played + 1):
            row = json.loads(record_of(info, e.seed, done).to_json())
            gained = float(info["return"])
            lines.append(json.dumps({"network": info["network"], "return": gained, **row}))
            shown.update(done, f"{info['network']}  {gained:+.2f} against its sampled schedules")
    policy, about = load_policy(folder, OBSERVATION_VERSION)
    return policy, int(about["episodes"])


def judge(
    run: Workspace, policy: Policy | None, learned: LearnedLosses, sizes: int = 8
) -> list[dict[str, float]]:
    """Zero-shot against the knapsack on the estimates, on the experiment's network at sizes over
    its target range: target, and bytes, KL and accuracy of each. `policy`: None where its prior is
    all that was trained."""
    ppo, target, problem = run.experiment.ppo, run.experiment.search.target, run.problem
    problem.require_reachable(target)
    evaluator = problem.evaluator
    losses = learned.corrected(problem.network, evaluator.costs, evaluator.estimates)
    better = problem.with_losses(losses)
    ratios = [float(x) for x in np.geomspace(*target, sizes)]
    options = environment_options(ppo)
    env = gym.make(ENVIRONMENT, problem=better, target=target, **options)
    rows = []
    with stage("judge", sizes) as shown:
        for done, ratio in enumerate(ratios, start=1):
            row, size = {"target": ratio}, problem.dense.bytes / ratio
            plain = evaluator.evaluate(problem.prior.schedule(size))
            ours = (
                evaluator.evaluate(better.prior.schedule(size))
                if policy is None
                else Measurement.from_dict(greedy(policy.eval(), env, ratio)["measurement"])
            )
            for who, m in (("prior", plain), ("policy", ours)):
                row |= {f"{who}_bytes": m.bytes, f"{who}_kl": m.kl, f"{who}_accuracy": m.accuracy}
            rows.append(row)
            shown.update(done, f"{ratio:.1f}x: KL {row['policy_kl']:.3f}")
    return rows


def gain(judged: list[dict[str, float]]) -> float:
    """Decades of KL saved over the knapsack on estimates, mean over the sizes."""
    return float(np.mean([np.log10(row["prior_kl"] / row["policy_kl"]) for row in judged]))


def last_lines(run: Workspace, about: dict[str, Any], version: str) -> None:
    """The terminal's: the policy on the network that the zoo does not have."""
    table = Table(box=None, title_justify="left")
    for name in ("target", "estimates: KL", "accuracy", "policy: KL", "accuracy"):
        table.add_column(name, justify="right")
    for row in about["judged"]:
        cells = [f"{row['target']:.1f}x"]
        for who in ("prior", "policy"):
            cells += [f"{row[f'{who}_kl']:.3f}", f"{row[f'{who}_accuracy']:.1%}"]
        table.add_row(*cells)
    console.print(table)
    agreed = np.array(list(about["agreement"].values())).mean(0)
    console.print(
        "agreement of summed losses with measured KLs, within a size: "
        f"{agreed[0]:.2f} as estimated, {agreed[1]:.2f} as learned"
    )
    console.print(
        f"on {run.name}'s own network its KL is {10 ** -gain(about['judged']):.2f} times that of "
        f"the knapsack on estimates; it learned on {len(about['networks'])} networks, "
        f"{about['evaluations']} evaluations and {about['episodes']} episodes of PPO"
    )
    console.print(
        f"policy   {run.folder / 'policy'}, version {version} of rlcompress-policy in MLflow"
    )
    console.print(f"next     rlcompress transfer EXPERIMENT --policy {run.folder}")
