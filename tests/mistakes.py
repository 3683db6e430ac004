"""What the tests of mistakes share: a tiny experiment, the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlcompress import cli

EXPERIMENTS = """
experiments:
  tiny:
    model: {factory: "tests.toy:toy_network"}
    data: {factory: digits, args: {size: 16}}
    dense: {epochs: 2, batch_size: 32, lr: 0.1}
    calibration: {fit_images: 64, score_images: 64, positions: 256, estimate_images: 32}
    search: {searcher: uniform, baselines: [], episodes: 4, target: [4, 8],
             keeps: [1.0, 0.6, 0.3], bits: [2, 4, 8]}
    ppo: {num_env_runners: 0}
    dynamic: {target: 8, warmup: 21, watch: 10, recovery_steps: 3, final_steps: 20}
"""


class Told:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def rlcompress(tmp_path, monkeypatch, capfd):
    """The command line in a folder with `experiments.yaml`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("experiments.yaml").write_text(EXPERIMENTS)

    def run(*words: str) -> Told:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        out, err = capfd.readouterr()
        return Told(caught.value.code or 0, out, err)

    return run


def assert_told(told: Told, says: str, code: int = 2, lines: int = 1) -> None:
    assert told.code == code, told.out + told.err
    assert says in told.err, told.err
    assert "Traceback" not in told.out + told.err
    assert len(told.err.strip().splitlines()) == lines, told.err


@pytest.fixture(scope="session")
def searched(tmp_path_factory) -> Path:
    """A run folder with a dense network and four schedules."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "experiments.yaml").write_text(EXPERIMENTS)
    words = ("--file", str(folder / "experiments.yaml"), "--out", str(folder / "run"))
    with pytest.raises(SystemExit) as caught:
        cli.main(("search", "tiny", *words))
    assert not caught.value.code
    return folder / "run"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the log, and the spec that each command writes anew."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.txt", "spec.yaml", "lock")
    }
