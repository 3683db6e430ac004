"""Which score tells the truth: what a schedule's scores say of its accuracy after full recovery.

    uv run python -m benchmarks.proxy                           # hours; goes on where it stopped
    uv run python -m benchmarks.proxy --networks mobilenetv2    # two networks: two processes
    uv run python -m benchmarks.proxy --quick                   # 4 schedules a size, 3 steps

Fashion-MNIST, three sizes a network, schedules of each size within 3 % of its bytes: the prior's
answer with growing shares of its choices moved, uniform rules with shares moved, random draws.

label    accuracy on the 10,000 test images after reconstruction on 1,024 training images and
         `--steps` steps of 128 images of quantization-aware training taught by the dense network;
         the mean of two trainings (other images, other order). The test split chooses nothing.
scores   of 256 images that nothing was fitted on: KL to the dense network's logits and accuracy,
         and the mean share of unexplained variance over the layers, after each `--recoveries`

spearman  between score and label within a size (higher is better for all: losses are negated),
          the mean over sizes; its error is their standard deviation
ceiling   the same between the two trainings: what a perfect score of one training would reach
cost      the median of one evaluation's time / that of a plain fp32 forward of the same 512
          images just before it, one thread, no cache

Every schedule is a line of runs/proxy-NETWORK.jsonl as soon as it is measured.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks import results
from benchmarks.networks import EXPERIMENTS, bundle, identity, workspace
from benchmarks.schedules import diverse
from rlcompress.core.files import read_lines
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Schedule
from rlcompress.core.ticket import Lesson, Task, fitted_network
from rlcompress.core.train import Recipe
from rlcompress.stages.workspace import Workspace

SIZES = {"vgg19": (20, 40, 80), "mobilenetv2": (8, 16, 30), "resnet18": (15, 30, 60)}
RECOVERIES = ("none", "bn", "reconstruct", "steps:20")
#: The score that searches use by default.
DEFAULT = "reconstruct", "kl"
TRAININGS = (1, 2)
IMAGES = 256
FIT_IMAGES = 1024
BATCH = 128


@dataclass(frozen=True)
class Settings:
    """What a label means, beside the network: rows of other settings are left alone."""

    steps: int
    lr: float
    test_images: int
    seed: int

    def key(self, dense: str) -> str:
        return f"{dense} {self.steps} {self.lr:g} {self.test_images} {self.seed}"


def path_of(network: str) -> Path:
    return Path("runs") / f"proxy-{network}.jsonl"


def merged(lines: list[dict[str, Any]], key: str) -> dict[tuple[int, str], dict[str, Any]]:
    """(size, digest) -> row. Scores that were asked for later are on lines of their own."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        if line["key"] == key:
            row = found.setdefault((line["size"], line["digest"]), line)
            row["scores"] = {**row["scores"], **line["scores"]}
    return found


