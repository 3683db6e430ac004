"""Stage 2: searchers measure schedules; the driver alone appends them to the archive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlcompress import searchers
from rlcompress.core.files import JsonLines, read_json, save_json
from rlcompress.core.pareto import archive_front, best_at_floor
from rlcompress.core.schedule import Measurement, Record
from rlcompress.live import console, stage
from rlcompress.searchers import Settings
from rlcompress.stages.describe import notes
from rlcompress.stages.workspace import Workspace


def search_all(run: Workspace) -> list[Record]:
    """Every searcher of the experiment, up to its evaluations; the whole archive."""
    e, folder = run.experiment, run.folder / "search"
    run.claim(folder, run.search_inputs())
    own = e.search.episodes
    budgets = dict.fromkeys(e.search.baselines, e.search.baseline_episodes or own)
    budgets[e.search.searcher] = own
    records = run.archive()
    # The searcher first: Ray's first workers, warm by now, can become PPO's actors.
    for name in dict.fromkeys([e.search.searcher, *e.search.baselines]):
        finished = folder / f"{name}.done"
        mine = [r for r in records if r.searcher == name]
        if finished.exists() and read_json(finished) >= budgets[name]:
            continue
        if len(mine) < budgets[name]:
            _search_with(run, name, budgets[name], mine, records)
        # A searcher may have fewer proposals than evaluations; that is not to be tried again.
        save_json(finished, budgets[name])
    if not (folder / "layers.json").exists():
        _describe_problem(run, folder)
    return run.archive()


def searched(run: Workspace, records: list[Record]) -> dict[str, Any]:
    """What `search --json` prints: the dense network's measurement, and of each searcher its
    front and the densest schedule at the accuracy floor (null if there is none)."""
    dense = Measurement.from_dict(read_json(run.folder / "search" / "dense.json"))
    floor = dense.accuracy - run.experiment.ticket.floor / 100
    rows = {}
    for name in dict.fromkeys(r.searcher for r in records):
        mine = [r for r in records if r.searcher == name]
        best = best_at_floor(mine, floor)
        rows[name] = {
            "evaluations": len(mine),
            "best": json.loads(best.to_json()) if best else None,
            "front": [json.loads(r.to_json()) for r in archive_front(mine)],
        }
    return {
        "experiment": run.name,
        "spec_hash": run.hash,
        "archive": str(run.folder / "search" / "archive.jsonl"),
        "dense": dense.to_dict(),
        "floor": floor,
        "searchers": rows,
    }


def _describe_problem(run: Workspace, folder: Path) -> None:
    network = run.problem.network
    rows = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "group": layer.group,
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel": layer.kernel,
            "macs": layer.macs,
            "params": layer.weights,
        }
        for layer in network.layers.values()
    ]
    save_json(folder / "dense.json", run.problem.dense.to_dict())
    save_json(folder / "layers.json", rows)


def _search_with(
    run: Workspace, name: str, budget: int, history: list[Record], records: list[Record]
) -> None:
    e, folder = run.experiment, run.folder / "search"
    settings = Settings(budget, e.search.target, e.seed, e.search.sensitivity)
    run.problem.require_reachable(settings.target)
    if not records:
        for line in notes(run.structure, run.problem.evaluator):
            console.print(line)
    _describe_problem(run, folder)
    dense = run.problem.dense
    floor = dense.accuracy - e.ticket.floor / 100
    with (
        JsonLines(folder / "archive.jsonl") as archive,
        JsonLines(folder / "curve.jsonl") as curve,
        stage(f"search {name}", budget, len(history)) as shown,
    ):
        done = list(history)
        for record in _records(run, name, settings, history, curve):
            archive.append(record.to_json())
            done.append(record)
            best = best_at_floor(done, floor)
            shown.update(
                record.evaluation,
                f"front {len(archive_front(done))}  "
                + (
                    f"best {dense.bytes / best.measurement.bytes:.1f}x "
                    f"{best.measurement.accuracy:.1%} "
                    f"{best.measurement.density:.0f} %/MB"
                    if best
                    else f"none yet at {floor:.1%}"
                ),
            )
            records.append(record)


def _records(
    run: Workspace, name: str, settings: Settings, history: Sequence[Record], curve: JsonLines
) -> Iterator[Record]:
    e = run.experiment.ppo
    if name == "untrained":
        from rlcompress.rl import untrained

        return untrained.search(run.problem, settings, history, ppo=e)
    if name != "ppo":
        measure = searchers.in_process(run.problem)
        if run.has_workers():
            from rlcompress.rl import cluster, pool

            cluster.start_ray(e)
            measure = pool.Pool(run.bundle, e.num_env_runners, e.num_gpus_per_env_runner).measure
        return searchers.find(name)(run.problem, settings, history, measure)
    from rlcompress.rl import ppo

    return ppo.search(
        run.bundle,
        run.problem,
        settings,
        history,
        ppo=e,
        folder=run.folder / "search" / "policy",
        on_iteration=lambda row: curve.append(json.dumps(row)),
    )
