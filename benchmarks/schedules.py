"""Schedules of one size and many qualities, for the benchmarks that compare scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Schedule

#: How far from a size its schedules may be.
WITHIN = 0.03
#: What the schedules are made of, in turns: the prior's answer with this share of its choices
#: moved, uniform rules with that share moved, random draws.
KINDS = (
    ("prior", 0.05),
    ("prior", 0.3),
    ("uniform", 0.1),
    ("random", 0.0),
    ("prior", 0.1),
    ("prior", 0.6),
    ("prior", 0.2),
    ("uniform", 0.4),
    ("prior", 1.0),
)
_TRIES = 3000

Options = dict[tuple[str, str], tuple[float, ...]]
Choices = dict[tuple[str, str], int]


def _options(problem: Problem) -> Options:
    """What each free choice may be, in ascending order."""
    keeps, bits = tuple(sorted(problem.keeps)), tuple(float(b) for b in sorted(problem.bits))
    groups = problem.network.groups.values()
    options: Options = {("keep", g.name): keeps for g in groups if not g.protected}
    return options | {("bits", name): bits for name in problem.network.layers}


def _schedule(options: Options, choices: Choices) -> Schedule:
    values = {name: options[name][i] for name, i in choices.items()}
    return Schedule(
        {name: value for (kind, name), value in values.items() if kind == "keep"},
        {name: int(value) for (kind, name), value in values.items() if kind == "bits"},
    )


def _choices(options: Options, schedule: Schedule) -> Choices:
    """The nearest choices to a schedule's."""
    choices = {}
    for (kind, name), values in options.items():
        wanted = schedule.ratio(name) if kind == "keep" else schedule.width(name)
        choices[kind, name] = int(np.abs(np.array(values) - wanted).argmin())
    return choices


def _moved(options: Options, choices: Choices, share: float, rng: np.random.Generator) -> Choices:
    """A share of the choices moved by one or two steps."""
    moved = dict(choices)
    for name, values in options.items():
        if rng.random() < share:
            step = int(rng.choice((-2, -1, 1, 2)))
            moved[name] = int(np.clip(moved[name] + step, 0, len(values) - 1))
    return moved


def _fitted(
    problem: Problem, options: Options, choices: Choices, size: float, rng: np.random.Generator
) -> Schedule | None:
    """Moved by single steps towards a size; None if that gets stuck."""
    costs, names = problem.evaluator.costs, list(options)
    schedule = _schedule(options, choices)
    off = float(np.log(costs.cost(schedule).bytes / size))
    for _ in range(_TRIES):
        if abs(off) <= np.log1p(WITHIN):
            return schedule
        name = names[rng.integers(len(names))]
        index = choices[name] + (-1 if off > 0 else 1)
        if not 0 <= index < len(options[name]):
            continue
        new = _schedule(options, {**choices, name: index})
        new_off = float(np.log(costs.cost(new).bytes / size))
        if abs(new_off) < abs(off):
            choices, schedule, off = {**choices, name: index}, new, new_off
    return None


def _uniform(problem: Problem, size: float, bits: int) -> Schedule:
    """The uniform rule of a bit-width that comes nearest to a size."""
    rules = [problem.network.uniform(float(k), bits) for k in np.linspace(1, 0.1, 46)]
    sizes = np.array([problem.evaluator.costs.cost(rule).bytes for rule in rules])
    return rules[int(np.abs(np.log(sizes / size)).argmin())]


def diverse(problem: Problem, size: float, seed: int) -> Iterator[tuple[str, Schedule]]:
    """Kind and schedule of distinct schedules of `size` bytes, without end; the prior's own answer
    first. The same ones for the same arguments."""
    options, seen = _options(problem), set()
    kinds = itertools.chain([("prior", 0.0)], itertools.cycle(KINDS))
    for number, (kind, share) in enumerate(kinds):
        rng = np.random.default_rng([seed, number])
        if kind == "prior":
            choices = _choices(options, problem.prior.schedule(size))
        elif kind == "uniform":
            choices = _choices(options, _uniform(problem, size, int(rng.choice(problem.bits))))
        else:
            choices = {name: int(rng.integers(len(values))) for name, values in options.items()}
        choices = _moved(options, choices, share, rng)
        schedule = _fitted(problem, options, choices, size, rng)
        if schedule is not None and schedule not in seen:
            seen.add(schedule)
            yield f"{kind} {share:g}", schedule
