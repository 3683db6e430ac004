"""One loop: what is cut off goes on bit for bit, and what diverges says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlcompress.core.cost import CostModel
from rlcompress.core.data import Split
from rlcompress.core.errors import UserError
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network
from rlcompress.core.tensors import load_tensors
from rlcompress.core.train import Recipe, _augment, distill, logits_of, measure, teach, top1, train


@pytest.fixture(scope="module")
def split(data) -> Split:
    small = data.train.sample(100, seed=0)
    return Split(small.raw_NCHW[..., ::2, ::2].contiguous(), small.labels_N, small.mean, small.std)


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )


class InterruptedRunError(Exception):
    pass


RECIPES = {
    "plain": Recipe(epochs=4, batch_size=32),
    "augmented": Recipe(epochs=4, batch_size=32, augment=True, label_smoothing=0.1),
    "distilled": Recipe(epochs=4, batch_size=32, distill=0.5),
    "both": Recipe(epochs=4, batch_size=32, distill=0.5, augment=True),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("cut_off", [1, 3])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(split, tmp_path, recipe, cut_off):
    teacher = small_network(5).eval()

    def run(model, checkpoint, on_epoch=lambda epoch, row: None):
        return train(
            model, split, recipe, seed=3, validation=split, teacher=teacher,
            checkpoint=checkpoint, key="k", on_epoch=on_epoch,
        )  # fmt: skip

    def interrupt(epoch, row):
        if epoch == cut_off + 1:
            raise InterruptedRunError

    undisturbed, restarted = small_network(), small_network(9)
    curve = run(undisturbed, None)
    with pytest.raises(InterruptedRunError):
        run(small_network(), tmp_path / "c", interrupt)
    assert load_tensors(tmp_path / "c")[1]["epoch"] == cut_off
    seen = []
    assert run(restarted, tmp_path / "c", lambda epoch, row: seen.append(epoch)) == curve
    assert seen == [*range(cut_off + 1, 5)]
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, restarted.state_dict()[name]), name
    ended = small_network(8)
    assert run(ended, tmp_path / "c") == curve  # nothing is left to do
    assert torch.equal(ended[0].weight, undisturbed[0].weight)
    assert not ended.training


def test_anothers_checkpoint_is_ignored(split, tmp_path):
    recipe = Recipe(epochs=2, batch_size=32)
    train(small_network(1), split, recipe, seed=0, checkpoint=tmp_path / "c", key="theirs")
    ours, alone = small_network(), small_network()
    curve = train(ours, split, recipe, seed=0, checkpoint=tmp_path / "c", key="ours")
    assert curve == train(alone, split, recipe, seed=0)
    assert torch.equal(ours[0].weight, alone[0].weight)


def test_the_seed_decides_the_order(split):
    def weights(seed: int) -> torch.Tensor:
        model = small_network()
        train(model, split, Recipe(epochs=1, batch_size=32), seed=seed)
        return model[0].weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_curve_falls_and_counts_steps(split):
    model = small_network()
    curve = train(model, split, Recipe(epochs=6, batch_size=25), seed=0, validation=split)
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in curve] == [4, 8, 12, 16, 20, 24]
    assert curve[-1]["loss"] < curve[0]["loss"] / 2
    assert curve[-1]["validation_accuracy"] == top1(model, split) > 0.5
    assert not model.training


def test_a_diverging_loss_is_an_error_that_names_the_rate(split):
    broken = Split(split.raw_NCHW.clone(), split.labels_N, split.mean, split.std)
    broken.raw_NCHW[0] = float("nan")
    with pytest.raises(UserError, match=r"nan in epoch 1.*lr \(now 0\.07\)"):
        train(small_network(), broken, Recipe(epochs=2, batch_size=100, lr=0.07), seed=0)


def test_logits_and_measurement_of_a_split(split):
    model = small_network().train()
    logits = logits_of(model, split, batch=33)
    with torch.no_grad():
        assert torch.allclose(logits, model.eval()(split.images()), atol=1e-5)
    cost = CostModel(build_network(model, split.images(slice(0, 1)))).cost(Schedule())
    measured = measure(model, split, logits, cost)
    assert measured.kl == pytest.approx(0, abs=1e-6)
    assert measured.accuracy == top1(model, split)
    assert measured.bytes == cost.bytes


def test_lessons_of_a_few_steps_repeat_to_the_bit(split):
    """With dropout, whatever else draws random numbers."""
    taught = teach(small_network(5).eval(), split)

    def weights(draws: int) -> dict[str, torch.Tensor]:
        model = small_network(1)
        torch.rand(draws)
        distill(model, split.images(), taught, 3, seed=2)
        return model.state_dict()

    first, second = weights(1), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_leaves_the_caller_s_random_numbers(split):
    model = small_network()
    before = torch.get_rng_state()
    train(model, split, Recipe(epochs=1, batch_size=50), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_wide_images_are_padded_by_an_eighth_of_each_side():
    """Every crop shows at least half of a narrow image."""
    wide = torch.ones(64, 1, 8, 64)
    batches = [_augment(wide, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert all(batch.shape == wide.shape for batch in batches)
    assert min(float(batch.mean()) for batch in batches) >= (7 / 8) ** 2


@pytest.mark.parametrize("augment", [False, True])
def test_a_teacher_in_training_stays_as_it_is_and_answers_in_eval_mode(split, augment):
    recipe = Recipe(epochs=1, batch_size=32, distill=1.0, augment=augment)
    teacher = small_network(5)
    other = small_network(5).eval()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    taught = [
        train(model := small_network(1), split, recipe, seed=0, teacher=t) and model
        for t in (teacher.train(), other)
    ]
    assert teacher.training
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(
        torch.equal(a, b)
        for a, b in zip(taught[0].parameters(), taught[1].parameters(), strict=True)
    )


def test_distillation_without_a_teacher():
    with pytest.raises(UserError, match="no teacher"):
        train(small_network(), Split(*[None] * 4), Recipe(1, distill=0.5), seed=0)
