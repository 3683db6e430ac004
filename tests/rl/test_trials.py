"""Trials of Ray Tune: what their checkpoints hold, and which are drawn. No Ray is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlcompress.core.files import read_archive
from rlcompress.core.policy import PRIOR
from rlcompress.schema import PPOSpec

engine = pytest.importorskip("rlcompress.rl.tune")


@pytest.fixture
def play(bundle, monkeypatch, tmp_path):
    """A trial with some options in this process, from a checkpoint if there is one: its last
    checkpoint, and its rows."""

    def play(options: dict[str, Any], evaluations: int, begin: Path | None = None):
        rows, last = [], tmp_path / f"checkpoint_{len(list(tmp_path.iterdir()))}"

        def report(row: dict[str, Any], *, checkpoint: Any) -> None:
            rows.append(row)
            shutil.copytree(checkpoint.path, last, dirs_exist_ok=True)

        found = engine.tune.Checkpoint.from_directory(str(begin)) if begin else None
        monkeypatch.setattr(engine.tune, "get_checkpoint", lambda: found)
        monkeypatch.setattr(engine.tune, "report", report)
        ppo = PPOSpec(num_env_runners=0, hidden=8).model_dump()
        known = {"ppo": ppo, "target": [4.0, 8.0], "low": 4.0, "floor": 5.0, "seed": 0}
        known |= {"evaluations": evaluations, "sensitivity": "estimated"}
        engine.trial(options, bundle=bundle, known=known, agent=PRIOR, begun={})
        return last, rows

    return play


def test_a_clones_checkpoint_names_its_own_options(play):
    donor, _ = play({"ppo.lr": 1e-3}, 2)
    clone, _ = play({"ppo.lr": 2e-3}, 3, begin=donor)
    assert json.loads((donor / "options.json").read_text()) == {"ppo.lr": 1e-3}
    assert json.loads((clone / "options.json").read_text()) == {"ppo.lr": 2e-3}
    theirs, ours = (read_archive(folder / "archive.jsonl") for folder in (donor, clone))
    assert ours[: len(theirs)] == theirs
    assert len(ours) == 3
