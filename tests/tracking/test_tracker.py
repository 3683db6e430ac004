"""MLflow on SQLite in tmp_path: what lands there, once, and what a restart adds."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from rlcompress.tracking import Tracker, TrackingError
from tests.tracking.conftest import (
    EXAMPLE,
    SPEC,
    Net,
    make_ticket,
    measurement,
    open_tracker,
    record,
    write_ticket,
)


def contents(tracker: Tracker) -> dict[str, Any]:
    """Every run with its params and every metric row, and every model version."""
    runs = {}
    for found in tracker.client.search_runs([tracker.experiment_id]):
        names = sorted(found.data.metrics)
        rows = {
            n: [
                (p.step, p.value, p.timestamp)
                for p in tracker.client.get_metric_history(found.info.run_id, n)
            ]
            for n in names
        }
        runs[found.info.run_id] = (found.info.status, dict(found.data.params), rows)
    versions = tracker.client.search_model_versions(f"name = '{tracker.name}'")
    models = tracker.client.search_logged_models([tracker.experiment_id])
    return {
        "runs": runs,
        "versions": sorted(v.version for v in versions),
        "models": sorted(m.model_id for m in models),
    }


def steps(tracker: Tracker, key: str) -> dict[int, float]:
    history = tracker.client.get_metric_history(tracker.parent_id, key)
    assert len({point.step for point in history}) == len(history)
    return {point.step: point.value for point in history}


def test_everything_twice_adds_nothing(fresh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = fresh
    report = run / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>page")
    (report / "front.png").write_bytes(b"png")
    (report / "notes.txt").write_text("not for MLflow")
    ticket = make_ticket("t1")
    folder = write_ticket(run, ticket)
    dense = {
        "inputs": "in",
        "seed": 3,
        "seconds": 1.5,
        "curve": [{"epoch": 1, "step": 10, "loss": 0.5, "validation_accuracy": 0.8}],
        "validation": measurement(0.93, 3_000_000),
    }

    def everything() -> Tracker:
        tracker = open_tracker(run)
        tracker.log_dense(dense)
        tracker.log_archive([record("ppo", e, 0.9, 90_000) for e in (1, 2)])
        tracker.log_ticket(folder, ticket)
        assert tracker.register(ticket, Net(), EXAMPLE) == "1"
        tracker.log_figures(report)
        tracker.finish()
        return tracker

    tracker = everything()
    first = contents(tracker)
    assert contents(everything()) == first
    assert len(first["runs"]) == 5  # the experiment, the ticket, its three arms
    assert {p.name for p in run.glob("mlflow*")} == {"mlflow.db", "mlflow.json"}
    assert len(first["models"]) == 1
    assert {status for status, _, _ in first["runs"].values()} == {"FINISHED"}

    parent = tracker.client.get_run(tracker.parent_id)
    assert parent.data.params["model.args.width"] == "0.25"
    assert parent.data.params["search.target"] == "[8, 60]"
    assert parent.data.params["dense.seed"] == "3"
    assert parent.data.metrics["dense.bytes"] == 3_000_000
    assert steps(tracker, "dense/validation_accuracy") == {10: 0.8}
    figures = tracker.client.list_artifacts(tracker.parent_id, "report")
    assert {f.path for f in figures} == {"report/front.png", "report/index.html"}
    assert capfd.readouterr() == ("", "")


def test_ticket_is_a_child_run_with_its_controls_and_files(run: Path) -> None:
    tracker, ticket = open_tracker(run), make_ticket("t1")
    tracker.log_ticket(write_ticket(run, ticket), ticket)
    (child,) = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.mlflow.parentRunId = '{tracker.parent_id}'"
    )
    assert child.data.params["searcher"] == "ppo"
    assert child.data.params["target"] == "None"
    assert child.data.metrics["accuracy"] == 0.92
    assert child.data.metrics["dense.accuracy"] == 0.925
    assert child.data.metrics["control.fresh.accuracy"] == 0.8
    history = tracker.client.get_metric_history(child.info.run_id, "rewind/loss")
    assert {p.step: p.value for p in history} == {0: 1.0, 9: 0.1}
    files = {f.path for f in tracker.client.list_artifacts(child.info.run_id)}
    assert files >= {"schedule.json", "ticket.json", "weights.safetensors"}
    assert run / "mlartifacts" in Path(child.info.artifact_uri.removeprefix("file://")).parents


def test_archive_goes_on_where_a_killed_process_stopped(run: Path) -> None:
    """Feasible means accuracy >= 0.93 - 0.01; the first tracker is never finished."""
    records = [
        record("ppo", 1, 0.80, 10_000),  # dense, but below the floor
        record("ppo", 2, 0.93, 93_000),  # 1000 % per MB
        record("uniform", 1, 0.92, 460_000),  # 200
        record("ppo", 3, 0.92, 46_000),  # 2000
        record("ppo", 4, 0.92, 92_000),  # 1000
    ]
    open_tracker(run).log_archive(records[:3])
    tracker = open_tracker(run)
    tracker.log_archive(records)
    tracker.log_archive(records)
    assert steps(tracker, "ppo/bytes") == {1: 10_000, 2: 93_000, 3: 46_000, 4: 92_000}
    assert steps(tracker, "uniform/accuracy") == {1: 0.92}
    assert steps(tracker, "ppo/best_density") == pytest.approx({2: 1000, 3: 2000, 4: 2000})
    assert steps(tracker, "uniform/best_density") == pytest.approx({1: 200})
    assert len(tracker.client.search_runs([tracker.experiment_id])) == 1


def test_archive_of_more_than_one_batch(run: Path) -> None:
    tracker = open_tracker(run)
    tracker.log_archive([record("random", e, 0.9, 1000 + e) for e in range(1, 302)])
    assert steps(tracker, "random/bytes") == {e: 1000 + e for e in range(1, 302)}
    assert len(steps(tracker, "random/kl")) == 301


def test_archive_names_the_missing_dense_measurement(run: Path) -> None:
    (run / "search" / "dense.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dense\.json"):
        open_tracker(run).log_archive([record("ppo", 1, 0.9, 1000)])


def test_champion_loads_with_any_batch_and_without_pickle(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, ticket, net = open_tracker(run), make_ticket("t1"), Net()
    with torch.no_grad():
        net(torch.randn(16, 1, 8, 8))  # running statistics that differ from the batch's
    tracker.log_ticket(write_ticket(run, ticket), ticket)
    tracker.register(ticket, net, EXAMPLE)
    assert net.training
    assert mlflow.active_run() is None

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    before = mlflow.get_tracking_uri()
    assert before != tracker.uri
    mlflow.set_tracking_uri(tracker.uri)
    try:
        loaded = mlflow.pytorch.load_model("models:/rlcompress-demo@champion")
    finally:
        mlflow.set_tracking_uri(before)
    for n in (1, 2, 7):
        x_NCHW = torch.randn(n, 1, 8, 8)
        torch.testing.assert_close(loaded(x_NCHW), net.eval()(x_NCHW))
    (graph,) = (run / "mlartifacts").rglob("*.pt2")
    assert not zipfile.ZipFile(graph).testzip()
    assert not [p for p in (run / "mlartifacts").rglob("*") if p.suffix in (".pth", ".pkl", ".pt")]


def test_a_fixed_batch_size_is_refused(run: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) + torch.zeros(2, 1).expand(int(x.shape[0]), 64)

    tracker, ticket = open_tracker(run), make_ticket("t1")
    tracker.log_ticket(write_ticket(run, ticket), ticket)
    with pytest.raises(TrackingError, match="batch"):
        tracker.register(ticket, Fixed(), torch.zeros(4, 1, 8, 8))
    assert tracker.register(ticket, Net(), torch.zeros(4, 1, 8, 8)) == "1"
    (model,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert model.status == "READY"


def test_champion_is_the_densest_at_the_floor(run: Path) -> None:
    """Dense accuracy is 0.925, so the floor is 0.915."""
    tracker = open_tracker(run)

    def champion_after(ticket: dict[str, Any]) -> str:
        tracker.log_ticket(write_ticket(run, ticket), ticket)
        tracker.register(ticket, Net(), EXAMPLE)
        version = tracker.client.get_model_version_by_alias(tracker.name, "champion")
        return version.tags["rlcompress.ticket"]

    assert champion_after(make_ticket("below", accuracy=0.70, size=5_000)) == "below"
    assert champion_after(make_ticket("first", accuracy=0.92, size=50_000)) == "first"
    assert champion_after(make_ticket("bigger", accuracy=0.924, size=60_000)) == "first"
    assert champion_after(make_ticket("smaller", accuracy=0.916, size=40_000)) == "smaller"
    assert champion_after(make_ticket("tiny", accuracy=0.60, size=4_000)) == "smaller"
    assert len(tracker.client.search_model_versions(f"name = '{tracker.name}'")) == 5


def test_register_needs_the_logged_ticket(run: Path) -> None:
    with pytest.raises(TrackingError, match="log_ticket"):
        open_tracker(run).register(make_ticket("t1"), Net(), EXAMPLE)


def test_finish_ends_cut_short_children_and_a_new_tracker_reopens(run: Path) -> None:
    tracker = open_tracker(run)
    with pytest.raises(TrackingError):
        tracker.register(make_ticket("t1"), Net(), EXAMPLE)
    for role in ("trial", "arm", "policy"):
        tracker.child(role, role, {})
    tracker.finish("KILLED")
    status = {r.info.status for r in tracker.client.search_runs([tracker.experiment_id])}
    assert status == {"KILLED", "FAILED"}
    again = open_tracker(run)
    assert again.parent_id == tracker.parent_id
    assert again.client.get_run(again.parent_id).info.status == "RUNNING"
    with pytest.raises(ValueError, match="DONE"):
        again.finish("DONE")


def test_another_spec_hash_is_another_parent_run(run: Path) -> None:
    first = open_tracker(run)
    changed = SPEC | {"search": {"target": [8, 90]}}
    second = open_tracker(run, spec=changed, spec_hash="other")
    assert second.parent_id != first.parent_id
    assert second.client.get_run(second.parent_id).data.params["search.target"] == "[8, 90]"


def test_other_inputs_of_the_same_options_are_another_run_ticket_and_version(run: Path) -> None:
    """As other weights in the same file: counts, steps and ids may be the same."""
    seen = []
    for inputs, accuracy in (("7 abc 0123", 0.9), ("7 abc 4567", 0.8)):
        tracker, ticket = open_tracker(run, inputs=inputs), make_ticket("t1", accuracy=accuracy)
        ticket["inputs"] = inputs
        tracker.log_archive([record("ppo", 1, accuracy, 90_000)])
        tracker.log_ticket(write_ticket(run, ticket), ticket)
        version = tracker.register(ticket, Net(), EXAMPLE)
        tracker.finish()
        assert steps(tracker, "ppo/accuracy") == {1: accuracy}
        seen.append((tracker.parent_id, version))
    assert seen[0][0] != seen[1][0]
    assert [version for _, version in seen] == ["1", "2"]
    # Under the same parent too: compression during training begins with a policy of its own.
    tracker.log_ticket(write_ticket(run, ticket), {**ticket, "inputs": "7 abc 89ab"})
    tickets = tracker.client.search_runs(
        [tracker.experiment_id],
        f"tags.`rlcompress.role` = 'ticket' and tags.mlflow.parentRunId = '{tracker.parent_id}'",
    )
    assert len(tickets) == 2


def test_the_environment_names_the_server(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{fresh.parent}/shared/all.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = open_tracker(fresh)
    assert tracker.uri == uri
    assert (fresh.parent / "shared" / "all.db").is_file()
    assert not (fresh / "mlflow.db").exists()


@pytest.mark.parametrize("uri", ["http://me:secret@127.0.0.1:9", "sqlite:////dev/null/x.db"])
def test_unreachable_is_one_error_that_names_the_uri(
    run: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as caught:
        open_tracker(run, uri=uri)
    assert uri.replace("secret", "***") in str(caught.value)
    assert "secret" not in str(caught.value)
