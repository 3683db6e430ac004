"""Successive halving: the best schedules of a search, measured again on more images and by
several fits, so that the winner is not the luckiest one.

A search picks the best of hundreds by some hundred images; the pick is too good by what those
images happen to favour. Jamieson & Talwalkar (2016) for the halving.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlcompress.core.evaluate import Evaluator
from rlcompress.core.files import JsonLines, read_lines
from rlcompress.core.pareto import archive_front, rank_at_floor
from rlcompress.core.schedule import Measurement, Record
from rlcompress.live import stage
from rlcompress.stages.workspace import Workspace

#: Points below the floor from where a schedule may still turn out to reach it.
MARGIN = 1.0


@dataclass(frozen=True)
class Rung:
    """How the finalists that are left are measured: images that score and that are fitted on, and
    the seeds of the fits."""

    score_images: int
    fit_images: int
    seeds: tuple[int, ...]


def candidates(run: Workspace, records: Sequence[Record]) -> list[Record]:
    """The densest of a searcher's front that may reach the floor, at most `search.finalists`;
    the most faithful one if none may."""
    e = run.experiment
    front = archive_front(records, e.search.score)
    floor = run.problem.dense.accuracy - (e.ticket.floor + MARGIN) / 100
    near = [r for r in front if r.measurement.accuracy >= floor]
    near.sort(key=lambda r: -r.measurement.density)
    if not near and front:
        near = [min(front, key=lambda r: r.measurement.error(e.search.score))]
    return near[: e.search.finalists]


def finals(run: Workspace, name: str, records: Sequence[Record]) -> list[Record]:
    """A searcher's finalists, the best first: those at the accuracy floor by density, the others
    behind them by accuracy. Their measurements are those of the last rung they reached; every
    one is a line of `search/finals.jsonl`, and none is measured twice."""
    e = run.experiment
    left = candidates(run, records)
    inputs = run.inputs.search  # asked once: it hashes the file of `dense.weights`
    images, fitted = len(run.splits[1]), 2 * e.calibration.fit_images
    rungs = [
        Rung(images, fitted, (e.seed,)),
        Rung(images, max(e.ticket.fit_images, fitted), (e.seed + 1, e.seed + 2)),
    ]
    path = run.folder / "search" / "finals.jsonl"
    known = {(line["inputs"], line["schedule"]): line["measurement"] for line in read_lines(path)}
    out: list[Record] = []
    done, total = 0, len(left) + -(-len(left) // 2)
    with JsonLines(path) as lines, stage(f"finals {name}", total) as shown:
        for number, rung in enumerate(rungs, start=1):
            evaluators: list[Evaluator] = []
            measured, floor = [], 0.0
            for record in left:
                schedule = record.schedule.to_json()
                key = (f"{inputs} {rung}", schedule)
                if key not in known:
                    if not evaluators:
                        dense = run.network("trained").to(run.device)
                        evaluators = [
                            run.evaluator(dense, rung.fit_images, run.splits[1], s)
                            for s in rung.seeds
                        ]
                    several = [x.evaluate(record.schedule) for x in evaluators]
                    known[key] = {
                        "mean": _mean(several).to_dict(),
                        "dense": evaluators[0].dense.accuracy,
                    }
                    line = {"searcher": name, "rung": number, "inputs": key[0]}
                    lines.append(
                        json.dumps({**line, "schedule": schedule, "measurement": known[key]})
                    )
                mean = Measurement.from_dict(known[key]["mean"])
                floor = known[key]["dense"] - e.ticket.floor / 100
                measured.append(replace(record, measurement=mean))
                done += 1
                shown.update(done, f"{mean.accuracy:.1%}")
            measured.sort(
                key=lambda r: rank_at_floor(r.measurement.accuracy, floor, r.measurement.density),
                reverse=True,
            )
            left, out = measured[: -(-len(measured) // 2)], measured + out[len(measured) :]
    return out


def _mean(several: Sequence[Measurement]) -> Measurement:
    """Means of what images decide; what the schedule decides is the same in all."""

    def mean(name: str) -> float:
        return sum(getattr(m, name) for m in several) / len(several)

    return replace(
        several[0],
        accuracy=mean("accuracy"),
        loss=mean("loss"),
        kl=mean("kl"),
        density=mean("density"),
        unexplained=mean("unexplained"),
    )
