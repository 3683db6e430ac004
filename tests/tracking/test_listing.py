"""What `rlcompress tickets` finds, and whose the champion is when two register at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcompress import cli
from rlcompress.tracking import Tracker, TrackingError, find_tickets, stores
from tests.tracking.conftest import EXAMPLE, Net, make_ticket, open_tracker, write_ticket


def log(tracker: Tracker, run: Path, ticket: dict[str, Any]) -> None:
    tracker.log_ticket(write_ticket(run, ticket), ticket)


def register(tracker: Tracker, run: Path, ticket: dict[str, Any]) -> None:
    log(tracker, run, ticket)
    tracker.register(ticket, Net(), EXAMPLE)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tickets", *words])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_each_arm_is_a_child_run_of_its_ticket(run: Path) -> None:
    tracker = open_tracker(run)
    ticket = make_ticket("t1")
    log(tracker, run, ticket)
    log(tracker, run, ticket)
    (child,) = tracker.client.search_runs(
        [tracker.experiment_id], "tags.`rlcompress.role` = 'ticket'"
    )
    arms = tracker.client.search_runs([tracker.experiment_id], "tags.`rlcompress.role` = 'arm'")
    assert {arm.info.run_name for arm in arms} == {"rewind", "reconstructed", "fresh"}
    for arm in arms:
        assert arm.data.tags["mlflow.parentRunId"] == child.info.run_id
        assert arm.info.status == "FINISHED"
        name = arm.data.params["arm"]
        measured = ticket["ticket"] if name == "rewind" else ticket["controls"][name]
        assert arm.data.metrics["accuracy"] == measured["accuracy"]
        history = tracker.client.get_metric_history(arm.info.run_id, "validation_accuracy")
        points = ticket["curves"].get(name, [])
        assert [p.value for p in history] == [p["validation_accuracy"] for p in points]


def test_a_late_write_moves_no_champion_backwards(run: Path) -> None:
    """One experiment has looked at the versions when another registers a better one; then the
    first one writes."""
    uri = f"sqlite:///{run / 'mlflow.db'}"
    first = open_tracker(run, uri=uri)
    second = open_tracker(run, uri=uri, spec_hash="other")
    plain, better = make_ticket("plain", size=50_000), make_ticket("better", size=30_000)
    look = first.client.search_model_versions
    raced = []

    def looking(*args: Any, **kwargs: Any) -> Any:
        found = look(*args, **kwargs)
        if not raced and found:
            raced.append(True)
            register(second, run, better)
        return found

    first.client.search_model_versions = looking  # type: ignore[method-assign]
    register(first, run, plain)
    assert raced
    champion = second.client.get_model_version_by_alias(second.name, "champion")
    assert champion.tags["rlcompress.ticket"] == "better"


def test_tickets_of_all_stores_are_found(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_tracker(run)
    register(tracker, run, make_ticket("dense-one", size=60_000))
    lineage = {"commit": "abc123", "version": "1.0", "policy": "f00"}
    register(tracker, run, {**make_ticket("small-one", size=40_000), "lineage": lineage})
    below = make_ticket("low-one", size=30_000)
    below["validation"][below["arm"]] = 0.5
    register(tracker, run, below)
    root = run.parent
    found = find_tickets(stores(root=root))
    assert [(t.id, t.champion, t.at_floor) for t in found] == [
        ("low-one", False, False),
        ("small-one", True, True),
        ("dense-one", False, True),
    ]
    found = found[1:]
    assert found[0].lineage["commit"] == "abc123"
    assert found[0].controls == {"reconstructed": 0.91, "fresh": 0.8}
    assert found[0].bytes == 40_000

    monkeypatch.chdir(root.parent)
    code, out, _ = said(capsys)
    assert code == 0
    assert "small-one *" in out
    assert "low-one !" in out
    assert "! below the accuracy floor" in out
    assert "-0.50" in out
    assert "reconstructed 91.00%" in out
    code, out, _ = said(capsys, "--json")
    assert [t["id"] for t in json.loads(out)] == ["low-one", "small-one", "dense-one"]
    code, out, _ = said(capsys, "show", "small")
    assert code == 0
    assert "small-one (champion)" in out
    assert "points, at the floor" in out
    assert "abc123" in out
    assert '{"a": 0.5}' in out
    code, out, _ = said(capsys, "show", "dense-one", "--json")
    assert json.loads(out)["schedule"] == {"keep": {"a": 0.5}, "bits": {"a": 4}}
    code, out, _ = said(capsys, "--json", "show", "dense-one")
    assert json.loads(out)["id"] == "dense-one"
    code, _, err = said(capsys, "show", "smell-one")
    known = "low-one, small-one, dense-one"
    assert code == 2
    assert err == f"ticket 'smell-one': not among {known}; did you mean \"small-one\"?\n"
    monkeypatch.chdir(run.parents[1] / "elsewhere")


def test_nothing_to_list_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys)
    assert (code, out) == (2, "")
    assert err == (
        "no ticket yet (no runs/*/mlflow.db here); rlcompress run EXPERIMENT makes them\n"
    )
    code, _, err = said(capsys, "--uri", "sqlite:////dev/null/x.db")
    assert code == 3
    assert "/dev/null" in err
    with pytest.raises(TrackingError, match="/dev/null"):
        find_tickets(["sqlite:////dev/null/x.db"])
