"""What a searcher found, judged: fronts, their volumes and pictures. For `benchmarks.searchers`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.networks import identity
from rlcompress.core.files import read_lines, save_bytes
from rlcompress.core.pareto import hypervolume
from rlcompress.core.schedule import Record
from rlcompress.report.figures import front_figure, to_png
from rlcompress.stages.workspace import Workspace

#: Points of accuracy: the volume's reference, what is worth checking, what is a good schedule.
REFERENCE, WORTH, GOOD = 10.0, 10.0, 1.0
MOST_CHECKED = 12
Target = tuple[float, float]
SEARCHED = ("uniform", "taylor", "random", "evolution", "knapsack", "local", "untrained", "ppo")


def own_records(rows: Iterable[dict[str, Any]], name: str, budget: int) -> list[Record]:
    return [
        Record.from_json(json.dumps(row["record"]))
        for row in rows
        if row["kind"] == "record" and (row["searcher"], row["budget"]) == (name, budget)
    ]


def worth_checking(
    records: Sequence[Record],
    dense_bytes: int,
    target: Target,
    floor: float,
    most: int = MOST_CHECKED,
    score: str = "kl",
) -> list[Record]:
    """What a user would take who asks for each of `most` sizes, even in their logarithm: the best
    that is so small, if its accuracy is at least `floor`. So all searchers' steps are as wide:
    taken evenly over its schedules, a crowded front's are wider in places, its staircase lower."""
    found = []
    for ratio in np.geomspace(*target, most):
        small = [r for r in records if r.measurement.bytes <= dense_bytes / ratio]
        best = min(small, key=lambda r: r.measurement.error(score), default=None)
        if best is not None and best.measurement.accuracy >= floor and best not in found:
            found.append(best)
    return found


def volume(points: Sequence[tuple[float, float]], dense: float, target: Target) -> float:
    """Of (size ratio, accuracy) pairs, 0-1."""
    low, high = np.log(target)
    floor = dense - REFERENCE / 100
    costs = [(-min(np.log(ratio), high), -min(accuracy, dense)) for ratio, accuracy in points]
    area = hypervolume(np.array(costs).reshape(-1, 2), (-low, -floor))
    return float(area / ((high - low) * (dense - floor)))


def judge(
    rows: Sequence[dict[str, Any]], target: Target, score: str = "kl"
) -> list[dict[str, Any]]:
    """A row for each finished search of one seed."""
    (dense,) = (row for row in rows if row["kind"] == "dense")
    accuracy = {row["digest"]: row["accuracy"] for row in rows if row["kind"] == "checked"}
    judged: list[dict[str, Any]] = []
    for row in rows:
        if row["kind"] != "done":
            continue
        records = own_records(rows, row["searcher"], row["budget"])
        ratios = [dense["bytes"] / r.measurement.bytes for r in records]
        searched = [(x, r.measurement.accuracy) for x, r in zip(ratios, records, strict=True)]
        floor = dense["searched"] - WORTH / 100
        worth = worth_checking(records, dense["bytes"], target, floor, score=score)
        checked = [
            (dense["bytes"] / r.measurement.bytes, accuracy[r.schedule.digest()]) for r in worth
        ]
        good = [ratio for ratio, value in checked if value >= dense["checked"] - GOOD / 100]
        about: dict[str, Any] = {
            key: row[key] for key in ("searcher", "budget", "commit") if key in row
        }
        judged.append(
            {
                **about,
                "evaluations": len(records),
                "searched": volume(searched, dense["searched"], target),
                "checked": volume(checked, dense["checked"], target),
                "ratio": max(good, default=None),
            }
        )
    return judged


