"""What other options made moves out of the way whole, and what was cut off meanwhile goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rlcompress import spec
from rlcompress.core.files import read_archive, read_json, read_lines
from rlcompress.core.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS
from rlcompress.core.policy import Policy, PolicyShape, save_policy
from rlcompress.core.tensors import load_tensors
from rlcompress.live import Stage
from rlcompress.searchers.uniform import grid
from rlcompress.stages import Workspace
from rlcompress.stages.dense import train_dense
from rlcompress.stages.policies import begin_with
from rlcompress.stages.search import search_all
from tests.mistakes import contents


@pytest.fixture
def tiny(rlcompress, searched):
    """The tiny experiment with some options, in a copy of its search."""
    shutil.copytree(searched, "runs/tiny")

    def workspace(*options: str) -> Workspace:
        file = spec.load_experiments("experiments.yaml")
        return Workspace("tiny", spec.resolve(file, "tiny", list(options)), Path("runs/tiny"))

    return workspace


def policy(name: str) -> Path:
    """A policy of its own weights, trained."""
    shape = PolicyShape(len(ACTION_COLUMNS), len(STATE_COLUMNS), 8, OBSERVATION_VERSION)
    save_policy(Path(name), Policy(shape), {"episodes": 4})
    return Path(name)


def measured(run: Path, searcher: str) -> list[list[str]]:
    """Its lines in the archive, and in each of the archive's old copies."""
    files = [run / "search" / "archive.jsonl", *sorted(run.glob("set-aside/archive.jsonl.*"))]
    lines = [file.read_text().splitlines(keepends=True) for file in files]
    return [[x for x in some if json.loads(x)["searcher"] == searcher] for some in lines]


def test_another_policy_takes_ppos_own_and_its_curve_along(tiny):
    run = tiny()
    folder, aside = run.folder / "search", run.folder / "set-aside"
    archive, curve = folder / "archive.jsonl", folder / "curve.jsonl"
    theirs = archive.read_text()
    begin_with(run, "ppo", policy("first"))
    row = json.loads(theirs.splitlines()[0])
    archive.write_text(theirs + json.dumps(row | {"searcher": "ppo"}) + "\n" + '{"cut off')
    rows = [{"searcher": who, "evaluation": 4} for who in ("ppo", "mine", "ppo")]
    curve.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree("first", folder / "policy")
    begin_with(run, "ppo", Path("first"))
    assert (folder / "policy" / "policy.json").exists()
    assert not aside.exists()

    begin_with(run, "ppo", policy("second"))
    assert not (folder / "policy").exists()
    assert archive.read_text() == theirs
    assert read_lines(curve) == rows[1:2]
    assert (aside / "policy.1" / "policy.json").exists()
    assert len(read_archive(aside / "archive.jsonl.1")) == 5
    assert read_lines(aside / "curve.jsonl.1") == rows


@pytest.mark.parametrize("cut_off", range(1, 8))
def test_nothing_is_lost_where_setting_aside_is_cut_off(tiny, monkeypatch, cut_off):
    """Each write in turn finds the disk full; then the same command runs again."""
    options = ("search.searcher=untrained", "search.episodes=3", "search.policy=")
    first, second = (policy(name) for name in ("first", "second"))
    search_all(tiny(*options[:2], f"{options[2]}{first}"))
    (before,) = measured(Path("runs/tiny"), "untrained")
    assert len(before) == 3
    fsync, left = os.fsync, cut_off

    def full(file: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        fsync(file)

    run = tiny(*options[:2], f"{options[2]}{second}")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            search_all(run)
    search_all(run)
    now, *old = measured(run.folder, "untrained")
    assert [json.loads(line)["evaluation"] for line in now] == [1, 2, 3]
    assert old[0] == before
    assert read_json(run.folder / "search" / "untrained.done")["evaluations"] == 3


def test_a_search_is_done_for_its_own_options_alone(tiny):
    """A copy at `storage` that was cut off may hold another search's files."""
    run = tiny("search.bits=[2, 4]")
    done = (run.folder / "search" / "uniform.done").read_bytes()
    run.claim(run.folder / "search", run.inputs.search)
    train_dense(run)
    proposals = len(grid(run.problem, run.experiment.search.target))
    for old in (done, b"4"):  # as older versions wrote it
        (run.folder / "search" / "uniform.done").write_bytes(old)
        assert len(search_all(run)) == min(4, proposals) > 0
        (run.folder / "search" / "archive.jsonl").unlink()


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("search.bits=[3, 5]", "bits"),
        ("search.clip=mse", "clip"),
        ("calibration.positions=32", "quantize_solved"),
        ("seed=1", "importance"),
    ],
)
def test_estimates_are_those_of_the_options_whoever_made_them(tiny, option, changed):
    """`tune`, a zoo and a judgement make them too, and claim no search of theirs."""
    made = tiny().bundle.estimates
    run = tiny(option)
    train_dense(run)
    ours = run.bundle.estimates
    assert told(getattr(ours, changed)) != told(getattr(made, changed))
    assert told(vars(tiny(option).bundle.estimates)) == told(vars(ours))
    search_all(run)
    assert run.problem.bits == run.experiment.search.bits


