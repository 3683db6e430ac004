"""The interface of searchers, and what those that only propose schedules share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, tee
from typing import Protocol, TypeAlias

import numpy as np

from rlcompress.core.errors import UserError
from rlcompress.core.prior import Losses
from rlcompress.core.probes import halving, measured_losses, probes
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Measurement, Record, Schedule


@dataclass(frozen=True)
class Settings:
    """evaluations in all (history included); target: size ratios (low, high); seed;
    sensitivity: "estimated", "measured" or "refitted", see `probed`."""

    evaluations: int
    target: tuple[float, float]
    seed: int
    sensitivity: str = "estimated"


#: A schedule that meets the largest target lies a little beyond it.
SLACK = 1.05


#: Measures schedules lazily, in order: in this process, or by workers elsewhere.
Measure = Callable[[Iterable[Schedule]], Iterator[Measurement]]
#: A schedule and the size ratio it aims at.
Proposal: TypeAlias = tuple[Schedule, float | None]
#: Yields batches of proposals and is sent their measurements, in order.
Batches: TypeAlias = Generator[Sequence[Proposal], Sequence[Measurement], None]


class Search(Protocol):
    def __call__(
        self, problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
    ) -> Iterator[Record]: ...


def in_process(problem: Problem) -> Measure:
    return lambda schedules: map(problem.evaluator.evaluate, schedules)


def targets(settings: Settings, count: int) -> list[float]:
    """`count` size ratios over the range, evenly spaced in their logarithm; one where the range is
    a point."""
    low, high = settings.target
    return [float(x) for x in np.geomspace(low, high, count if low < high else min(count, 1))]


def spread_order(count: int) -> list[int]:
    """0 to count - 1: both ends, then by `halving`, so that a search given more evaluations later
    goes on where it was."""
    return [*range(0, count, max(1, count - 1)), *(i + 1 for i in halving(count - 2))]


def measured(
    name: str,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    proposals: Iterable[Proposal],
) -> Iterator[Record]:
    """Measures proposals behind those in `history`, up to the budget."""
    done = len(history)
    wanted, measuring = tee(islice(proposals, done, settings.evaluations))
    measurements = measure(schedule for schedule, _ in measuring)
    for i, measurement in enumerate(measurements, start=done + 1):
        schedule, target = next(wanted)
        yield Record(schedule, measurement, name, settings.seed, i, target)


def measured_in_batches(
    name: str,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    batches: Batches,
    before: int = 0,
) -> Iterator[Record]:
    """The same for a searcher that learns from measurements. It replays `history` from its
    evaluation `before` on, so what it proposes must follow from the measurements it was sent, never
    from the budget. Workers measure a batch side by side. Raises UserError where history is not
    what it proposes."""
    done = before
    try:
        batch = next(batches)
        while done < settings.evaluations:
            batch = batch[: settings.evaluations - done]
            past = history[done : done + len(batch)]
            for number, (record, (schedule, _)) in enumerate(
                zip(past, batch, strict=False), start=done + 1
            ):
                if record.schedule != schedule:
                    raise UserError(
                        f"{name}: evaluation {number} in the archive is not what this search "
                        "proposes there: a line is gone, or another version began it; remove its "
                        "lines from there on, or start over with --fresh"
                    )
            known = [r.measurement for r in past]
            rest = batch[len(known) :]
            fresh = measure([schedule for schedule, _ in rest]) if rest else iter(())
            for (schedule, target), measurement in zip(rest, fresh, strict=True):
                known.append(measurement)
                evaluation = done + len(known)
                yield Record(schedule, measurement, name, settings.seed, evaluation, target)
            done += len(batch)
            batch = batches.send(known) if done < settings.evaluations else ()
    except StopIteration:
        return


def probed(
    name: str, problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
) -> Generator[Record, None, tuple[Losses, list[Record]]]:
    """The losses that `settings.sensitivity` asks for, and the records that they took.

    "estimated" takes none. "measured" and "refitted" take at most half of the evaluations, the
    first ones, for `probes`: measured after batch norms alone (or nothing, if that is the
    search's recovery), or with the readers of what was cut refitted. Where that is not the
    search's own recovery they are measured in this process, and their records say what they came
    to after that other one.
    """
    if settings.sensitivity == "estimated":
        return problem.prior.losses, []
    refitted = settings.sensitivity == "refitted"
    own = "steps" if problem.evaluator.steps else problem.evaluator.recovery
    recovery = "reconstruct" if refitted else "none" if own == "none" else "bn"
    network, estimates = problem.network, problem.evaluator.estimates
    prober = problem
    wanted = probes(network, estimates)
    # A search that went on to its targets stays with the probes it had then; what it has measured
    # are probes, whatever the evaluations are by now.
    first = next((i for i, r in enumerate(history) if r.target is not None), None)
    wanted = wanted[: max(settings.evaluations // 2, len(history)) if first is None else first]
    records = list(history[: len(wanted)])
    if recovery != own:
        prober = problem.with_recovery(recovery)
        measure = in_process(prober)
    spent = replace(settings, evaluations=len(wanted))
    proposals = ((probe.schedule, None) for probe in wanted)
    for record in measured(name, spent, history, measure, proposals):
        records.append(record)
        yield record
    # The prior's own where they are of the same kind: a policy may have corrected them.
    losses = problem.prior.losses
    if refitted != (own == "reconstruct"):
        losses = Losses.of(network, estimates, refitted=refitted)
    # What low precision alone costs is nobody's sensitivity.
    noise = prober.evaluator.evaluate(Schedule()).kl
    kls = [max(r.measurement.kl - noise, 0.0) for r in records]
    return measured_losses(losses, wanted, kls), records
