"""Arms trained on Ray are the arms trained here."""

from __future__ import annotations

import pytest
import torch

from rlcompress.core.data import Split
from rlcompress.core.errors import UserError
from rlcompress.core.ticket import Lesson, Task, in_process, starts
from rlcompress.core.train import Recipe
from rlcompress.schema import PPOSpec

pytestmark = pytest.mark.ray
arms = pytest.importorskip("rlcompress.rl.arms")
cluster = pytest.importorskip("rlcompress.rl.cluster")


@pytest.fixture(scope="module")
def tasks(bundle, problem):
    cluster.start_ray(PPOSpec())
    schedule, dense = problem.network.uniform(problem.keeps[-1], 4), bundle.model()
    begin = starts(schedule, problem.evaluator, bundle.ref, dense, bundle.ref.build(0), seed=0)
    return [Task(begin[arm], problem.network) for arm in ("finetuned", "fresh")]


@pytest.fixture(scope="module")
def make_lesson(bundle):
    split = Split(torch.tensor(bundle.score_NCHW), torch.tensor(bundle.labels_N))

    def make(lr: float) -> Lesson:
        recipe = Recipe(epochs=2, batch_size=16, lr=lr, distill=0.5)
        return Lesson.of(split, split, recipe, 0, bundle.model(), "cpu")

    return make


def test_workers_train_what_this_process_trains(tasks, make_lesson):
    def play(player):
        found = {}
        for number, checkpoint in player([(task, None) for task in tasks], make_lesson(0.05)):
            found.setdefault(number, []).append(checkpoint.curve[-1])
        return found

    here, there = play(in_process), play(arms.player())
    assert {*there} == {0, 1}
    for number, rows in here.items():
        assert [row["epoch"] for row in there[number]] == [1, 2]
        assert [row["loss"] for row in there[number]] == pytest.approx([r["loss"] for r in rows])


def test_a_workers_diverging_loss_is_the_users_error(tasks, make_lesson):
    with pytest.raises(UserError, match="try a lower lr"):
        list(arms.player()([(tasks[1], None)], make_lesson(1e38)))
