"""`storage` through the command line: a copy that is all there is, and one that cannot be made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlcompress import stages
from rlcompress.core.errors import OutsideError, UserError
from rlcompress.stages.storage import Storage
from tests.mistakes import assert_told


def test_verbs_on_a_run_that_is_at_storage_alone(rlcompress, searched):
    shutil.copytree(searched, "kept/tiny")
    words = [word for o in ("storage=kept", "export.onnx=false", "ticket.epochs=1")
             for word in ("--set", o)]  # fmt: skip
    for verb in ("report", "ticket", "export"):
        told = rlcompress(verb, "tiny", *words, "--out", f"runs/{verb}")
        assert told.code == 0, told.err
    assert list(Path("kept/tiny").glob("tickets/*/ticket.json"))
    told = rlcompress("ticket", "tiny", "--set", "storage=nothing")
    assert_told(told, "nothing searched yet")
    assert not Path("runs/tiny").exists()


ENDS = {
    "interrupted": (KeyboardInterrupt(), 130, "Interrupted. Kept in runs/tiny: the dense network"),
    "a mistake": (UserError("no such layer"), 2, "no such layer"),
    "nothing": (None, 3, ""),
}


@pytest.mark.parametrize(("error", "code", "says"), ENDS.values(), ids=ENDS)
def test_a_copy_that_fails_hides_nothing(rlcompress, searched, monkeypatch, error, code, says):
    shutil.copytree(searched, "runs/tiny")

    def end(*_: object) -> None:
        if error is not None:
            raise error

    def gone(*_: object) -> None:
        raise OutsideError("storage: kept/tiny: gone")

    monkeypatch.setattr(stages, "train_dense", end)
    monkeypatch.setattr(Storage, "save", gone)
    told = rlcompress("search", "tiny", "--set", "storage=kept")
    assert told.code == code, told.err
    assert "storage: kept/tiny: gone\n" in told.err
    assert says in told.err
    assert "Traceback" not in told.err
