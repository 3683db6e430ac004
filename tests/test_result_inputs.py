"""Which options each result of a run depends on."""

from __future__ import annotations

import pytest

from rlcompress import spec
from rlcompress.stages.inputs import Inputs

NAMES = {"dense", "estimates", "search", "ticket", "tune", "dynamic", "samples", "policy"}
SEARCHED = NAMES - {"dense"}


def inputs(*options: str) -> dict[str, str]:
    file = spec.load_experiments("experiments.yaml")
    of = Inputs(spec.resolve(file, "tiny", list(options)), "")
    return {name: getattr(of, name) for name in NAMES}


@pytest.mark.parametrize(
    ("option", "depending"),
    [
        ("search.cache_mb=1", set()),
        ("search.baselines=[]", set()),
        ("search.searcher=local", set()),
        ("search.policy=none", set()),
        ("search.baseline_episodes=3", set()),
        ("search.episodes=99", {"tune"}),
        ("search.finalists=3", {"ticket"}),
        ("calibration.final_images=3", {"ticket", "dynamic"}),
        ("ticket.epochs=7", {"ticket"}),
        ("ticket.floor=3", {"tune"}),
        ("tune.trials=3", {"tune"}),
        ("dynamic.rounds=3", {"dynamic"}),
        ("zoo.ppo_episodes=3", {"policy"}),
        ("ppo.lr=0.5", {"search", "ticket", "tune", "dynamic", "policy"}),
        ("search.target=[3, 5]", SEARCHED - {"estimates"}),
        ("search.bits=[2, 3]", SEARCHED),
        ("calibration.score_images=9", SEARCHED),
        ("seed=7", NAMES),
        ("dense.epochs=9", NAMES),
        ("device=cpu", set()),
    ],
)
def test_a_result_depends_on_what_gives_it_its_meaning(rlcompress, option, depending):
    before, after = inputs(), inputs(option)
    assert {name for name in NAMES if before[name] != after[name]} == depending


def test_weights_are_inputs_of_all_results(rlcompress):
    experiment = spec.resolve(spec.load_experiments("experiments.yaml"), "tiny", [])
    for name in NAMES:
        first, second = (getattr(Inputs(experiment, w), name) for w in ("aa", "bb"))
        assert first != second
