"""The verb `tune`: PPO searches that differ in reward and settings, merged into one front."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_json, read_lines, save_json
from rlcompress.core.pareto import archive_front, best_at_floor
from rlcompress.core.schedule import Record
from rlcompress.live import console, stage
from rlcompress.stages.deliver import tracker_of
from rlcompress.stages.policies import agent_of, digest_of, find_policy
from rlcompress.stages.workspace import Workspace, cores


@dataclass
class Trial:
    """One set of options and what it has measured. `number` counts trials as they report."""

    number: int
    options: dict[str, Any]
    records: dict[int, Record] = field(default_factory=dict)
    hypervolume: float = 0.0
    error: str = ""


def require_space(run: Workspace) -> None:
    """Raises UserError where there is nothing to tune."""
    if not run.experiment.tune.space:
        raise UserError(
            f"{run.name}: tune.space is empty; for example "
            "--set 'tune.space={ppo.kl_weight: {loguniform: [0.1, 10]}}'"
        )


def tune(run: Workspace) -> list[Trial]:
    """Plays what is missing of all trials. Every record is a line of `tune/archive.jsonl` as soon
    as its trial has reported it, `tune/trials.json` says what the trials were."""
    e, folder = run.experiment, run.folder / "tune"
    policy = find_policy(run)
    run.claim(folder, f"{run.inputs.tune} {digest_of(policy)}")
    run.problem.require_reachable(e.search.target)
    trials = _known(run)
    if (folder / "trials.json").exists():
        return list(trials.values())

    from rlcompress.rl import cluster
    from rlcompress.rl import tune as engine

    wanted = 1 + e.tune.runners
    cluster.start_ray(e.ppo.model_copy(update={"num_env_runners": max(wanted, cores())}))
    if engine.cpus() < wanted:
        raise UserError(
            f"tune.runners = {e.tune.runners}: a trial needs {wanted} CPUs, Ray has "
            f"{engine.cpus():g}"
        )
    evaluations = e.tune.trial_episodes or e.search.episodes
    known = {
        "ppo": {**e.ppo.model_dump(), "num_env_runners": e.tune.runners},
        "target": list(e.search.target),
        "low": e.search.target[0],
        "floor": e.ticket.floor,
        "seed": e.seed,
        "evaluations": evaluations,
        "sensitivity": e.search.sensitivity,
    }
    with (
        JsonLines(folder / "archive.jsonl") as archive,
        stage(
            "tune",
            e.tune.searches * evaluations,
            sum(len(t.records) for t in trials.values()),
        ) as shown,
    ):

        def on_row(options: Mapping[str, Any], row: Mapping[str, Any]) -> None:
            mine = _trial(trials, options)
            for text in json.loads(row["records"]):
                record = Record.from_json(text)
                if record.evaluation in mine.records:
                    continue
                mine.records[record.evaluation] = record
                archive.append(json.dumps({"options": dict(options), "record": json.loads(text)}))
            mine.hypervolume = float(row[engine.METRIC])
            best = max(trials.values(), key=lambda t: t.hypervolume)
            shown.update(
                sum(len(t.records) for t in trials.values()),
                f"trials {len(trials)}  best {best.hypervolume:.3f} {_said(best.options)}",
            )

        agent = agent_of(policy)
        for options, error in engine.run(run.bundle, e.tune, known, agent, folder, on_row):
            _trial(trials, options).error = error.strip().splitlines()[-1] if error else ""
    failed = [t for t in trials.values() if t.error]
    if failed:
        raise UserError(*(f"trial {_said(t.options)}: {t.error}" for t in failed))
    save_json(
        folder / "trials.json",
        [{"options": t.options, "hypervolume": t.hypervolume} for t in trials.values()],
    )
    return list(trials.values())


def _said(options: Mapping[str, Any]) -> str:
    return " ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in options.items()
    )


def _trial(trials: dict[str, Trial], options: Mapping[str, Any]) -> Trial:
    key = json.dumps(dict(options), sort_keys=True)
    return trials.setdefault(key, Trial(len(trials) + 1, dict(options)))


def _known(run: Workspace) -> dict[str, Trial]:
    """What earlier calls measured."""
    trials: dict[str, Trial] = {}
    for line in read_lines(run.folder / "tune" / "archive.jsonl"):
        record = Record.from_json(json.dumps(line["record"]))
        _trial(trials, line["options"]).records[record.evaluation] = record
    path = run.folder / "tune" / "trials.json"
    for row in read_json(path) if path.exists() else []:
        _trial(trials, row["options"]).hypervolume = row["hypervolume"]
    return trials


def merged(trials: list[Trial]) -> list[Record]:
    """The front of all trials; a record's searcher names its trial."""
    return archive_front(
        replace(record, searcher=f"trial {t.number}")
        for t in trials
        for record in t.records.values()
    )


def track_trials(run: Workspace, trials: list[Trial]) -> None:
    """A child run in MLflow for each trial. Raises OutsideError if it does not answer."""
    with tracker_of(run) as tracker:
        for t in trials:
            tracker.log_trial(t.number, t.options, list(t.records.values()), t.hypervolume)


def last_lines(run: Workspace, trials: list[Trial]) -> None:
    """Chosen columns of every trial, best first; what to run with the best one's options."""
    floor = run.problem.dense.accuracy - run.experiment.ticket.floor / 100
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = list(run.experiment.tune.space)
    for name in (
        "trial",
        *keys,
        "schedules",
        "hypervolume",
        "at the floor",
        "in the front",
    ):
        table.add_column(name, justify="right")
    front = merged(trials)
    for t in sorted(trials, key=lambda t: -t.hypervolume):
        best = best_at_floor(t.records.values(), floor)
        table.add_row(
            str(t.number),
            *(_value(t.options[key]) for key in keys),
            str(len(t.records)),
            f"{t.hypervolume:.3f}",
            f"{run.problem.dense.bytes / best.measurement.bytes:.1f}x" if best else "-",
            str(sum(r.searcher == f"trial {t.number}" for r in front)),
        )
    console.print(table)
    winner = max(trials, key=lambda t: t.hypervolume)
    sets = [w for k in keys for w in ("--set", f"{k}={json.dumps(winner.options[k])}")]
    console.print(f"next     {run.next('run')} {shlex.join(sets)}")


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value)
