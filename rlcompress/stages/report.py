"""Stage 5: what of a run folder, and of those beside it, the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlcompress.spec import Experiment, SpecError, read_resolved, spec_hash
from rlcompress.stages import dynamic
from rlcompress.stages.workspace import Workspace


def report(run: Workspace) -> Path:
    """Writes `report/`, of these very options alone; the page."""
    from rlcompress.report.page import Shown, write_report

    tickets = run.tickets()
    shown = Shown(
        run.name,
        run.experiment,
        run.next("run"),
        tickets,
        dynamic.ticket_of(run),
        other_seeds(run, tickets),
    )
    return write_report(run.folder, shown)


def other_seeds(run: Workspace, tickets: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run folder -> best ticket of the searcher of `tickets[0]`, of the runs beside this one that
    differ in nothing but the seed and in where they ran; each seed once."""
    if not tickets:
        return {}
    own, taken = _but_seed(run.experiment), {run.experiment.seed}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(run.folder.resolve().parent.glob("*/spec.yaml")):
        try:
            other = read_resolved(path).experiment
        except SpecError:
            continue  # no run's, or that of a run with options of another version
        if other.seed in taken or _but_seed(other) != own:
            continue
        # All that it does not share with this run: its device may not be here.
        beside = run.experiment.model_copy(update={"seed": other.seed})
        theirs = Workspace(run.name, beside, path.parent).tickets()
        mine = [t for t in theirs if t["searcher"] == tickets[0]["searcher"]]
        if mine:
            found[path.parent.name] = mine[0]
            taken.add(other.seed)
    return found


def _but_seed(experiment: Experiment) -> str:
    return spec_hash(experiment.model_copy(update={"seed": 0}))