def picture(
    network: str, run: Workspace, seed: int, budget: int, rows: list[dict[str, Any]]
) -> None:
    """`results/searchers-NETWORK.png`: one seed's fronts as checked, on the validation images held
    back; and the smallest ticket within a point that `benchmarks.density` has of that seed."""
    (dense,) = (row for row in rows if row["kind"] == "dense")
    accuracy = {row["digest"]: row["accuracy"] for row in rows if row["kind"] == "checked"}
    records = [
        replace(record, measurement=replace(record.measurement, accuracy=checked))
        for name in SEARCHED
        for record in own_records(rows, name, budget)
        if (checked := accuracy.get(record.schedule.digest())) is not None
    ]
    if not any(record.searcher == "uniform" for record in records):
        return  # nothing to compare with
    whole = replace(records[0].measurement, bytes=dense["bytes"], accuracy=dense["checked"], kl=0.0)
    key = f"{identity(run)} {budget} "
    made = [
        row
        for row in read_lines(Path("runs") / f"density-{network}.jsonl")
        if row["key"].startswith(key) and row["seed"] == seed and row.get("ok")
        if row["method"] in ("knapsack", "knapsack trained")
    ]
    tickets = []
    for row in sorted(made, key=lambda row: row["bytes"])[:1]:
        m = replace(whole, bytes=row["bytes"], accuracy=row["validation"], kl=math.nan)
        ratio = whole.bytes / m.bytes
        tickets.append({"searcher": "knapsack", "ratio": ratio, "ticket": m.to_dict()})
    picture = to_png(front_figure(records, whole, tickets))
    save_bytes(results.FOLDER / f"searchers-{network}.png", picture)


def figures_of(network: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints a network's table; each searcher's figures, and of PPO those against the others. The
    best of the others is of those that have all of PPO's seeds."""
    figures: dict[str, Any] = {}
    volumes: dict[tuple[str, int], dict[int, float]] = {}
    print(f"\n{network:12}{'evaluations':>12}{'seeds':>6}{'searched':>10}", end="")
    print(f"{'checked':>18}{'ratio':>18}")
    for count, name in sorted({(r["budget"], r["searcher"]) for r in rows}):
        mine = [r for r in rows if (r["searcher"], r["budget"]) == (name, count)]
        volumes[name, count] = {r["seed"]: r["checked"] for r in mine}
        checked = results.figure([r["checked"] for r in mine], "share of the rectangle")
        figures[f"{name}{count}_{network}"] = checked
        searched = statistics.mean(r["searched"] for r in mine)
        ratios = [r["ratio"] for r in mine if r["ratio"] is not None]
        unit = "times fewer bytes at 1 point or less, of the seeds that reach it"
        # None of them: written too, or what was measured before would stay.
        none = {"value": None, "unit": unit, "sd": None, "n": 0}
        figures[f"{name}{count}_ratio_{network}"] = ratio = (
            results.figure(ratios, unit) if ratios else none
        )
        text = f"{name:12}{count:12}{len(mine):6}{searched:10.3f}"
        text += f"{checked['value']:10.3f} ± {checked['sd'] or 0:.3f}"
        if ratios:
            text += f"{ratio['value']:10.1f} ± {ratio['sd'] or 0:.1f} (n = {len(ratios)})"
        print(text)
    for budget in sorted({count for name, count in volumes if name == "ppo"}):
        ours = volumes["ppo", budget]
        others = {
            name: statistics.mean(by_seed[seed] for seed in ours)
            for (name, count), by_seed in volumes.items()
            if count == budget and not name.startswith("ppo") and ours.keys() <= by_seed.keys()
        }
        pairs = {f"ppo{budget}_minus_local300_{network}": ("local", 300)} if budget < 300 else {}
        if others:
            best = max(others, key=lambda name: others[name])
            print(f"best of the others with {budget}: {best}")
            pairs[f"ppo{budget}_minus_best{budget}_{network}"] = (best, budget)
        for figure, other in pairs.items():
            theirs = volumes.get(other, {})
            relative = [
                (ours[seed] - theirs[seed]) / theirs[seed]
                for seed in ours
                if theirs.get(seed, 0.0) > 0
            ]
            if relative:
                figures[figure] = results.figure(relative, f"relative volume, against {other[0]}")
    return figures
