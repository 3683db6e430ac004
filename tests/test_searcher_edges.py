"""Searchers where history is damaged, a range is a point, a network is small, or a searcher is
one's own."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from rlcompress import spec
from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.learned import Lessons, fit
from rlcompress.core.problem import Problem, make_bundle
from rlcompress.core.schedule import Record
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from rlcompress.searchers import Settings, find, in_process
from rlcompress.searchers.base import SLACK
from rlcompress.stages import Workspace
from rlcompress.stages.search import search_all
from tests.toy import toy_bundle

KEEPS, BITS = (1.0, 0.5), (2, 4, 8)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return toy_bundle(epochs=1).problem()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))


@pytest.fixture(scope="module")
def ungrouped() -> Problem:
    """One layer, which puts out the logits: no channel may go."""
    data, ref = digits(size=16), ModelRef("tests.test_searcher_edges:flat", {}, 10, (1, 16, 16))
    model = ref.build(0)
    network = build_network(model, ref.example())
    split = data.train.sample(64, 0)
    estimates = estimate(model, network, split.images(), keeps=KEEPS, bits=BITS)
    made = make_bundle(model, ref, network, split, split, estimates, positions=64)
    return made.problem()


def search(problem: Problem, name: str, settings: Settings, history=()) -> list[Record]:
    return list(find(name)(problem, settings, history, in_process(problem)))


@pytest.mark.parametrize("name", ["local", "evolution"])
def test_history_that_is_not_the_searchs_own_is_told(problem, name):
    settings = Settings(30, (3.0, 8.0), 0)
    whole = search(problem, name, settings)
    damaged = [*whole[:2], *whole[3:28]]
    with pytest.raises(UserError, match=f"^{name}: evaluation 3 in the archive is not what"):
        search(problem, name, settings, damaged)


def test_a_line_that_is_gone_is_told_and_nothing_measured(rlcompress, searched):
    run = Path("runs/tiny")
    shutil.copytree(searched, run)
    archive = run / "search" / "archive.jsonl"
    lines = archive.read_text().splitlines(keepends=True)
    first = Record.from_json(lines[0])
    archive.write_text("".join(lines[1:]))
    (run / "search" / f"{first.searcher}.done").unlink()
    said = rlcompress("search", "tiny", "--set", f"search.searcher={first.searcher}")
    assert said.code == 2
    assert f"evaluation 1 of {first.searcher} is gone, 2 is there; remove the lines" in said.err
    assert archive.read_text() == "".join(lines[1:])


def test_uniform_meets_the_largest_target(problem):
    """What is as small as is asked for lies a little beyond it, for the static rule too."""
    sizes = sorted(
        problem.dense.bytes / r.measurement.bytes
        for r in search(problem, "uniform", Settings(1000, (3.0, 8.0), 0))
    )
    beyond = sizes[-1] * 0.999
    found = search(problem, "uniform", Settings(1000, (beyond, beyond), 0))
    reached = [problem.dense.bytes / r.measurement.bytes for r in found]
    assert sizes[-1] in reached
    assert all(beyond <= ratio <= beyond * SLACK for ratio in reached)


@pytest.mark.parametrize("name", ["random", "evolution", "knapsack"])
def test_the_smallest_network_there_is_can_be_asked_for(problem, name):
    most = problem.max_ratio()
    found = search(problem, name, Settings(3, (most, most), 0))
    assert found
    for record in found:
        assert problem.dense.bytes / record.measurement.bytes == pytest.approx(most)


def test_the_knapsack_measures_no_answer_twice(ungrouped):
    found = search(ungrouped, "knapsack", Settings(20, (4.0, 8.0), 0))
    assert len({record.schedule for record in found}) == len(found) <= len(BITS)


def test_a_network_without_groups_teaches_a_policy_too(ungrouped):
    records = search(ungrouped, "knapsack", Settings(20, (4.0, 8.0), 0))
    evaluator = ungrouped.evaluator
    lessons = Lessons.of(ungrouped.network, evaluator.costs, evaluator.estimates, records)
    learned = fit([lessons], epochs=2)
    losses = learned.corrected(ungrouped.network, evaluator.costs, evaluator.estimates)
    assert losses.prune_GK.shape == (0, len(KEEPS))
    assert (losses.quantize_LB >= 0).all()


def forgetful(problem, settings, history, measure) -> Iterator[Record]:
    """Never ends, counts from one, and under another's name."""
    schedule = problem.network.uniform(1.0, 4)
    for number in itertools.count(1):
        (measurement,) = measure([schedule])
        yield Record(schedule, measurement, "ppo", settings.seed, number, None)


def nothing(problem, settings, history, measure) -> None:
    return None


def numbers(problem, settings, history, measure) -> Iterator[int]:
    yield 1


def test_an_own_searcher_has_the_evaluations_that_are_left(problem):
    name, settings = "tests.test_searcher_edges:forgetful", Settings(5, (3.0, 8.0), 0)
    whole = search(problem, name, settings)
    assert [(r.searcher, r.evaluation) for r in whole] == [(name, i) for i in range(1, 6)]
    rest = search(problem, name, replace(settings, evaluations=7), whole)
    assert [r.evaluation for r in rest] == [6, 7]
    assert search(problem, name, replace(settings, evaluations=2), whole) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("nothing", "returns None, not an iterator"), ("numbers", "yields 1, not a Record")],
)
def test_an_own_searcher_that_is_none_is_told(problem, name, says):
    name = f"tests.test_searcher_edges:{name}"
    with pytest.raises(UserError, match=f"^{name}: {says}"):
        search(problem, name, Settings(5, (3.0, 8.0), 0))


def test_an_own_searcher_in_a_run(rlcompress, searched):
    """As many as the experiment has, though it would go on for ever."""
    name = "tests.test_searcher_edges:forgetful"
    options = [f"search.searcher={name}", "search.episodes=3", "search.baselines=[]"]
    file = spec.load_experiments("experiments.yaml")
    shutil.copytree(searched, "runs/tiny")
    run = Workspace("tiny", spec.resolve(file, "tiny", options), Path("runs/tiny"))
    own = [r.evaluation for r in search_all(run) if r.searcher == name]
    assert own == [1, 2, 3]
