"""How a run folder's record in MLflow ends, and when it is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcompress.core.errors import OutsideError
from rlcompress.core.files import save_json
from rlcompress.schema import Experiment
from rlcompress.stages import deliver
from rlcompress.stages.workspace import Workspace
from rlcompress.tracking import TrackingError


def workspace(run: Path, **changes: Any) -> Workspace:
    options = {"model": {"factory": "vgg19"}, "data": {"factory": "digits"}, **changes}
    return Workspace("demo", Experiment.model_validate(options), run)


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (RuntimeError("disk"), RuntimeError, "FAILED"),
        (TrackingError("gone"), OutsideError, "FAILED"),
        (KeyboardInterrupt(), KeyboardInterrupt, "KILLED"),
    ],
)
def test_nothing_runs_on_in_mlflow_after_an_error_or_an_interrupt(
    run: Path, error: BaseException, raised: type[BaseException], status: str
) -> None:
    made = []

    def work() -> None:
        with deliver.tracker_of(workspace(run)) as tracker:
            made.extend([tracker, tracker.child("trial", "trial 1", {})])
            raise error

    with pytest.raises(raised):
        work()
    tracker, trial = made
    runs = tracker.client.search_runs([tracker.experiment_id])
    ended = {found.info.run_id: found.info.status for found in runs}
    assert ended == {tracker.parent_id: status, trial: "FAILED"}


def test_other_files_under_the_same_options_are_tracked_again(run: Path, tmp_path: Path) -> None:
    """Weights and a policy that change under their names leave counts and ids as they were."""
    weights, begun = tmp_path / "w.safetensors", run / "search" / "policies.json"
    weights.write_bytes(b"one")
    mine = workspace(run, dense={"weights": str(weights)}, search={"searcher": "ppo"})
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("")

    def track() -> None:
        save_json(run / "tracked.json", deliver._state(mine))
        assert deliver.tracked(mine)

    track()
    weights.write_bytes(b"two")
    assert not deliver.tracked(mine)
    track()
    begun.write_text(json.dumps({"ppo": "0123456789ab"}))
    assert not deliver.tracked(mine)
    track()
    # Another searcher's is nothing to these options.
    begun.write_text(json.dumps({"ppo": "0123456789ab", "untrained": "none"}))
    assert deliver.tracked(mine)
