"""`rlcompress submit` where no cluster is needed: mistakes, what is uploaded, `storage`."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from rlcompress.core.errors import OutsideError, UserError
from rlcompress.core.files import read_archive, save_bytes
from rlcompress.stages.storage import Storage
from tests.shell import ROOT, rlcompress


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "cluster").mkdir()
    shutil.copy(ROOT / "cluster" / "runtime_env.yaml", tmp_path / "cluster")
    shutil.copy(ROOT / "experiments.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def nobody() -> str:
    """An address that answers nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstar"], 'did you mean "quickstart"?'),
        (["quickstart", "--set", "search.episode=3"], 'did you mean "episodes"?'),
        (["quickstart", "--verb", "deploy"], "must be one of run, search"),
        (["quickstart", "--runtime-env", "no.yaml"], "--runtime-env PATH"),
        (["quickstart", "--address", "HEAD:8265"], "must be http://HEAD:8265"),
        (["quickstart", "--address", "http://HEAD:port"], "--address http://HEAD:port"),
        (["quickstart", "--verb", "ticket", "--fresh"], "run and search do"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_nothing_is_written(checkout, words, said):
    before = sorted(checkout.rglob("*"))
    done = rlcompress(checkout, "submit", *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(checkout.rglob("*")) == before


def test_a_folder_that_is_no_run_is_not_moved_for_one(checkout):
    (checkout / "mine").mkdir()
    (checkout / "mine" / "thesis.tex").write_text("")
    done = rlcompress(checkout, "submit", "quickstart", "--out", "mine")
    assert done.returncode == 2
    assert "mine: not a run folder" in done.stderr


def test_an_experiments_file_that_is_not_uploaded_is_refused(checkout, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    shutil.copy(ROOT / "experiments.yaml", elsewhere)
    done = rlcompress(checkout, "submit", "quickstart", "--file", str(elsewhere))
    assert done.returncode == 2
    assert "must be in this folder" in done.stderr


def test_no_cluster_is_exit_code_3_and_one_line(checkout, nobody):
    done = rlcompress(checkout, "submit", "quickstart", "--address", nobody)
    assert done.returncode == 3
    assert done.stderr.startswith(f"{nobody}: no answer")
    assert len(done.stderr.splitlines()) == 1
    assert " 3 the cluster" in rlcompress(checkout, "submit", "--help").stdout


def test_following_a_job_needs_nothing_that_was_uploaded(checkout, nobody, tmp_path_factory):
    """Neither the runtime environment nor an experiments file in this folder."""
    shutil.rmtree(checkout / "cluster")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    shutil.copy(ROOT / "experiments.yaml", elsewhere)
    for words in ((), ("--file", str(elsewhere))):
        words = ("quickstart", "--address", nobody, "--follow", "raysubmit_1", *words)
        done = rlcompress(checkout, "submit", *words)
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith(f"{nobody}: no answer")


def test_the_upload_is_this_folder_without_what_it_made(checkout):
    jobs = pytest.importorskip("rlcompress.rl.jobs")
    (checkout / "mine" / "data").mkdir(parents=True)
    (checkout / "mine" / "data" / "loader.py").write_text("")
    for name in (".git", "runs", "data", ".venv", ".mypy_cache", "mine/__pycache__"):
        (checkout / name).mkdir()
        (checkout / name / "large").write_bytes(b"x" * 1000)
    (checkout / ".gitignore").write_text("secret.txt\n")
    (checkout / "secret.txt").write_text("")
    excludes = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())["excludes"]
    path = checkout / "runs" / "package.zip"
    assert jobs.pack(checkout, excludes, path) == path.stat().st_size
    names = {n for n in zipfile.ZipFile(path).namelist() if not n.endswith("/")}
    assert names == {
        ".gitignore",
        "cluster/runtime_env.yaml",
        "experiments.yaml",
        "mine/data/loader.py",
    }


class TestStorage:
    @pytest.mark.slow
    def test_a_run_goes_on_where_another_machine_left_it(self, tmp_path):
        experiments = """
experiments:
  tiny:
    model: {factory: vgg19, args: {width: 0.125}}
    data: {factory: digits}
    dense: {epochs: 1, batch_size: 64, rewind_epoch: 0}
    calibration: {fit_images: 32, score_images: 32, positions: 64, estimate_images: 16}
    search: {searcher: uniform, baselines: [], episodes: 3, target: [6, 20]}
"""
        kept = tmp_path / "kept"
        first, second = tmp_path / "first", tmp_path / "second"
        for folder in (first, second):
            folder.mkdir()
            (folder / "experiments.yaml").write_text(experiments)
        words = ["search", "tiny", "--set", f"storage={kept}"]
        assert rlcompress(first, *words).returncode == 0
        archive = Path("search") / "archive.jsonl"
        before = (kept / "tiny" / archive).read_text()
        assert before == (first / "runs" / "tiny" / archive).read_text()
        dense = (kept / "tiny" / "dense" / "trained.safetensors").read_bytes()
        done = rlcompress(second, *words, "--set", "search.episodes=5")
        assert done.returncode == 0, done.stderr
        after = (kept / "tiny" / archive).read_text()
        assert after.startswith(before)
        assert [r.evaluation for r in read_archive(kept / "tiny" / archive)] == [1, 2, 3, 4, 5]
        assert (second / "runs/tiny/dense/trained.safetensors").read_bytes() == dense

    def test_only_what_changed_is_copied_and_what_went_goes(self, tmp_path):
        run, kept = tmp_path / "run", tmp_path / "kept" / "name"
        (run / "a").mkdir(parents=True)
        (run / "a" / "x.json").write_text(json.dumps(1))
        (run / "y").write_text("y")
        storage = Storage(f"file://{tmp_path}/kept", "name")
        storage.load(run)
        (run / "z").write_text("z")
        storage.save(run)
        assert sorted(p.name for p in kept.rglob("*") if p.is_file()) == ["x.json", "y", "z"]
        (run / "y").unlink()
        (run / "z").write_text("again")
        storage.save(run)
        assert sorted(p.name for p in kept.rglob("*") if p.is_file()) == ["x.json", "z"]
        assert (kept / "z").read_text() == "again"

    def test_what_went_goes_also_where_another_command_put_it(self, tmp_path):
        """But not what the folder never had, nor another place's."""
        run, kept = tmp_path / "run", tmp_path / "kept" / "name"
        run.mkdir()
        for name in ("spec.yaml", "search.done"):
            (run / name).write_text(name)
        Storage(str(tmp_path / "other"), "name").save(run)
        Storage(str(tmp_path / "kept"), "name").save(run)
        (kept / "foreign").write_text("another's")
        (run / "search.done").unlink()
        storage = Storage(str(tmp_path / "kept"), "name")
        storage.load(run)
        storage.save(run)
        assert sorted(p.name for p in kept.iterdir()) == ["foreign", "spec.yaml"]
        assert (tmp_path / "other" / "name" / "search.done").exists()
        # The same on a machine that has taken it from there.
        there = Storage(str(tmp_path / "kept"), "name")
        there.load(tmp_path / "second")
        (tmp_path / "second" / "foreign").unlink()
        Storage(str(tmp_path / "kept"), "name").save(tmp_path / "second")
        assert [p.name for p in kept.iterdir()] == ["spec.yaml"]

    def test_what_is_at_work_is_not_copied(self, tmp_path):
        """Its lock and its unfinished files; and a file that is there in one moment and gone in the
        next keeps nobody from saving."""
        run, done = tmp_path / "run", threading.Event()
        (run / "a").mkdir(parents=True)
        for name in ("lock", "x.json", "x.json.part", "mlflow.db-journal"):
            (run / name).write_text(name)

        def work() -> None:
            while not done.is_set():
                for number in range(20):
                    save_bytes(run / "a" / f"{number}.json", b"1")
                for number in range(20):
                    (run / "a" / f"{number}.json").unlink()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            storage = Storage(str(tmp_path / "kept"), "name")
            for _ in range(50):
                storage.save(run)
        finally:
            done.set()
            thread.join()
        storage.save(run)
        kept = tmp_path / "kept" / "name"
        assert [p.name for p in kept.rglob("*") if p.is_file()] == ["x.json"]

    def test_a_copy_takes_the_place_of_the_old_one_when_it_is_whole(self, tmp_path):
        run, kept = tmp_path / "run", tmp_path / "kept" / "name"
        run.mkdir()
        storage = Storage(str(tmp_path / "kept"), "name")
        (run / "x").write_text("old")
        storage.save(run)
        with (kept / "x").open() as reader:
            (run / "x").write_text("another")
            storage.save(run)
            assert reader.read() == "old"
        assert (kept / "x").read_text() == "another"

    def test_a_run_that_went_further_elsewhere_is_not_overwritten(self, tmp_path):
        for name, lines in (("run", "1\n"), ("kept/name", "1\n2\n")):
            (tmp_path / name / "search").mkdir(parents=True)
            (tmp_path / name / "spec.yaml").write_text("")
            (tmp_path / name / "search" / "archive.jsonl").write_text(lines)
        with pytest.raises(UserError, match="has gone further"):
            Storage(str(tmp_path / "kept"), "name").load(tmp_path / "run")

    def test_a_place_that_cannot_be_reached_is_told(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutsideError, match="storage: "):
            Storage(str(tmp_path / "file"), "name").save(tmp_path)
        with pytest.raises(OutsideError, match="nowhere"):
            Storage("nowhere://bucket", "name")

    def test_fresh_does_not_touch_it(self, checkout):
        done = rlcompress(checkout, "run", "quickstart", "--fresh", "--set", "storage=kept")
        assert done.returncode == 2
        assert "another place" in done.stderr
