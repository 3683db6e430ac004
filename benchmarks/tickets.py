"""Lottery tickets told straight: where a cut network's training should begin.

    uv run python -m benchmarks.tickets                           # hours; goes on where it stopped
    uv run python -m benchmarks.tickets --networks mobilenetv2    # two networks: two processes
    uv run python -m benchmarks.tickets --quick                   # one seed, one rate, few steps

Fashion-MNIST. One schedule a network: the knapsack's on estimated sensitivities at `TARGETS`,
channels chosen by what the dense network does on train images. Every arm of
`rlcompress.core.ticket` is trained on the same `STEPS` batches of 128 in the same order, with the
same quantizer, at two peak learning rates (`scratch` for as many steps as the dense network's
MACs buy). A seed is an order of the images, a fresh initialisation and a random choice of
channels; the dense network is one. For each arm validation chooses the rate, seed by seed; the
test split is read then, once.

iterative  the same bytes in `--rounds` rounds: train, cut to the next size by the importance that
           the trained network has then, rewind, and again; `rewind` is the same in one round

Of each arm: test accuracy, mean and 95 % interval (Student) over seeds, and the paired difference
to `fresh`. Every training is a line of runs/tickets-NETWORK.jsonl as soon as it is done.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import nn

from benchmarks import results
from benchmarks.networks import EXPERIMENTS, bundle, identity, workspace
from rlcompress.core.artifact import load_artifact
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.files import read_lines
from rlcompress.core.fitted import CutNetwork
from rlcompress.core.prune import attach_masks, detach, kept_channels
from rlcompress.core.schedule import EVERY_ARM, Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.ticket import Lesson, Task, cut_network, recipe_of, starts, write_network
from rlcompress.core.train import Recipe, epochs, top1
from rlcompress.stages.workspace import Workspace

TARGETS = {"vgg19": 40.0, "mobilenetv2": 16.0, "resnet18": 30.0}
#: Batches of a training, unless --steps says otherwise.
STEPS = {"vgg19": 300, "mobilenetv2": 150, "resnet18": 300}
RATES = (0.1, 0.02)
BATCH = 128
ITERATIVE = "iterative"
FIT_IMAGES = 1024


@dataclass
class Bench:
    """One network: its schedule and what all trainings of it share."""

    network: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.run: Workspace = workspace(EXPERIMENTS[self.network])
        torch.set_num_threads(1)
        known = bundle(self.run, seed=0)
        problem = known.problem()
        self.dense = known.model().to(memory_format=torch.channels_last)
        self.schedule: Schedule = problem.prior.schedule(
            problem.dense.bytes / TARGETS[self.network]
        )
        self.held, _, _ = self.run.data.validation_parts(2000, 0, 0)
        fit = self.run.data.train.sample(FIT_IMAGES, 1)
        self.evaluator = build_evaluator(
            self.dense,
            self.run.structure,
            fit.images(),
            self.held.images(slice(0, 16)),
            None,
            known.estimates,
            positions=4096,
            cache_bytes=0,
            precision="auto",
        )

    def lesson(self, seed: int, rate: float) -> Lesson:
        data = self.run.data.train.sample(steps_of(self.network, self.options) * BATCH, seed)
        recipe = Recipe(1, BATCH, rate)
        return Lesson.of(data, self.held, recipe, seed, self.dense, arms=("distilled",))

    def begin(self, arm: str, seed: int, rate: float) -> CutNetwork:
        rewind = self.run.network("rewind")
        if arm == ITERATIVE:
            return self.iterated(rewind, seed, rate)
        ref, dense = self.run.ref, self.dense
        if arm == "init":  # of the dense network, whatever this seed is
            seed = self.run.experiment.seed
        return starts(self.schedule, self.evaluator, ref, dense, rewind, seed, arms=[arm])[arm]

    def iterated(self, rewind: nn.Module, seed: int, rate: float) -> CutNetwork:
        """The channels that several rounds leave, at the rewind weights."""
        network, rounds = self.run.structure, self.options.rounds
        last = network.counts(self.schedule)
        importance = self.evaluator.estimates.importance
        lesson = self.lesson(seed, rate)
        for number in range(1, rounds + 1):
            counts = {
                name: round(group.channels * (last[name] / group.channels) ** (number / rounds))
                for name, group in network.groups.items()
            }
            kept = kept_channels(network, importance, counts)
            if number == rounds:
                break
            model = copy.deepcopy(rewind)
            attach_masks(model, network, kept)
            for _ in epochs(model, lesson.data, lesson.recipe, seed=seed):
                pass
            detach(model)
            images = lesson.data.images(slice(0, 256)).contiguous(memory_format=torch.channels_last)
            measured = estimate(model, network, images, keeps=(1.0, 0.5), bits=(4,), seed=seed)
            # What is gone stays gone.
            importance = {n: np.where(kept[n], v, -1.0) for n, v in measured.importance.items()}
        return cut_network(rewind, network, kept, self.schedule).cpu()

    def play(self, arm: str, seed: int, rate: float, folder: Path) -> dict[str, Any]:
        lesson = self.lesson(seed, rate)
        recipe = recipe_of(arm, lesson.recipe, self.run.structure, self.schedule)
        task = Task(self.begin(arm, seed, rate), self.run.structure, recipe)
        small = task.start
        if recipe.epochs:
            *_, last = task.train(lesson)
            small = task.result(last)
        path = folder / f"{arm}-{seed}-{rate}.safetensors"
        write_network(path, copy.deepcopy(small), self.run.structure, self.run.ref, self.schedule)
        return {
            "epochs": recipe.epochs,
            "bytes": path.stat().st_size,
            "validation": top1(load_artifact(path), self.held),
            "path": str(path),
        }


def measure(network: str, options: argparse.Namespace) -> None:
    bench = Bench(network, options)
    rows = results.Rows(Path("runs") / f"tickets-{network}.jsonl")
    key = key_of(network, bench.run, options)
    folder = Path("runs") / f"tickets-{network}"
    folder.mkdir(parents=True, exist_ok=True)
    rates = RATES[:1] if options.quick else RATES
    for seed in map(int, options.seeds.split(",")):
        for arm in options.arms.split(","):
            mine = {"key": key, "seed": seed, "arm": arm}
            tried = []
            # A network that is not trained has no rate.
            for rate in rates if arm != "reconstructed" else rates[:1]:
                about = {**mine, "rate": rate}
                row = next((r for r in rows.rows if {**r, **about} == r), None)
                if row is None:
                    row = {**about, **bench.play(arm, seed, rate, folder)}
                    rows.append(row)
                    print(f"{network} {arm} seed {seed} lr {rate}: {row['validation']:.2%}")
                tried.append(row)
            best = max(tried, key=lambda r: r["validation"])
            if not any("test" in r and {**r, **mine} == r for r in rows.rows):
                test = top1(load_artifact(best["path"]), bench.run.data.test)
                rows.append({**mine, "test": test, "chosen": best["rate"]})
    if not any(r.get("arm") == "dense" and r["key"] == key for r in rows.rows):
        test = top1(bench.dense, bench.run.data.test)
        rows.append({"key": key, "arm": "dense", "seed": 0, "test": test})


def steps_of(network: str, options: argparse.Namespace) -> int:
    return options.steps or STEPS[network]


def key_of(network: str, run: Workspace, options: argparse.Namespace) -> str:
    return f"{identity(run)} {steps_of(network, options)} {options.rounds}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def summarise(options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for network, experiment in EXPERIMENTS.items():
        path = Path("runs") / f"tickets-{network}.jsonl"
        if not path.exists():
            continue
        key = key_of(network, workspace(experiment), options)
        rows = [r for r in read_lines(path) if r["key"] == key]
        everything += [{"network": network, **row} for row in rows]
        tests: dict[str, dict[int, float]] = {}
        for row in rows:
            if "test" in row:
                tests.setdefault(row["arm"], {})[row["seed"]] = 100 * row["test"]
        size = next((r["bytes"] for r in rows if "bytes" in r), 0)
        dense = tests.pop("dense", {}).get(0, float("nan"))
        steps = steps_of(network, options)
        print(f"\n{network}, {size:,} bytes, {steps} steps, dense {dense:.2f} %")
        print(f"{'arm':14}{'test':>8}{'95 %':>8}{'- fresh':>9}{'95 %':>8}{'n':>4}")
        fresh = tests.get("fresh", {})
        for arm, by_seed in sorted(tests.items(), key=lambda a: -np.mean(list(a[1].values()))):
            mean, half = interval(list(by_seed.values()))
            both = sorted(set(by_seed) & set(fresh))
            more, width = interval([by_seed[s] - fresh[s] for s in both]) if both else (0.0, 0.0)
            print(f"{arm:14}{mean:8.2f}{half:8.2f}{more:+9.2f}{width:8.2f}{len(by_seed):4}")
            if arm in ("rewind", "init", ITERATIVE, "shuffled") and both:
                differences = [by_seed[s] - fresh[s] for s in both]
                name = {"rewind": "rewind_minus_reinit"}.get(arm, f"{arm}_minus_reinit")
                figures[f"{name}_{network}"] = {
                    **results.figure(differences, "points of test accuracy, paired over seeds"),
                    "interval95": None if len(both) < 2 else [more - width, more + width],
                }
    if everything:
        print(results.write("tickets", figures, everything, keep=True))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default=",".join((*EVERY_ARM, ITERATIVE)))
    parser.add_argument("--steps", type=int, help="of a training; by default STEPS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 10, "1"
    if not options.summary:
        for network in options.networks.split(","):
            measure(network, options)
    summarise(options)


if __name__ == "__main__":
    main()
