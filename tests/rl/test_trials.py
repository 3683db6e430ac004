"""Trials of Ray Tune: what their checkpoints hold, and which are drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import pbt

from rlcompress.core.files import read_archive
from rlcompress.core.policy import PRIOR
from rlcompress.schema import PPOSpec, TuneSpec

engine = pytest.importorskip("rlcompress.rl.tune")
#: Of all trials here.
KNOWN = {
    "ppo": PPOSpec(num_env_runners=0, hidden=8).model_dump(),
    "target": [4.0, 8.0],
    "low": 4.0,
    "floor": 5.0,
    "seed": 3,
    "sensitivity": "estimated",
}


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
        known = KNOWN | {"evaluations": evaluations}
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


def drawn(space: dict[str, Any], trials: int) -> list[dict[str, Any]]:
    """The options of all trials, as the engine's generator makes them."""
    spec = TuneSpec.model_validate({"space": space, "trials": trials})
    draws = engine.Draws(0, engine.Repeats())
    config = {key: engine.domain(values) for key, values in spec.space.items()}
    about = {"run": lambda config: None, "config": config, "num_samples": spec.draws}
    draws.add_configurations({"drawn": about})
    found = []
    while (trial := draws.next_trial()) is not None:
        found.append(trial.config)
    assert len(found) == spec.searches
    assert len({engine.digest(options) for options in found}) == len(found)
    return found


def test_a_grid_alone_is_drawn_once():
    grid = {"ppo.kl_weight": {"grid": [0.5, 2.0]}, "search.target": {"grid": [[4, 8], [6, 8]]}}
    found = drawn(grid, 4)
    assert [x["ppo.kl_weight"] for x in found] == [0.5, 2.0, 0.5, 2.0]
    assert not any(engine.REPEAT in options for options in found)


def test_what_is_drawn_again_is_another_search():
    space = {"ppo.kl_weight": {"grid": [0.5, 2.0]}, "ppo.lr": {"choice": [1e-3, 1e-2]}}
    found = drawn(space, 5)
    for weight, rate in ((0.5, 1e-3), (0.5, 1e-2), (2.0, 1e-3), (2.0, 1e-2)):
        mine = [x for x in found if (x["ppo.kl_weight"], x["ppo.lr"]) == (weight, rate)]
        assert [x.get(engine.REPEAT, 0) for x in mine] == list(range(len(mine)))
    assert len(found) == 10
    # The same command draws the same.
    assert drawn(space, 5) == found
    free = drawn({"ppo.lr": {"loguniform": [1e-4, 1e-2]}}, 5)
    assert not any(engine.REPEAT in options for options in free)


def test_clones_of_one_trial_are_searches_of_their_own():
    repeats = engine.Repeats()
    donor = repeats.number({"ppo.lr": 1e-3})
    clones = [repeats.number(dict(options)) for options in (donor, donor)]
    clones.append(repeats.number(dict(clones[0])))
    assert [x.get(engine.REPEAT) for x in (donor, *clones)] == [None, 1, 2, 3]


def test_clones_stay_within_the_space():
    space = {"ppo.epochs": {"choice": [2, 4, 8]}, "ppo.lr": {"loguniform": [1e-3, 1e-2]}}
    spec = TuneSpec.model_validate({"space": space, "scheduler": "pbt"})
    settle = engine.explored(spec, engine.Repeats())
    seen = set()
    for _ in range(40):
        begun = {"ppo.epochs": 4, "ppo.lr": 9e-3}
        found, _ = pbt._explore(begun, engine.mutations(spec), 0.25, (0.8, 1.2), settle)
        assert found["ppo.epochs"] in (2, 4, 8)
        assert 1e-3 <= found["ppo.lr"] <= 1e-2
        seen.add(found["ppo.epochs"])
    assert len(seen) > 1


def test_a_repeat_has_random_numbers_of_its_own(play):
    seeds = [
        {r.seed for r in read_archive(play(options, 2)[0] / "archive.jsonl")}
        for options in ({"ppo.lr": 1e-3}, {"ppo.lr": 1e-3, engine.REPEAT: 2})
    ]
    assert seeds == [{3}, {5}]


@pytest.mark.ray
def test_nothing_that_trials_measure_is_thrown_away(bundle, tmp_path):
    from rlcompress.rl.cluster import start_ray

    space = {"ppo.kl_weight": {"grid": [0.5]}, "ppo.lr": {"choice": [1e-3]}}
    spec = TuneSpec.model_validate({"space": space, "trials": 2})
    start_ray(PPOSpec(num_env_runners=1))
    told: list[tuple[str, int, int]] = []

    def on_row(options: Any, row: Any) -> None:
        for text in json.loads(row["records"]):
            record = json.loads(text)
            told.append((engine.digest(options), record["seed"], record["evaluation"]))

    known = KNOWN | {"evaluations": 2}
    ended = engine.run(bundle, spec, known, PRIOR, tmp_path, on_row)
    assert [error for _, error in ended] == ["", ""]
    assert len(set(told)) == len(told) == spec.searches * 2
    assert {seed for _, seed, _ in told} == {3, 4}
