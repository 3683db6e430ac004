"""Ray Tune over the policy's reward and settings: each trial is a PPO search of the same problem.

A trial reports after every iteration what it measured since the last one; the driver alone writes.
Its checkpoint is its policy and its archive, without pickle: population-based training hands one
trial's policy to another, and a command that was cut off draws the same trials again (Tune's own
restore would unpickle the run folder) and each goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end as if all were done
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its boxes are printed at any verbosity

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_archive
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.pareto import best_at_floor, hypervolume
from rlcompress.core.policy import Agent, load_policy
from rlcompress.core.problem import Bundle, Problem
from rlcompress.core.schedule import Record
from rlcompress.schema import PPOSpec, SpaceSpec, TuneSpec
from rlcompress.searchers import Settings

METRIC = "hypervolume"
#: Of a trial's options: how often these were drawn before it.
REPEAT = "repeat"
KL_FLOOR = 1e-4
#: Where a front of no use begins: a KL of 1 nat.
_REFERENCE_KL = 0.0

#: What a trial's row holds for the driver, beside Tune's own columns.
Row = dict[str, Any]


def domain(space: SpaceSpec) -> Any:
    """Tune's own of an option's values."""
    if space.grid is not None:
        return tune.grid_search(list(space.grid))
    if space.choice is not None:
        return tune.choice(list(space.choice))
    if space.uniform is not None:
        return tune.uniform(*space.uniform)
    assert space.loguniform is not None
    return tune.loguniform(*space.loguniform)


def quality(records: list[Record], problem: Problem, low: float) -> float:
    """Area under the front of (log10 bytes, log10 KL) from the size ratio `low` and a KL of 1
    nat on: larger is better, whatever the reward was."""
    costs = np.array(
        [
            (np.log10(r.measurement.bytes), np.log10(max(r.measurement.kl, KL_FLOOR)))
            for r in records
        ]
    ).reshape(-1, 2)
    return hypervolume(costs, (float(np.log10(problem.dense.bytes / low)), _REFERENCE_KL))


def digest(config: Mapping[str, Any]) -> str:
    """Names a trial by its options."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