def told(value: object) -> str:
    """All numbers of a table of arrays."""
    return json.dumps(value, default=lambda array: array.tolist(), sort_keys=True)


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("marked", [True, False], ids=["ours", "an older version's"])
def test_a_dense_network_comes_back_behind_one_that_was_cut_off(tiny, monkeypatch, marked):
    dense = Path("runs/tiny/dense")
    if not marked:
        (dense / "inputs.json").unlink()
    before, other = contents(dense), tiny("seed=1", "dense.epochs=3")

    def interrupt(shown: Stage, done: int, text: str) -> None:
        if done == 2:
            raise InterruptedRunError

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "update", interrupt)
        with pytest.raises(InterruptedRunError):
            train_dense(other)
    assert load_tensors(dense / "checkpoint.safetensors")[1]["epoch"] == 1
    if not marked:
        (dense / "inputs.json").unlink()

    metrics = train_dense(tiny())
    assert contents(dense) == before
    assert metrics == read_json(dense / "metrics.json")
    seen: list[int] = []
    if marked:
        with monkeypatch.context() as patched:
            patched.setattr(Stage, "update", lambda shown, done, text: seen.append(done))
            train_dense(other)
        assert seen == [2, 3]
        train_dense(tiny())
        assert contents(dense) == before


def test_a_ticket_begins_at_the_dense_network_that_was_searched(tiny, rlcompress, monkeypatch):
    """`dynamic` and `tune` with other options leave another one, or a part of it, beside the
    search."""
    dense, words = Path("runs/tiny/dense"), ("ticket.epochs=1", "ticket.fit_images=64")
    sets = [word for option in (*words, "export.latency=[]") for word in ("--set", option)]
    before = contents(dense)

    def interrupt(shown: Stage, done: int, text: str) -> None:
        raise InterruptedRunError

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "update", interrupt)
        with pytest.raises(InterruptedRunError):
            train_dense(tiny("dense.lr=0.002"))
    assert contents(dense) != before
    for verb in ("ticket", "export"):
        told = rlcompress(verb, "tiny", *sets)
        assert told.code == 0, told.err
        after = contents(dense)
        assert {name: after[name] for name in before} == before
        train_dense(tiny("dense.lr=0.002"))
        assert contents(dense)["trained.safetensors"] != before["trained.safetensors"]


@pytest.mark.parametrize(("verb", "made"), [("ticket", "tickets"), ("dynamic", "dynamic")])
def test_what_is_done_comes_back_and_is_not_made_again(tiny, rlcompress, verb, made):
    folder, other = Path("runs/tiny") / made, f"{verb}.lr=0.03"
    words = (verb, "tiny", "--set", "ticket.epochs=1", "--set", "ticket.fit_images=64")

    def files() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    told = rlcompress(*words)
    assert told.code == 0
    assert "report   " not in told.out  # none is there yet
    first = files()
    assert rlcompress(*words, "--set", other).code == 0
    second = files()
    assert first.keys() == second.keys()
    assert set(first.values()).isdisjoint(second.values())
    told = rlcompress(*words)
    assert told.code == 0
    assert files() == first
    assert "was made from these options" in told.out