class Judge:
    """Labels and scores schedules of one network."""

    def __init__(self, run: Workspace, settings: Settings, recoveries: tuple[str, ...]) -> None:
        seed = settings.seed
        base = bundle(run, seed=seed, fit_images=IMAGES, score_images=IMAGES, cache_bytes=0)
        self.problems: dict[str, Problem] = {
            recovery: replace(base, recovery=recovery).problem() for recovery in recoveries
        }
        self.model = base.model().to(memory_format=torch.channels_last)
        batch = np.concatenate([base.fit_NCHW, base.score_NCHW])
        self.batch = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
        self._run, self._base, self._settings = run, base, settings

    @functools.cached_property
    def full(self) -> Problem:
        """The full recovery's fit, with the same estimates, so that the same channels survive."""
        fit = self._run.data.train.sample(FIT_IMAGES, self._settings.seed).images().numpy()
        assert self._base.labels_N is not None
        score, labels = self._base.score_NCHW[:16], self._base.labels_N[:16]
        few = replace(self._base, score_NCHW=score, labels_N=labels)
        return replace(few, fit_NCHW=fit, recovery="reconstruct").problem()

    @functools.cached_property
    def lessons(self) -> list[Lesson]:
        """One a training."""
        settings, data = self._settings, self._run.data
        test = data.test.sample(settings.test_images, settings.seed)
        recipe = Recipe(1, BATCH, settings.lr, distill=0.5)
        return [
            Lesson.of(
                data.train.sample(settings.steps * BATCH, settings.seed + 100 * training),
                test,
                recipe,
                settings.seed + training,
                self.model,
                device="cpu",
            )
            for training in TRAININGS
        ]

    def label(self, schedule: Schedule) -> list[float]:
        """Test accuracy (0-1) after full recovery, one a training."""
        small = fitted_network(self.model, self.full.evaluator, schedule)
        task = Task(small, self.full.network)
        found = []
        for lesson in self.lessons:
            *_, last = task.train(lesson)
            found.append(float(last.curve[-1]["validation_accuracy"]))
        return found

    def score(self, schedule: Schedule, recovery: str) -> dict[str, float]:
        """What an evaluation says, and its cost in plain forwards."""
        evaluator = self.problems[recovery].evaluator
        plain = self.plain_seconds()
        begun = time.perf_counter()
        prefix = evaluator.run(schedule)
        measured = evaluator.finish(prefix)
        seconds = time.perf_counter() - begun
        return {
            "kl": measured.kl,
            "accuracy": measured.accuracy,
            "unexplained": float(np.mean(prefix.unexplained)),
            "cost": seconds / plain,
        }

    def plain_seconds(self) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model(self.batch)
        return time.perf_counter() - begun


def plan(problem: Problem, sizes: tuple[int, ...], count: int, seed: int) -> Iterator[Any]:
    """(size, kind, schedule), size by size in turns, so that a part of it is balanced."""
    found = [
        list(islice(diverse(problem, problem.dense.bytes / size, seed), count)) for size in sizes
    ]
    for number in range(count):
        for size, schedules in zip(sizes, found, strict=True):
            yield size, *schedules[number]


def measure(
    network: str, settings: Settings, sizes: tuple[int, ...], count: int, recoveries: Any
) -> None:
    """Measures what is missing of one network."""
    run = workspace(EXPERIMENTS[network])
    torch.set_num_threads(1)
    key = settings.key(identity(run))
    rows = results.Rows(path_of(network))
    done = merged(rows.rows, key)
    judge = Judge(run, settings, recoveries)
    planned = list(plan(judge.full, sizes, count, settings.seed))
    missing = [
        (size, kind, schedule, [r for r in recoveries if r not in known.get("scores", ())], known)
        for size, kind, schedule in planned
        for known in [done.get((size, schedule.digest()), {})]
    ]
    missing = [item for item in missing if item[3]]
    print(f"{network}: {len(planned)} schedules, {len(missing)} to measure", flush=True)
    begun = time.monotonic()
    for number, (size, kind, schedule, wanted, known) in enumerate(missing, start=1):
        scores = {recovery: judge.score(schedule, recovery) for recovery in wanted}
        labels = known["labels"] if known else judge.label(schedule)
        rows.append(
            {
                "key": key,
                "network": network,
                "size": size,
                "kind": kind,
                "digest": schedule.digest(),
                "labels": labels,
                "scores": scores,
                "schedule": schedule.to_dict(),
            }
        )
        each = (time.monotonic() - begun) / number
        print(
            f"{network} {size:3}x {kind:12} label {statistics.mean(labels):.2%}  "
            + "".join(f"KL {score['kl']:.4f} " for score in scores.values())
            + f" {each:.0f} s each, {each * (len(missing) - number) / 60:.0f} min left",
            flush=True,
        )


def rank_correlations(rows: list[dict[str, Any]], recovery: str, score: str) -> list[float]:
    """Spearman of a score (losses negated) and the labels, a size each."""
    sign = 1 if score == "accuracy" else -1
    return _within_sizes(
        rows,
        lambda row: sign * row["scores"][recovery][score],
        lambda row: statistics.mean(row["labels"]),
    )


