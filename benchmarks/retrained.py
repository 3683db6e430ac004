"""What a front is worth once its schedules are retrained: `benchmarks.transfer` prints it.

Of each front the schedules at `RETRAINED` sizes are reconstructed on 1,024 training images and
trained for `STEPS` batches, quantization-aware, taught by the dense network: the recovery of
`benchmarks.proxy`. Judged on the validation images that the search left alone. Every training is a
line of runs/retrained-NETWORK.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.fronts import WORTH, own_records, volume, worth_checking
from benchmarks.networks import EXPERIMENTS, workspace
from benchmarks.searchers import Problems, key_of, path_of
from rlcompress.core.files import read_lines
from rlcompress.core.schedule import Record
from rlcompress.core.ticket import Lesson, Task, fitted_network
from rlcompress.core.train import Recipe

RETRAINED, STEPS, BATCH, RATE = 5, 30, 128, 0.02
#: Searcher, evaluations, sensitivity.
Arm = tuple[str, int, str]


def rows_path(network: str) -> Path:
    return Path("runs") / f"retrained-{network}.jsonl"


def _key(network: str, seed: int) -> str:
    return f"{key_of(workspace(EXPERIMENTS[network]), '')} {seed} {STEPS} {BATCH} {RATE:g}"


def _fronts(
    network: str, seed: int, arms: Iterable[Arm]
) -> tuple[dict[str, Any], dict[Arm, list[Record]]]:
    """What is known of the dense network, and the schedules to retrain of each finished search."""
    run = workspace(EXPERIMENTS[network])
    every, target = read_lines(path_of(network, seed)), run.experiment.search.target
    dense: dict[str, Any] = {}
    fronts = {}
    for arm in arms:
        name, budget, kind = arm
        key = key_of(run, kind)
        rows = [row for row in every if row["key"] == key]
        if not any(r["kind"] == "done" and (r["searcher"], r["budget"]) == arm[:2] for r in rows):
            continue
        dense = next(row for row in rows if row["kind"] == "dense")
        floor = dense["searched"] - WORTH / 100
        records = own_records(rows, name, budget)
        fronts[arm] = worth_checking(records, dense["bytes"], target, floor, RETRAINED)
    return dense, fronts


def measure(network: str, seed: int, arms: Iterable[Arm]) -> None:
    """Retrains what is missing."""
    run = workspace(EXPERIMENTS[network])
    torch.set_num_threads(1)
    rows = results.Rows(rows_path(network))
    key = _key(network, seed)
    done = {row["digest"] for row in rows.rows if row["key"] == key}
    _, fronts = _fronts(network, seed, arms)
    wanted = {r.schedule.digest(): r.schedule for records in fronts.values() for r in records}
    missing = {digest: schedule for digest, schedule in wanted.items() if digest not in done}
    print(f"{network}: {len(wanted)} schedules, {len(missing)} to retrain", flush=True)
    if not missing:
        return
    problems = Problems(run, seed)
    fresh = problems.fresh()
    data = run.data.train.sample(STEPS * BATCH, seed + 100)
    recipe = Recipe(1, BATCH, RATE, distill=0.5)
    lesson = Lesson.of(data, problems.held_back, recipe, seed, problems.model, device="cpu")
    for digest, schedule in missing.items():
        small = fitted_network(problems.model, fresh.evaluator, schedule)
        *_, last = Task(small, fresh.network).train(lesson)
        accuracy = float(last.curve[-1]["validation_accuracy"])
        rows.append({"key": key, "digest": digest, "accuracy": accuracy})


def volumes(network: str, seed: int, arms: Iterable[Arm]) -> dict[Arm, float]:
    """Share of the rectangle of (log size ratio, accuracy) that each retrained front covers."""
    run = workspace(EXPERIMENTS[network])
    key = _key(network, seed)
    known = {r["digest"]: r["accuracy"] for r in read_lines(rows_path(network)) if r["key"] == key}
    dense, fronts = _fronts(network, seed, arms)
    found = {}
    for arm, records in fronts.items():
        points = [
            (dense["bytes"] / r.measurement.bytes, known.get(r.schedule.digest())) for r in records
        ]
        measured = [(ratio, accuracy) for ratio, accuracy in points if accuracy is not None]
        if len(measured) == len(points):
            found[arm] = volume(measured, dense["checked"], run.experiment.search.target)
    return found
