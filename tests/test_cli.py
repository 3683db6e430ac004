from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

import rlcompress
from rlcompress import cli
from rlcompress.core.errors import UserError

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "experiments.yaml")
VERBS = ("ls", "check", "run", "search", "ticket", "tune", "dynamic", "export", "report", "env")
EXPERIMENT_VERBS = VERBS[1:-1]

LOADED = """
import sys
from rlcompress.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "ray", "mlflow", "gymnasium"} & set(sys.modules)
    print("loaded:", *sorted(heavy))
"""


def shell(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlcompress", *args], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Verbs reach a recorder in place of the stages; each call is (name, folder, verb)."""
    calls = []

    class Run:
        def __init__(self, name, experiment, folder, words, fresh):
            self.name, self.experiment, self.folder = name, experiment, folder
            self.fresh = fresh

        def __getattr__(self, verb):
            return lambda **_: calls.append((self.name, self.folder, verb, self.experiment))

    monkeypatch.setattr(rlcompress, "stages", types.SimpleNamespace(Run=Run), raising=False)
    monkeypatch.chdir(tmp_path)
    return calls


def code(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    return caught.value.code


class TestImports:
    def test_package(self):
        script = (
            "import rlcompress, sys;"
            "assert not {'torch', 'ray', 'mlflow', 'pydantic'} & set(sys.modules);"
            "print(rlcompress.Schedule(bits={'a': 3}).width('a'))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout == "3\n", done.stderr

    @pytest.mark.parametrize(
        "args",
        [("--help",), ("run", "--help"), ("ls", "--file", FILE), ("run", "nil", "--file", FILE)],
    )
    def test_nothing_heavy_until_a_verb_needs_it(self, args):
        done = subprocess.run(
            [sys.executable, "-c", LOADED, *args], capture_output=True, text=True, cwd=ROOT
        )
        assert done.stdout.endswith("loaded:\n"), done.stdout + done.stderr

    def test_public_names(self):
        assert {"Schedule", "Measurement", "Record"} <= set(dir(rlcompress))
        assert rlcompress.Record.__module__ == "rlcompress.core.schedule"
        with pytest.raises(AttributeError, match="Shedule"):
            _ = rlcompress.Shedule


class TestProcess:
    def test_user_mistakes_are_lines_not_tracebacks(self, tmp_path):
        done = shell(
            "run", "quickstrat", "--file", FILE, "--set", "x", "--out", "new", cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stdout == ""
        first, second = done.stderr.splitlines()
        assert 'did you mean "quickstart"?' in first
        assert second.startswith("--set x")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_verb(self, tmp_path):
        done = shell("rnu", cwd=tmp_path)
        assert done.returncode == 2
        assert "Did you mean 'run'?" in done.stderr

    def test_missing_file(self, tmp_path):
        done = shell("ls", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("experiments.yaml: no such file")

    def test_version(self, tmp_path):
        done = shell("--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"rlcompress {rlcompress.__version__}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_commands_to_copy(verb, capsys):
    assert code(verb, "--help") == 0
    assert f"\n  rlcompress {verb}" in capsys.readouterr().out


def test_env(capsys):
    assert code("env") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["rlcompress"] == rlcompress.__version__
    assert rows["torch"][0].isdigit()
    assert int(rows["cores"]) >= 1
    assert rows["memory"].endswith("GiB")
    assert "gpu" in rows


def test_ls_shows_descriptions_folders_and_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("experiments.yaml").write_text(
        """
defaults: {model: {factory: vgg19}, data: {factory: digits}}
experiments:
  one: {description: the first}
  second: {description: the other}
  broken: {seed: x, threads: 0}
"""
    )
    (tmp_path / "runs" / "second").mkdir(parents=True)
    assert code("ls") == 0
    assert capsys.readouterr().out.splitlines() == [
        "one     the first",
        "second  the other  [runs/second]",
        "broken  [2 problems: rlcompress check broken]",
    ]


class TestVerbs:
    @pytest.mark.parametrize("verb", EXPERIMENT_VERBS)
    def test_call_their_stage(self, verb, runs, tmp_path):
        assert code(verb, "quickstart", "--file", FILE, "--set", "search.episodes=9") == 0
        ((name, folder, called, experiment),) = runs
        assert (name, folder, called) == ("quickstart", Path("runs/quickstart"), verb)
        assert experiment.search.episodes == 9
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("verb", EXPERIMENT_VERBS)
    def test_stop_at_a_bad_spec(self, verb, runs, tmp_path, capsys):
        args = ("quickstart", "--file", FILE, "--set", "seed=x", "--set", "serch.episodes=1")
        assert code(verb, *args) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2
        assert runs == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("verb", ["run", "search"])
    def test_searcher(self, verb, runs, capsys):
        assert code(verb, "quickstart", "--file", FILE, "--searcher", "random") == 0
        assert runs[0][3].search.searcher == "random"
        assert code(verb, "quickstart", "--file", FILE, "--searcher", "randon") == 2
        assert 'did you mean "random"?' in capsys.readouterr().err

    @pytest.mark.parametrize("policy", ["2026-11-26", "1", "a: b", "[x]", "runs/zoo", "null"])
    def test_transfer_takes_a_folder_of_any_name(self, policy, runs):
        assert code("transfer", "quickstart", "--file", FILE, "--policy", policy) == 0
        assert runs[0][3].search.policy == policy

    def test_sensitivity(self, runs, capsys):
        command = ("search", "quickstart", "--file", FILE, "--set", "search.episodes=9")
        assert code(*command, "--sensitivity", "refitted") == 0
        assert runs[0][3].search.sensitivity == "refitted"
        assert runs[0][3].search.episodes == 9
        assert code(*command, "--sensitivity", "refited") == 2
        assert "search.sensitivity" in capsys.readouterr().err

    def test_out(self, runs, tmp_path, capsys):
        assert code("run", "quickstart", "--file", FILE, "--out", "a/b") == 0
        assert runs[0][1] == Path("a/b")
        (tmp_path / "file").write_text("")
        assert code("run", "quickstart", "--file", FILE, "--out", "file/b") == 2
        assert "is a file" in capsys.readouterr().err
        assert len(runs) == 1

    def test_fresh_leaves_alone_what_is_no_run_and_what_a_bad_spec_names(self, runs, tmp_path):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "thesis.tex").write_text("")
        command = ("run", "quickstart", "--file", FILE, "--out", "r", "--fresh")
        assert code(*command) == 2
        (tmp_path / "r" / "spec.yaml").write_text("")
        assert code(*command, "--set", "seed=x") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["r"]
        assert runs == []

    def test_without_fresh_the_run_stays(self, runs, tmp_path):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "spec.yaml").write_text("")
        assert code("run", "quickstart", "--file", FILE, "--out", "r") == 0
        assert [path.name for path in tmp_path.iterdir()] == ["r"]


def stop_with(monkeypatch, error: BaseException) -> None:
    class Run:
        def __init__(self, *_):
            raise error

    monkeypatch.setattr(rlcompress, "stages", types.SimpleNamespace(Run=Run), raising=False)


def test_interrupted(monkeypatch, tmp_path, capsys):
    stop_with(monkeypatch, KeyboardInterrupt())
    command = ["run", "quickstart", "--file", FILE, "--out", str(tmp_path / "r"), "--fresh"]
    monkeypatch.setattr(sys, "argv", ["rlcompress", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith(f"\n  rlcompress {' '.join(command[:-1])}\n")


def test_user_errors_of_a_stage(monkeypatch, tmp_path, capsys):
    stop_with(monkeypatch, UserError("no ticket yet", "rlcompress ticket quickstart"))
    assert code("export", "quickstart", "--file", FILE, "--out", str(tmp_path / "r")) == 2
    assert capsys.readouterr().err == "no ticket yet\nrlcompress ticket quickstart\n"


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    stop_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["check", "quickstart", "--file", FILE, "--out", str(tmp_path / "r")])
