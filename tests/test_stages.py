"""The whole way of the data on a tiny VGG-19: through the command line, on real digits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlcompress.core.artifact import load_artifact
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.export import onnx_logits
from rlcompress.core.files import read_archive
from rlcompress.core.schedule import Record, performance_density
from rlcompress.core.tensors import save_tensors
from rlcompress.core.train import top1
from tests.shell import command

EXPERIMENTS = """
experiments:
  tiny:
    model: {factory: vgg11, args: {width: 0.125}}
    data: {factory: digits}
    dense: {epochs: 3, batch_size: 32}
    calibration: {fit_images: 64, score_images: 64, positions: 256, estimate_images: 32}
    search: {searcher: knapsack, episodes: 12, finalists: 3, target: [6, 20],
             keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
    ppo: {num_env_runners: 0, episodes_per_iteration: 8}
    ticket: {epochs: 2, batch_size: 32, lr: 0.05, fit_images: 128, floor: 3.0}
"""


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but the log and MLflow's own."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.txt" and "mlflow" not in str(path)
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "experiments.yaml").write_text(EXPERIMENTS)
    return folder, command(folder, "run", "tiny").stdout


def test_a_run_leaves_the_files_that_others_rely_on(ran):
    run = ran[0] / "runs" / "tiny"
    for name in (
        "spec.yaml",
        "dense/init.safetensors",
        "dense/rewind.safetensors",
        "dense/trained.safetensors",
        "dense/metrics.json",
        "search/archive.jsonl",
        "report/index.html",
        "report/front.png",
        "mlflow.db",
    ):
        assert (run / name).is_file(), name
    tickets = [json.loads(p.read_text()) for p in run.glob("tickets/*/ticket.json")]
    assert {t["searcher"] for t in tickets} == {"knapsack", "uniform"}
    for ticket in tickets:
        assert ticket["split"] == "test"
        arms = {ticket["arm"], *ticket["controls"]}
        assert arms == {"rewind", "finetuned", "reconstructed", "fresh"}
        assert ticket["validation"][ticket["arm"]] == max(ticket["validation"][a] for a in arms)


def test_the_ticket_is_as_small_and_as_good_as_it_says(ran):
    run, test = ran[0] / "runs" / "tiny", digits().test
    for path in run.glob("tickets/*/ticket.json"):
        ticket = json.loads(path.read_text())
        weights = path.with_name("weights.safetensors")
        assert weights.stat().st_size == ticket["ticket"]["bytes"]
        assert ticket["dense"]["bytes"] / weights.stat().st_size == pytest.approx(ticket["ratio"])
        assert top1(load_artifact(weights), test) == pytest.approx(ticket["ticket"]["accuracy"])


def test_the_onnx_file_is_the_ticket_and_is_timed_against_dense(ran):
    run, test = ran[0] / "runs" / "tiny", digits().test
    for path in run.glob("tickets/*/ticket.json"):
        about = json.loads(path.with_name("onnx.json").read_text())["model.onnx"]
        file, ticket = path.with_name("model.onnx"), json.loads(path.read_text())
        assert file.stat().st_size == about["bytes"]
        # A network this small is a third graph; benchmarks/files.py has larger ones.
        assert about["container_bytes"] < about["bytes"] <= 1.5 * about["container_bytes"]
        assert about["difference"] < 1e-3
        logits = onnx_logits(file, test.images())
        accuracy = float((logits.argmax(1) == test.labels_N).float().mean())
        assert accuracy == pytest.approx(ticket["ticket"]["accuracy"], abs=2e-3)
        # What it says of itself it has from the images that chose the ticket.
        assert about["agreement"] > 0.99
        chosen = ticket["validation"][ticket["arm"]]
        assert about["validation_accuracy"] == pytest.approx(chosen, abs=2e-3)
        latency = json.loads(path.with_name("latency.json").read_text())
        assert latency.keys() == {"1", "64"}
        assert all(times.keys() == {"dense", "model.onnx"} for times in latency.values())
        card = path.with_name("card.md").read_text()
        assert f"| model.onnx | {about['bytes']:,} |" in card
        assert "| batch 64 | " in card
    assert "bytes as ONNX" in ran[1]
    assert "ms, batch 1 " in ran[1]


def test_both_code_blocks_of_the_card_run_and_agree(ran):
    """In the ticket's folder, as who downloads it has it."""
    (folder,) = (ran[0] / "runs" / "tiny").glob("tickets/knapsack-*")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    check = "\nassert numpy.allclose(first, logits, atol=1e-4) and logits.shape == (1, 10)\n"
    program = blocks[0] + "\nfirst = logits.numpy()\n" + blocks[1] + check
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_int8_activations_on_demand(tmp_path, ran):
    # A copy: an export adds files.
    shutil.copytree(ran[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    done = command(folder, "export", "tiny", "--set", "export.int8=true")
    files = [Path(line) for line in done.stdout.splitlines() if line.startswith("runs/")]
    assert len(files) == 6
    for path in (folder / file for file in files if file.name == "model.int8.onnx"):
        about = json.loads(path.with_name("onnx.json").read_text())
        assert about["model.int8.onnx"]["bytes"] == path.stat().st_size
        float32, int8 = about["model.onnx"], about["model.int8.onnx"]
        assert int8["validation_accuracy"] > float32["validation_accuracy"] - 0.1
        assert 0.8 < int8["agreement"] <= 1
        latency = json.loads(path.with_name("latency.json").read_text())
        assert all("model.int8.onnx" in times for times in latency.values())


def test_the_last_lines_say_before_and_after(ran):
    run = ran[0] / "runs" / "tiny"
    tickets = [json.loads(p.read_text()) for p in run.glob("tickets/*/ticket.json")]
    (best,) = [t for t in tickets if t["searcher"] == "knapsack"]
    (row,) = [line for line in ran[1].splitlines() if line.startswith("bytes on disk")]
    assert f"{best['dense']['bytes']:,}" in row
    assert f"{best['ticket']['bytes']:,}" in row
    assert f"{best['ratio']:.1f}x" in row
    assert f"exported: {best['arm']} (best on validation)" in ran[1]
    assert "uniform-" in ran[1]
    assert "report/index.html" in ran[1]


def test_a_missed_floor_is_the_last_line_and_another_floor_makes_no_other_ticket(ran, tmp_path):
    shutil.copytree(ran[0], tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "tiny"

    def tickets() -> dict[str, dict]:
        found = (json.loads(p.read_text()) for p in run.glob("tickets/*/ticket.json"))
        return {t["id"]: t for t in found}

    # Written by hand: training decides what is within a floor.
    for ticket in tickets().values():
        ticket["validation"]["dense"] = 0.1 + max(ticket["validation"].values())
        (run / "tickets" / ticket["id"] / "ticket.json").write_text(json.dumps(ticket))
    told = command(tmp_path / "copy", "run", "tiny").stdout.splitlines()
    assert re.fullmatch(
        r"no ticket within 3 points of dense, ticket\.floor \(best -1\d\.\d\d on validation\): "
        r"lower search\.target .* or ticket\.floor",
        told[-1],
    )
    before = tickets()
    assert not any(ticket["at_floor"] for ticket in before.values())
    card = run / "tickets" / next(iter(before)) / "card.md"
    assert "Below the accuracy floor" in card.read_text()
    told = command(tmp_path / "copy", "run", "tiny", "--set", "ticket.floor=30").stdout
    assert "ticket.floor =" not in told
    after = tickets()
    for name in before:
        assert after[name] == {**before[name], "floor": 30.0, "at_floor": True}
    assert "Below the accuracy floor" not in card.read_text()


def test_the_champion_loads_by_the_documented_line(ran):
    run = (ran[0] / "runs" / "tiny").resolve()
    line = (
        "import mlflow, torch; "
        "model = mlflow.pytorch.load_model('models:/rlcompress-tiny@champion'); "
        "print(tuple(model(torch.zeros(3, 1, 32, 32)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", line],
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{run / 'mlflow.db'}"},
        capture_output=True,
        text=True,
        cwd=run,
    )
    assert done.stdout.splitlines()[-1] == "(3, 10)", done.stderr


def test_the_same_command_again_changes_nothing(ran):
    run = ran[0] / "runs" / "tiny"
    before = contents(run)
    command(ran[0], "run", "tiny")
    assert contents(run) == before


def test_another_searcher_adds_to_the_archive(ran):
    run = ran[0] / "runs" / "tiny"
    before = (run / "search/archive.jsonl").read_text()
    command(ran[0], "search", "tiny", "--searcher", "random", "--set", "search.episodes=4")
    after = (run / "search/archive.jsonl").read_text()
    assert after.startswith(before)
    assert sum(r.searcher == "random" for r in read_archive(run / "search/archive.jsonl")) == 4


def test_a_target_out_of_reach_is_one_line(ran):
    done = command(
        ran[0], "run", "tiny", "--set", "search.target=[6,9000]", "--out", "far", check=False
    )
    assert done.returncode == 2
    assert "search.target = [6.0, 9000.0]: at most" in done.stderr
    assert "Traceback" not in done.stderr


def tiny(ran, *overrides: str):
    from rlcompress import spec
    from rlcompress.stages import Workspace

    file = spec.load_experiments(ran[0] / "experiments.yaml")
    experiment = spec.resolve(file, "tiny", list(overrides))
    return Workspace("tiny", experiment, ran[0] / "runs" / "tiny")


def test_exported_files_are_judged_without_the_test_split(ran, tmp_path, monkeypatch):
    from rlcompress.stages import deliver

    shutil.copytree(ran[0], tmp_path / "copy")
    run = tiny([tmp_path / "copy"])
    run.data = dataclasses.replace(run.data, test=None)
    ticket = run.tickets()[0]
    folder = run.folder / "tickets" / ticket["id"]
    about = json.loads((folder / "onnx.json").read_text())
    # What an earlier version measured on the test split is measured anew.
    (folder / "onnx.json").write_text(json.dumps({"model.onnx": {"bytes": 1, "accuracy": 0.9}}))
    deliver.export(run, ticket)
    assert json.loads((folder / "onnx.json").read_text()) == about
    # Other answers.
    (folder / "onnx.json").unlink()
    monkeypatch.setattr(deliver, "onnx_logits", lambda path, images: -onnx_logits(path, images))
    with pytest.raises(UserError, match=r"% of \d+ validation images get the ticket's answer"):
        deliver.export(run, ticket)
    assert not (folder / "model.onnx").exists()


def test_progress_says_what_nothing_has_reached_yet(ran, tmp_path):
    from rlcompress.core.files import JsonLines
    from rlcompress.live import Stage
    from rlcompress.stages.search import Keeper

    shown = []

    class Shown(Stage):
        def update(self, done: int, text: str) -> None:
            shown.append(text)

    record = tiny(ran).archive()[0]
    dense = dataclasses.replace(record.measurement, accuracy=record.measurement.accuracy + 0.05)
    with JsonLines(tmp_path / "archive.jsonl") as archive:
        for points in (3, 6):
            keep = Keeper(archive, Shown("search", 1), dense, dense.accuracy - points / 100)
            keep(record)
    assert shown[0] == f"front 1  none yet within 3 points of dense ({dense.accuracy - 0.03:.1%})"
    assert shown[1].startswith("front 1  best ")


def test_finalists_are_the_densest_of_the_front_that_may_reach_the_floor(ran):
    """The floor is 3 points below the dense network on the score images; another is granted."""
    from rlcompress.stages.finals import candidates

    run = tiny(ran, "search.finalists=2")
    some, dense = run.archive()[0], run.problem.dense

    def made(evaluation: int, points: float, size: int, kl: float) -> Record:
        measured = dataclasses.replace(
            some.measurement, accuracy=dense.accuracy - points / 100, bytes=size, kl=kl,
            density=performance_density(dense.accuracy - points / 100, size),
        )  # fmt: skip
        return Record(some.schedule, measured, "knapsack", 0, evaluation)

    records = [
        made(1, 0.0, 9000, 0.1),
        made(2, 2.0, 5000, 0.2),
        made(3, 3.9, 4000, 0.3),
        made(4, 4.1, 3000, 0.4),  # below any hope
        made(5, 0.0, 8999, 0.5),  # beaten by the second
    ]
    assert [r.evaluation for r in candidates(run, records)] == [3, 2]
    assert [r.evaluation for r in candidates(run, records[3:4])] == [4]  # nothing better is there
    assert candidates(run, []) == []


def test_winners_are_measured_again_on_more_images_and_none_twice(ran):
    from rlcompress.stages.ticket import winners

    run = tiny(ran, "ticket.top=2", "search.baselines=[]", "search.finalists=3")
    lines = run.folder / "search" / "finals.jsonl"
    first = winners(run, run.archive())
    measured = lines.read_text()
    assert [r.schedule for r in winners(run, run.archive())] == [r.schedule for r in first]
    assert lines.read_text() == measured
    rows = [json.loads(line) for line in measured.splitlines()]
    mine = [row for row in rows if row["schedule"] == first[0].schedule.to_json()]
    assert {row["rung"] for row in mine} == {1, 2}
    searched = {r.schedule: r.measurement for r in run.archive()}
    for winner in first:
        assert winner.measurement.bytes == searched[winner.schedule].bytes
        assert winner.measurement.kl != searched[winner.schedule].kl
    # The best first: at the floor, or nobody is.
    floor = mine[0]["measurement"]["dense"] - run.experiment.ticket.floor / 100
    accuracies = [r.measurement.accuracy for r in first]
    assert accuracies[0] >= floor or max(accuracies) < floor


def test_a_probe_of_one_choice_is_no_winner(ran):
    from rlcompress.stages.ticket import winners

    run = tiny(ran, "search.baselines=[]")
    record = run.archive()[0]
    probe = dataclasses.replace(
        record, measurement=dataclasses.replace(
            record.measurement, bytes=int(run.problem.dense.bytes / 1.2), kl=1e-4
        ),
    )  # fmt: skip
    assert [r.schedule for r in winners(run, [probe, record])] == [record.schedule]
    with pytest.raises(UserError, match="knapsack has measured nothing"):
        winners(run, [])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file_take_the_place_of_training(ran, tmp_path, suffix):
    from rlcompress.stages import Workspace
    from rlcompress.stages.dense import train_dense

    trained = tiny(ran).network("trained").state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(trained, path)
    else:
        save_tensors(path, trained)
    experiment = tiny(ran, f"dense.weights={path}").experiment
    run = Workspace("tiny", experiment, tmp_path / "run")
    metrics = train_dense(run)
    assert metrics["curve"] == []
    loaded = run.network("trained").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    assert train_dense(run) == metrics


@pytest.mark.parametrize("content", [b"no weights", None])
def test_weights_that_cannot_be_loaded_are_refused_and_nothing_is_written(ran, tmp_path, content):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    words = ("search", "tiny", "--out", str(tmp_path / "run"), "--set", f"dense.weights={path}")
    done = command(ran[0], *words, check=False)
    assert done.returncode == 2
    assert f"dense.weights = {path}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "dense").exists()


def test_a_ticket_is_not_made_of_another_experiments_search(ran):
    run = ran[0] / "runs" / "tiny"
    before = contents(run)
    done = command(ran[0], "ticket", "tiny", "--set", "seed=1", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("rlcompress search tiny --set seed=1")
    done = command(ran[0], "ticket", "tiny", "--searcher", "ppo", check=False)
    assert done.returncode == 2
    assert "ppo has measured nothing yet" in done.stderr
    done = command(ran[0], "export", "tiny", "--out", "nowhere", check=False)
    assert done.returncode == 2
    assert not (ran[0] / "nowhere").exists()
    assert contents(run) == before | {"spec.yaml": contents(run)["spec.yaml"]}
