"""Stage 2: searchers measure schedules; the driver alone appends them to the archive."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlcompress import searchers
from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_json, save_json
from rlcompress.core.pareto import Front, archive_front, best_at_floor
from rlcompress.core.schedule import Measurement, Record
from rlcompress.live import Stage, console, stage
from rlcompress.report.card import REMEDY, points
from rlcompress.searchers import Settings
from rlcompress.stages.describe import notes
from rlcompress.stages.policies import PLAYED, agent_of, begin_with, policy_of
from rlcompress.stages.workspace import Workspace

#: Between two times that the disk is asked for the archive, while records come faster.
SYNC_SECONDS = 0.1


def search_all(run: Workspace) -> list[Record]:
    """Every searcher of the experiment, up to its evaluations; the whole archive."""
    e, folder = run.experiment, run.folder / "search"
    own = e.search.episodes
    budgets = dict.fromkeys(e.search.baselines, e.search.baseline_episodes or own)
    budgets[e.search.searcher] = own
    policy = policy_of(run)
    run.claim(folder, run.inputs.search)
    for name in budgets.keys() & PLAYED:
        begin_with(run, name, policy)
    records = run.archive()
    # The searcher first: Ray's first workers, warm by now, can become PPO's actors.
    for name in dict.fromkeys([e.search.searcher, *e.search.baselines]):
        finished = folder / f"{name}.done"
        mine = [r for r in records if r.searcher == name]
        if _finished(finished, run.inputs.search) >= budgets[name]:
            continue
        if len(mine) < budgets[name]:
            _require_whole(folder / "archive.jsonl", name, mine)
            _search_with(run, name, budgets[name], mine, records, policy)
        if not any(r.searcher == name for r in records):
            said = (
                f"{name} has no schedule within search.target = {list(e.search.target)}; widen it"
            )
            if name == e.search.searcher:
                raise UserError(said)
            console.print(said)
            continue
        # A searcher may have fewer proposals than evaluations; that is not to be tried again.
        done = {"evaluations": budgets[name], "inputs": run.inputs.search}
        save_json(finished, done)
    if not (folder / "layers.json").exists():
        _describe_problem(run, folder)
    return run.archive()


def _require_whole(path: Path, name: str, mine: list[Record]) -> None:
    """Raises UserError where a searcher's lines are not its first ones: it would go on as another
    search."""
    for number, record in enumerate(mine, start=1):
        if record.evaluation != number:
            raise UserError(
                f"{path}: evaluation {number} of {name} is gone, {record.evaluation} is there; "
                f"remove the lines of {name} from there on, or start over with --fresh"
            )


def _finished(path: Path, inputs: str) -> int:
    """The evaluations that a searcher is through with. Of other inputs, or of none (as older
    versions wrote it), none: the file may come from a copy at `storage` that was cut off."""
    done = read_json(path) if path.exists() else None
    if not isinstance(done, dict) or done.get("inputs") != inputs:
        return 0
    return int(done["evaluations"])


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


def outcome_lines(run: Workspace, records: list[Record]) -> list[str]:
    """Of each searcher its densest schedule at the accuracy floor, or that none is there."""
    found = searched(run, records)
    dense, allowed = found["dense"], points(run.experiment.ticket.floor)
    lines = []
    for name, mine in found["searchers"].items():
        said = f"{mine['evaluations']} schedules measured"
        if mine["best"] is None:
            lines.append(f"{name}: {said}, none within {allowed} of dense, ticket.floor: {REMEDY}")
            continue
        best = mine["best"]["measurement"]
        lines.append(
            f"{name}: {said}; within {allowed} of dense {dense['bytes'] / best['bytes']:.1f}x, "
            f"{best['bytes']:,} bytes, {best['accuracy']:.2%} (dense {dense['accuracy']:.2%})"
        )
    return lines


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
    run: Workspace,
    name: str,
    budget: int,
    history: list[Record],
    records: list[Record],
    policy: Path | None,
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
        JsonLines(folder / "archive.jsonl", interval=SYNC_SECONDS) as archive,
        JsonLines(folder / "curve.jsonl", interval=SYNC_SECONDS) as curve,
        stage(f"search {name}", budget, len(history)) as shown,
    ):

        def on_iteration(row: dict[str, Any]) -> None:
            archive.sync()
            curve.append(json.dumps(row))

        keep = Keeper(archive, shown, dense, floor, history)
        for record in _records(run, name, settings, history, on_iteration, policy):
            keep(record)
            records.append(record)


class Keeper:
    """What the driver does with each record: a line of the archive, front and best kept up, and
    shown. `history` is in the archive already; `floor` is an accuracy (0-1)."""

    def __init__(
        self,
        archive: JsonLines,
        shown: Stage,
        dense: Measurement,
        floor: float,
        history: Iterable[Record] = (),
    ) -> None:
        self.archive, self.shown = archive, shown
        self.dense, self.floor = dense, floor
        self.front, self.best = Front(), best_at_floor(history, floor)
        for record in history:
            self.front.add(record.measurement.bytes, record.measurement.kl)

    def __call__(self, record: Record) -> None:
        self.archive.append(record.to_json())
        self.front.add(record.measurement.bytes, record.measurement.kl)
        self.best = best_at_floor([r for r in (self.best, record) if r], self.floor)
        self.shown.update(record.evaluation, self._said())

    def _said(self) -> str:
        if self.best is None:
            allowed = points(100 * (self.dense.accuracy - self.floor))
            return f"front {len(self.front)}  none yet within {allowed} of dense ({self.floor:.1%})"
        best = self.best.measurement
        return (
            f"front {len(self.front)}  best {self.dense.bytes / best.bytes:.1f}x "
            f"{best.accuracy:.1%} {best.density:.0f} %/MB"
        )


def _records(
    run: Workspace,
    name: str,
    settings: Settings,
    history: Sequence[Record],
    on_iteration: Callable[[dict[str, Any]], None],
    policy: Path | None,
) -> Iterator[Record]:
    e = run.experiment.ppo
    if name == "untrained":
        from rlcompress.rl import untrained

        return untrained.search(run.problem, settings, history, ppo=e, begin=agent_of(policy))
    if name != "ppo":
        measure = searchers.in_process(run.problem)
        if run.has_workers():
            from rlcompress.rl import cluster, pool

            cluster.start_ray(e)
            measure = pool.Pool(run.bundle, e.num_env_runners, e.num_gpus_per_env_runner).measure
        if name == "transfer":
            from rlcompress.rl import transfer

            agent = agent_of(policy)
            return transfer.search(run.problem, settings, history, measure, ppo=e, agent=agent)
        return searchers.find(name)(run.problem, settings, history, measure)
    from rlcompress.rl import ppo

    def iteration(row: dict[str, Any]) -> None:
        on_iteration(row)
        run.keep()

    return ppo.search(
        run.bundle,
        run.problem,
        settings,
        history,
        ppo=e,
        folder=run.folder / "search" / "policy",
        begin=agent_of(policy),
        on_iteration=iteration,
    )


def print_front(run: Workspace, name: str) -> None:
    """A searcher's front as a table, the smallest network first."""
    table, dense = Table(box=None), run.problem.dense
    for column in ("bytes", "times fewer", "accuracy", "to dense", "KL"):
        table.add_column(column, justify="right")
    for record in archive_front(r for r in run.archive() if r.searcher == name):
        m = record.measurement
        table.add_row(
            f"{m.bytes:,}",
            f"{dense.bytes / m.bytes:.1f}",
            f"{m.accuracy:.1%}",
            f"{100 * (m.accuracy - dense.accuracy):+.1f}",
            f"{m.kl:.4f}",
        )
    console.print(table)