def ceilings(rows: list[dict[str, Any]]) -> list[float]:
    """Spearman of the two trainings, a size each."""
    return _within_sizes(rows, lambda row: row["labels"][0], lambda row: row["labels"][1])


def _within_sizes(rows: list[dict[str, Any]], one: Any, two: Any) -> list[float]:
    found = []
    for size in sorted({row["size"] for row in rows}):
        mine = [row for row in rows if row["size"] == size]
        if len(mine) >= 3:
            first, second = [one(row) for row in mine], [two(row) for row in mine]
            # What is the same for all of them says nothing, and has no rank.
            constant = len(set(first)) == 1 or len(set(second)) == 1
            found.append(0.0 if constant else float(spearmanr(first, second).statistic))
    return found


def summarise(settings: Settings) -> None:
    """Prints the table and writes the result file, of all networks measured so far."""
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for network, experiment in EXPERIMENTS.items():
        if not path_of(network).exists():
            continue
        key = settings.key(identity(workspace(experiment)))
        rows = list(merged(read_lines(path_of(network)), key).values())
        limits = ceilings(rows)
        if not limits:
            continue
        sizes = " ".join(f"{size}x" for size in sorted({row["size"] for row in rows}))
        print(f"\n{network}: {len(rows)} schedules of {sizes}")
        print(f"{'recovery':14}{'score':14}{'spearman':>9}{'sd':>7}{'cost':>8}")
        for recovery in dict.fromkeys(name for row in rows for name in row["scores"]):
            known = [row for row in rows if recovery in row["scores"]]
            costs = [row["scores"][recovery]["cost"] for row in known]
            for score in ("kl", "accuracy", "unexplained"):
                values = rank_correlations(known, recovery, score)
                if not values:
                    continue
                sd = statistics.stdev(values) if len(values) > 1 else 0.0
                print(
                    f"{recovery:14}{score:14}{statistics.mean(values):9.2f}{sd:7.2f}"
                    f"{statistics.median(costs):8.2f}"
                )
                name = f"{recovery.replace(':', '')}_{score}_{network}"
                figures[name] = results.figure(values, "Spearman within a size, over sizes")
            figures[f"cost_{recovery.replace(':', '')}_{network}"] = results.median_figure(
                costs, "plain fp32 forwards"
            )
        print(f"{'two trainings':28}{statistics.mean(limits):9.2f}")
        figures[f"ceiling_{network}"] = results.figure(limits, "Spearman of two trainings")
        recovery, score = DEFAULT
        if f"cost_{recovery}_{network}" in figures:
            figures[f"spearman_{network}"] = figures[f"{recovery}_{score}_{network}"]
            figures[f"cost_{network}"] = figures[f"cost_{recovery}_{network}"]
        everything += [{k: v for k, v in row.items() if k != "schedule"} for row in rows]
    if everything:
        print(results.write("proxy", figures, everything, keep=True), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2,resnet18")
    parser.add_argument("--schedules", type=int, default=30, help="a size")
    parser.add_argument("--steps", type=int, default=60, help="of training behind a label")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--sizes", help="e.g. 20,40,80 in place of each network's own")
    parser.add_argument("--recoveries", default=",".join(RECOVERIES))
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.schedules, options.steps, options.test_images = 4, 3, 1000
    settings = Settings(options.steps, options.lr, options.test_images, seed=0)
    for network in () if options.summary else options.networks.split(","):
        sizes: tuple[int, ...] = SIZES[network]
        if options.sizes:
            sizes = tuple(int(size) for size in options.sizes.split(","))
        recoveries = tuple(options.recoveries.split(","))
        measure(network, settings, sizes, options.schedules, recoveries)
        summarise(settings)
    if options.summary:
        summarise(settings)


if __name__ == "__main__":
    main()
