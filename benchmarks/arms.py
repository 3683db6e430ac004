"""The arms of `benchmarks.dynamic`: each is one training run of one network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.drifts import drifted
from benchmarks.networks import bundle
from rlcompress.core.agents import AnyPolicy
from rlcompress.core.fitted import fitted_network
from rlcompress.core.pareto import archive_front
from rlcompress.core.quant import float_weight
from rlcompress.core.schedule import Schedule
from rlcompress.core.squeeze import Pace
from rlcompress.core.ticket import Task, write_network
from rlcompress.core.train import Recipe
from rlcompress.core.train import train as train_plain
from rlcompress.core.training import Images, Trainer, Training
from rlcompress.searchers import Settings, find
from rlcompress.searchers.base import in_process
from rlcompress.stages.workspace import Workspace

LR, BATCH = 0.05, 64
DRIFT_AT = 1 / 3


@dataclass
class Bench:
    """One network and one seed: everything that the arms share."""

    network: str
    run: Workspace
    seed: int
    steps: int
    evaluations: int
    policy: AnyPolicy = "default"

    def training(self, drift: str | None = None) -> Training:
        run, data = self.run, self.run.data
        layers = len(run.structure.layers)
        pace = pace_of(self.steps, layers)
        later = None
        held, _, _ = data.validation_parts(2000, 0, self.seed)
        if drift is not None:
            later = Images.of(drifted(data.train, drift, self.seed))
            held = drifted(held, drift, self.seed)
        return Training(
            run.ref,
            run.structure,
            {n: t.numpy() for n, t in run.network("rewind").state_dict().items()},
            Images.of(data.train),
            Images.of(held),
            pace,
            final_steps=self.steps - pace.steps(layers),
            batch_size=BATCH,
            lr=LR,
            seed=self.seed,
            later=later,
            drift_at=DRIFT_AT,
        )

    def test(self, drift: str | None) -> Any:
        return self.run.data.test if drift is None else drifted(self.run.data.test, drift, 1)


def pace_of(steps: int, layers: int) -> Pace:
    """Two rounds over the layers in the first six tenths of the steps."""
    watch = min(30, max(2, steps // 25))
    warmup = 2 * watch + 1
    recovery = max(1, (6 * steps // 10 - warmup) // (2 * layers))
    return Pace(warmup, recovery, 2, watch)


def closed(trainer: Trainer, target: float, policy: AnyPolicy) -> list[int]:
    """The actions that the policy chose."""
    compressor, actions = trainer.compressor, []
    compressor.use(policy)
    begin(trainer, target)
    due = True
    while due:
        actions.append(compressor.choose())
        compressor.decide(actions[-1])
        due = trainer.advance()
    return actions


def begin(trainer: Trainer, target: float) -> None:
    trainer.begin(target, trainer.training.seed)


def opened(trainer: Trainer, target: float, actions: list[int]) -> None:
    begin(trainer, target)
    for action in actions:
        trainer.compressor.decide(action)
        trainer.advance()


def static(trainer: Trainer, keep: float, bits: int) -> None:
    begin(trainer, 1.0)
    trainer.compressor.apply(trainer.network.uniform(keep, bits))
    trainer.compressor.freeze()
    trainer.advance()


def gradual(trainer: Trainer, keep: float, bits: int) -> None:
    begin(trainer, 1.0)
    pace, layers = trainer.training.pace, len(trainer.network.layers)
    trainer.compressor.freeze()
    last = pace.steps(layers)
    while trainer.step < trainer.training.steps:
        done = (trainer.step - pace.warmup) / (last - pace.warmup)
        if done <= 1 and (trainer.step - pace.warmup) % pace.recovery_steps == 0:
            now = keep + (1 - keep) * (1 - min(1.0, done)) ** 3
            schedule = trainer.network.uniform(now, 32 if done < 1 else bits)
            trainer.compressor.apply(schedule, by_magnitude(trainer, schedule))
        trainer.minibatch()


def by_magnitude(trainer: Trainer, schedule: Schedule) -> dict[str, np.ndarray]:
    """Channels whose filters have the largest L1 norm."""
    network, kept = trainer.network, {}
    modules = dict(trainer.model.named_modules())
    counts = network.counts(schedule)
    for name, group in network.groups.items():
        norm = np.zeros(group.channels)
        for layer in network.layers.values():
            for link in layer.outputs:
                if link.group == name:
                    size = float_weight(modules[layer.name]).abs().flatten(1).sum(1).cpu().numpy()
                    np.add.at(norm, link.root, size[link.index])
        mask = np.zeros(group.channels, dtype=bool)
        mask[np.argsort(-norm, kind="stable")[: counts[name]]] = True
        kept[name] = mask
    return kept


def searched(bench: Bench, target: float, path: Path) -> dict[str, Any]:
    """Search first, then retrain; writes the artifact."""
    run, half = bench.run, bench.steps // 2
    data = run.data.train.sample(2 * half * BATCH, bench.seed)
    model = run.network("rewind").to(memory_format=torch.channels_last)
    first = data.take(torch.arange(half * BATCH) % len(data))
    train_plain(model, first, Recipe(1, BATCH, LR), seed=bench.seed)
    known = bundle(run, seed=bench.seed, model=model)
    problem = known.problem()
    settings = Settings(
        bench.evaluations, (target, target * 1.05), bench.seed, sensitivity="refitted"
    )
    records = list(find("knapsack")(problem, settings, [], in_process(problem)))
    limit = problem.dense.bytes / target
    small = [r for r in records if r.measurement.bytes <= limit]
    best = min(archive_front(small), key=lambda r: r.measurement.kl)
    start = fitted_network(model, problem.evaluator, best.schedule)
    task = Task(start, run.structure)
    tuned = task.prepared()
    rest = data.take(torch.arange(half * BATCH, 2 * half * BATCH) % len(data))
    train_plain(tuned, rest, Recipe(1, BATCH, LR / 5), seed=bench.seed)
    write_network(path, task.result_of(tuned), run.structure, run.ref, best.schedule)
    return {"evaluations": len(records)}
