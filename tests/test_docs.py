"""README.md and docs/*.md: every command is one that there is, every block of code runs.

A fenced block `python file=NAME` or `yaml file=NAME` is a file of the reader's; a plain `python`
block runs among them. (The README's own example is run by test_readme.py.)
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rlcompress import spec
from rlcompress.cli import app
from tests.shell import ROOT, rlcompress

DOCS = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Not run here, and why.
ELSEWHERE = {
    "ray start": "starts a cluster; tests/rl/test_cluster.py does",
    "ray job submit": "needs a running cluster; tests/rl/test_cluster.py has one",
    "export RAY_AUTH_MODE=token": "of the shell",
    "ray get-auth-token": "writes a token into the home folder",
    "pip install uv && uv run rlcompress run quickstart": "installs; its verb is read below",
    "uv run pytest": "is what runs this",
    "chromium --headless": "draws docs/report.png; tests/test_page_browser.py opens the page",
}
#: Lines of the README's table of verbs that are no commands.
LISTED = {"rlcompress ticket | export | report | env"}


def fenced(path: Path, language: str) -> list[tuple[str, str]]:
    return [(m[2] or "", m[3]) for m in FENCE.finditer(path.read_text()) if m[1] == language]


def commands() -> list[tuple[str, str]]:
    """(file, command): lines of bash blocks, and those of the README that are indented."""
    found = [(d.name, line) for d in DOCS for _, b in fenced(d, "bash") for line in b.splitlines()]
    text = (ROOT / "README.md").read_text().replace(" \\\n     ", "")
    starts = r"^    ((?:rlcompress|uv|pip|ray|python|chromium) .*)$"
    # A table of verbs has its remarks behind two spaces.
    found += [("README.md", re.split(r" {2,}", line)[0]) for line in re.findall(starts, text, re.M)]
    return [(name, line.strip()) for name, line in found if line.strip()]


def test_there_are_five_pages_and_the_readme_links_them():
    names = ("cluster", "concepts", "extending", "own-model-and-data", "reading-the-report")
    assert tuple(page.stem for page in DOCS) == names
    readme = (ROOT / "README.md").read_text()
    assert [name for name in names if f"docs/{name}.md" not in readme] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize(("where", "line"), commands())
def test_a_command_is_one_that_there_is(where: str, line: str):
    if any(line.startswith(known) for known in ELSEWHERE) or line in LISTED:
        return
    words = shlex.split(line.removeprefix("uv run "))
    if words[:2] == ["python", "-m"]:
        done = subprocess.run(
            [sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "rlcompress", f"{where}: {line}: run it, or say in ELSEWHERE why not"
    group = typer.main.get_command(app)
    if words[1] == "submit" and "submit" not in group.commands:
        pytest.skip("this checkout has no `rlcompress submit`")
    verb = group.commands[words[1]]
    read = verb.make_context(words[1], words[2:])
    name = read.params.get("name")
    if name and "sets" in read.params and name != "mine":
        name = "quickstart" if name == "EXPERIMENT" else name
        file = spec.load_experiments(ROOT / "experiments.yaml")
        spec.resolve(file, name, list(read.params["sets"] or ()))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_python_of_a_page_runs(path: Path, tmp_path: Path):
    for name, text in [*fenced(path, "python"), *fenced(path, "yaml")]:
        if name:
            (tmp_path / name).write_text(text)
    for name, text in fenced(path, "python"):
        program = f"import {name.removesuffix('.py')}" if name else text
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    if path.stem == "concepts":
        assert done.stdout == "0.5 8 32\n"


def test_extensions_are_twenty_lines_at_most():
    for name, text in fenced(ROOT / "docs" / "extending.md", "python"):
        assert len(text.splitlines()) <= 20, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["own-model-and-data", "extending"])
def test_commands_on_ones_own_run(page: str, tmp_path: Path):
    path = ROOT / "docs" / f"{page}.md"
    for name, text in [*fenced(path, "python"), *fenced(path, "yaml")]:
        (tmp_path / name).write_text(text)
    lines = [line for _, block in fenced(path, "bash") for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line)
        # Weights that are trained already: those that the run before has left.
        trained = tmp_path / "runs" / "mine" / "dense" / "trained.safetensors"
        words = [w.replace("=trained.safetensors", f"={trained}") for w in words]
        if any("dense.weights" in word for word in words):
            words += ["--out", "runs/again"]
        if words[0] == "rlcompress":
            done = rlcompress(tmp_path, *words[1:], timeout=600)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    archive = (tmp_path / "runs" / "mine" / "search" / "archive.jsonl").read_text().splitlines()
    assert len(archive) >= 6
    if page == "extending":
        assert all('"searcher":"halves:search"' in line for line in archive)
