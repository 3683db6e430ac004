"""Policies by name, and whose policy a search began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlcompress.core.errors import UserError
from rlcompress.core.files import read_json, read_lines, save_bytes, save_json
from rlcompress.core.observation import OBSERVATION_VERSION
from rlcompress.core.policy import DEFAULT, PRIOR, Agent
from rlcompress.stages.workspace import Workspace


def digest_of(folder: Path | None) -> str:
    """Twelve hex digits that name what a policy has learned; `none` of none."""
    if folder is None:
        return "none"
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def agent_of(folder: Path | None) -> Agent:
    """What the folder holds; without one, the prior on the estimates."""
    return Agent.load(folder, OBSERVATION_VERSION) if folder else PRIOR


#: Searchers that play `search.policy` or begin with it.
PLAYED = {"ppo", "transfer", "untrained"}


def policy_of(run: Workspace) -> Path | None:
    """The policy that the experiment's searchers begin with, as `find_policy` finds it; None where
    none of them plays one. Raises UserError too where `transfer` has none."""
    searchers = {run.experiment.search.searcher, *run.experiment.search.baselines}
    policy = find_policy(run) if searchers & PLAYED else None
    if policy is None and "transfer" in searchers:
        raise UserError("search.policy = none: transfer plays one; --set search.policy=default")
    return policy


def find_policy(run: Workspace) -> Path | None:
    """The folder of `search.policy`: `default`, the one in this package; `none`; a folder that
    holds one, or a run folder; NAME@ALIAS, registered in MLflow.

    Raises UserError if there is none, or one that this version cannot use.
    """
    name = run.experiment.search.policy
    if name == "none":
        return None
    if name == "default":
        folder = DEFAULT
    elif "@" in name and not Path(name).exists():
        from rlcompress.tracking import fetch_policy

        folder = fetch_policy(name, run.folder / "fetched", run.experiment.tracking.uri)
    else:
        places = [Path(name), Path(name) / "policy", Path(name) / "search" / "policy"]
        found = [place for place in places if (place / "policy.json").exists()]
        if not found:
            raise UserError(
                f"search.policy = {name}: no policy.json in {', '.join(map(str, places))}; "
                "allowed: default, none, a run folder, or NAME@ALIAS of MLflow's registry"
            )
        folder = found[0]
    agent_of(folder)
    return folder


def begin_with(run: Workspace, searcher: str, policy: Path | None) -> None:
    """Notes whose policy `searcher` begins with. What it measured and learned with another one is
    set aside: its policy, and copies of the archive and the curve, which keep the rest.

    Cut off anywhere, it is done again from the start: nothing is lost."""
    folder = run.folder / "search"
    path = folder / "policies.json"
    known = read_json(path) if path.exists() else {}
    digest = digest_of(policy)
    if known.get(searcher, "none") != digest:
        rests = _rests([folder / "curve.jsonl", folder / "archive.jsonl"], searcher)
        for old in rests:
            run.copy_aside(old)
        # Nobody's from here on: neither policy may find half of what the other one did.
        save_json(path, {**known, searcher: ""})
        (folder / f"{searcher}.done").unlink(missing_ok=True)
        if searcher == "ppo" and (folder / "policy").exists():
            run.set_aside(folder / "policy")
        for old, rest in rests.items():
            save_bytes(old, rest)
    save_json(path, {**known, searcher: digest})


def _rests(paths: list[Path], searcher: str) -> dict[Path, bytes]:
    """Of the files that have lines of `searcher`, all other lines."""
    rests = {}
    for path in paths:
        whose = [row.get("searcher") for row in read_lines(path)]
        if searcher in whose:
            lines = path.read_bytes().splitlines(keepends=True)
            # A last line that was cut off is nobody's.
            pairs = zip(lines, whose, strict=False)
            rests[path] = b"".join(line for line, who in pairs if who != searcher)
    return rests