class Repeats:
    """Counts how often options were drawn."""

    def __init__(self) -> None:
        self._drawn: Counter[str] = Counter()

    def number(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same options with the next number of theirs; the first have none."""
        config.pop(REPEAT, None)
        name = digest(config)
        if self._drawn[name]:
            config[REPEAT] = self._drawn[name]
        self._drawn[name] += 1
        return config


class Draws(BasicVariantGenerator):  # type: ignore[misc]
    """Tune's own generator. What a choice gives once more is a search of its own: `REPEAT` among
    its options sets its name and its random numbers apart."""

    def __init__(self, seed: int, repeats: Repeats) -> None:
        super().__init__(random_state=seed)
        self._repeats = repeats

    def next_trial(self) -> Any:
        trial = super().next_trial()
        if trial is not None:
            self._repeats.number(trial.config)
        return trial


def trial(
    config: Mapping[str, Any],
    *,
    bundle: Bundle,
    known: Mapping[str, Any],
    agent: Agent,
    begun: Mapping[str, Mapping[str, bytes]],
) -> None:
    """One search in a Tune worker. `known`: ppo (PPOSpec's fields), target, low, floor, seed,
    evaluations, sensitivity. `agent`: of every trial's search. `begun`: what an earlier call left
    of a trial, file by file."""
    from rlcompress.rl import ppo

    torch.set_num_threads(1)
    problem = bundle.problem()
    changes = {k.removeprefix("ppo."): v for k, v in config.items() if k.startswith("ppo.")}
    spec = PPOSpec.model_validate({**known["ppo"], **changes})
    target = tuple(config.get("search.target", known["target"]))
    floor = problem.dense.accuracy - config.get("ticket.floor", known["floor"]) / 100
    seed = known["seed"] + config.get(REPEAT, 0)
    settings = Settings(known["evaluations"], target, seed, known["sensitivity"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (checkpoint := tune.get_checkpoint()) is not None:
            checkpoint.to_directory(str(folder))
        else:
            for file, content in begun.get(digest(config), {}).items():
                (folder / file).write_bytes(content)
        # A checkpoint may be another trial's, with its options.
        (folder / "options.json").write_text(json.dumps(dict(config)))
        records = read_archive(folder / "archive.jsonl")
        # What an earlier call's driver was not told before it ended is told again.
        sent = 0 if checkpoint is None else len(records)
        with JsonLines(folder / "archive.jsonl") as archive:

            def report() -> None:
                nonlocal sent
                best = best_at_floor(records, floor)
                row: Row = {
                    "evaluations": len(records),
                    METRIC: quality(records, problem, known["low"]),
                    "best_ratio": problem.dense.bytes / best.measurement.bytes if best else 0.0,
                    "records": json.dumps([r.to_json() for r in records[sent:]]),
                }
                sent = len(records)
                tune.report(row, checkpoint=tune.Checkpoint.from_directory(str(folder)))

            for record in ppo.search(
                bundle,
                problem,
                settings,
                list(records),
                ppo=spec,
                folder=folder,
                begin=agent,
                on_iteration=lambda row: report(),
            ):
                archive.append(record.to_json())
                records.append(record)
            if len(records) > sent or not records:
                report()


def mutations(spec: TuneSpec) -> dict[str, Any]:
    """What population-based training may change: of a list Tune takes a neighbour, other domains
    it multiplies."""
    return {
        key: domain(space) if space.choice is None else list(space.choice)
        for key, space in spec.space.items()
        if space.grid is None
    }


def explored(spec: TuneSpec, repeats: Repeats) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts back into its range what was multiplied beyond, and numbers what results."""

    def settle(config: dict[str, Any]) -> dict[str, Any]:
        for key, space in spec.space.items():
            if (limits := space.uniform or space.loguniform) is not None:
                config[key] = float(np.clip(config[key], *limits))
        return repeats.number(config)

    return settle


def scheduler(spec: TuneSpec, evaluations: int, repeats: Repeats) -> TrialScheduler | None:
    """ASHA stops the worse half at each rung; PBT lets the worst go on from the best."""
    if spec.scheduler == "asha":
        return ASHAScheduler(
            time_attr="evaluations",
            metric=METRIC,
            mode="max",
            max_t=evaluations,
            grace_period=max(1, evaluations // 4),
            reduction_factor=2,
        )
    if spec.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="evaluations",
            metric=METRIC,
            mode="max",
            perturbation_interval=max(1, evaluations // 4),
            hyperparam_mutations=mutations(spec),
            custom_explore_fn=explored(spec, repeats),
        )
    return None


class _Rows(tune.Callback):
    def __init__(self, on_row: Callable[[Mapping[str, Any], Row], None]) -> None:
        self._on_row = on_row

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a restore that is never asked for

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Row, **info: Any
    ) -> None:
        self._on_row(trial.config, result)


def run(
    bundle: Bundle,
    spec: TuneSpec,
    known: Mapping[str, Any],
    agent: Agent,
    folder: Path,
    on_row: Callable[[Mapping[str, Any], Row], None],
) -> list[tuple[dict[str, Any], str]]:
    """All trials, on a started Ray; (options, what went wrong or "").

    `on_row` gets each report as it comes: the trial's options, the row. Checkpoints are kept in
    `folder`; records that an earlier call had come again.
    """
    trainable = tune.with_resources(
        tune.with_parameters(
            trial, bundle=bundle, known=dict(known), agent=agent, begun=_begun(folder)
        ),
        tune.PlacementGroupFactory(
            [{"CPU": 1.0}]
            + [{"CPU": 1.0, "GPU": known["ppo"]["num_gpus_per_env_runner"]}] * spec.runners
        ),
    )
    repeats = Repeats()
    tuner = tune.Tuner(
        trainable,
        param_space={key: domain(space) for key, space in spec.space.items()},
        tune_config=tune.TuneConfig(
            num_samples=spec.draws,
            scheduler=scheduler(spec, int(known["evaluations"]), repeats),
            search_alg=Draws(int(known["seed"]), repeats),
        ),
        run_config=tune.RunConfig(
            name=f"trials-{len(list(folder.glob('trials-*'))) + 1}",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[_Rows(on_row)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    return [
        (dict(result.config or {}), "" if result.error is None else str(result.error))
        for result in tuner.fit()
    ]


def _begun(folder: Path) -> dict[str, dict[str, bytes]]:
    """The furthest checkpoint of every trial, file by file."""
    best: dict[str, tuple[int, Path]] = {}
    for options in folder.glob("trials-*/*/checkpoint_*/options.json"):
        # Copied file by file: a driver that was killed meanwhile left a piece of it.
        try:
            name = digest(json.loads(options.read_text()))
            count = len(read_archive(options.parent / "archive.jsonl"))
            if (options.parent / "policy.json").exists():
                load_policy(options.parent, OBSERVATION_VERSION)
        except (ValueError, UserError):
            continue
        if count > best.get(name, (-1, options))[0]:
            best[name] = count, options.parent
    files = ("archive.jsonl", "policy.json", "policy.safetensors")
    return {
        name: {f: (place / f).read_bytes() for f in files if (place / f).exists()}
        for name, (_, place) in best.items()
    }


def cpus() -> float:
    """Of the cluster."""
    return float(ray.cluster_resources().get("CPU", 0.0))
