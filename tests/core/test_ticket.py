"""Four arms from one cut: same channels, same file size, read back from the disk."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.fitted import fitted_network
from rlcompress.core.quant import fake_quantize
from rlcompress.core.schedule import ARMS, EVERY_ARM, Schedule
from rlcompress.core.structure import build_network
from rlcompress.core.ticket import (
    Lesson,
    Plan,
    Task,
    cut_network,
    in_process,
    play_arms,
    recipe_of,
    starts,
    write_network,
)
from rlcompress.core.train import Recipe, logits_of, top1, train

RECIPE = Recipe(epochs=1, batch_size=32, lr=0.02, distill=0.5)


@pytest.fixture(scope="module")
def evaluator(make_evaluator):
    return make_evaluator()


@pytest.fixture(scope="module")
def schedule(uniform, trained):
    """4 bits, but for a float head."""
    plain = uniform(0.6, 4)
    return Schedule(plain.keep, {**plain.bits, "classifier": 32})


@pytest.fixture(scope="module")
def lesson(trained, data):
    train = data.train.sample(256, 0)
    return Lesson.of(train, data.validation, RECIPE, 0, trained.model, "cpu")


@pytest.fixture(scope="module")
def begin(trained, evaluator, schedule):
    before = copy.deepcopy(trained.model.state_dict())
    dense, rewind = trained.model, trained.ref.build(0)
    found = starts(schedule, evaluator, trained.ref, dense, rewind, seed=0)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    return found


@pytest.fixture(scope="module")
def played(tmp_path_factory, trained, schedule, begin, lesson):
    folder = tmp_path_factory.mktemp("arms")
    seen = []
    plan = Plan(folder, schedule, begin, "key")
    arms = play_arms(
        [plan], trained.network, trained.ref, lesson,
        on_epoch=lambda plan, arm, checkpoint: seen.append((arm, checkpoint.epoch)),
    )  # fmt: skip
    found = {arm.name: arm for _, arm in arms}
    assert plan.checkpoint("fresh").exists()
    plan.clear()
    return folder, found, seen


def test_all_arms_are_played_and_only_three_trained(played):
    _, arms, seen = played
    assert {*arms} == {*ARMS}
    assert {arm for arm, _ in seen} == {*ARMS} - {"reconstructed"}
    assert [len(arms[name].curve) for name in ARMS] == [0, 1, 1, 1]


def test_every_file_has_the_promised_size_and_no_other_is_left(played, evaluator, schedule):
    folder, _, _ = played
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    promised = evaluator.costs.cost(schedule).bytes
    assert sizes == {f"{name}.safetensors": promised for name in ARMS}


def test_arms_are_what_the_disk_holds(played, data):
    folder, arms, _ = played
    for name, arm in arms.items():
        again = load_artifact(folder / f"{name}.safetensors")
        images = data.test.images(slice(0, 4))
        with torch.no_grad():
            assert torch.equal(arm.model(images), again(images))


def test_arms_start_from_different_weights(played, data):
    _, arms, _ = played
    accuracy = {name: top1(arm.model, data.validation) for name, arm in arms.items()}
    assert min(accuracy["reconstructed"], accuracy["finetuned"]) > 0.7
    assert max(accuracy["rewind"], accuracy["fresh"]) < accuracy["finetuned"] - 0.2
    one, two = (logits_of(arms[n].model, data.validation) for n in ("rewind", "fresh"))
    assert not torch.allclose(one, two)


def test_what_was_played_is_not_played_again(tmp_path, trained, schedule, begin, lesson, played):
    """An interrupted play goes on arm by arm, and ends with the same files."""
    plan, seen = Plan(tmp_path, schedule, begin, "key"), []

    class InterruptedPlayError(Exception):
        pass

    def stop_at(arm):
        def on_epoch(plan, name, checkpoint):
            if name == arm:
                raise InterruptedPlayError

        return on_epoch

    def play(on_epoch):
        list(play_arms([plan], trained.network, trained.ref, lesson, on_epoch=on_epoch))

    with pytest.raises(InterruptedPlayError):
        play(stop_at("rewind"))
    finished = {arm: plan.checkpoint(arm).stat().st_mtime_ns for arm in ("finetuned", "rewind")}
    play(lambda plan, arm, checkpoint: seen.append(arm))
    assert sorted(seen) == ["finetuned", "fresh", "rewind"]
    for arm, when in finished.items():
        assert plan.checkpoint(arm).stat().st_mtime_ns == when
    for arm in ARMS:
        undisturbed = (played[0] / f"{arm}.safetensors").read_bytes()
        assert plan.folder.joinpath(f"{arm}.safetensors").read_bytes() == undisturbed


def test_retraining_learns_steps_and_leaves_its_start(
    trained, evaluator, schedule, lesson, data, tmp_path
):
    network = trained.network
    start = cut_network(trained.model, network, evaluator.kept(schedule), schedule)
    before = copy.deepcopy(start.model.state_dict())
    task = Task(start, network)
    *_, last = task.train(lesson)
    end, curve = task.result(last), last.curve
    assert {*end.model.state_dict()} == {*before}
    assert all(torch.equal(t, before[n]) for n, t in start.model.state_dict().items())
    assert {*end.scales} == {*start.scales} == {*network.layers} - {"classifier"}
    assert not torch.equal(end.scales["features.0"], start.scales["features.0"])

    modules = dict(end.model.named_modules())
    quantized = copy.deepcopy(end.model)
    for name, scale in end.scales.items():
        weight = fake_quantize(modules[name].weight, scale, schedule.width(name))
        quantized.get_submodule(name).weight.data = weight
    assert top1(quantized, data.validation) == pytest.approx(curve[-1]["validation_accuracy"])
    write_network(tmp_path / "a", end, network, trained.ref, schedule)
    written = top1(load_artifact(tmp_path / "a"), data.validation)
    assert written == pytest.approx(curve[-1]["validation_accuracy"], abs=0.01)


def test_a_file_that_could_not_be_read_back_is_not_written(trained, evaluator, schedule, tmp_path):
    """Who is named as the builder must build this very network."""
    small = cut_network(trained.model, trained.network, evaluator.kept(schedule), schedule)
    other = ModelRef("resnet20", {"width": 0.5}, 10, trained.ref.input_shape)
    with pytest.raises(UserError, match=r"resnet20 .*builds another network.*module 3 is"):
        write_network(tmp_path / "a", small, trained.network, other, schedule)
    assert not list(tmp_path.iterdir())


def small_mobilenet() -> nn.Module:
    """Depthwise layers: nine weights a step."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6()]
    for _ in range(3):
        for conv in (nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)):
            layers += [conv, nn.BatchNorm2d(16), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize("bits", [8, 4])
def test_learned_steps_survive_training(bits):
    data = digits(16)
    torch.manual_seed(0)
    model = small_mobilenet()
    train(model, data.train, Recipe(epochs=3, batch_size=32, lr=0.1), seed=0)
    network = build_network(model, torch.zeros(1, 1, 16, 16))
    schedule = network.uniform(1.0, bits)
    full = {name: np.ones(group.channels, dtype=bool) for name, group in network.groups.items()}
    start = cut_network(model, network, full, schedule)
    task = Task(start, network)
    lesson = Lesson(data.train, data.validation, Recipe(2, 32, lr=0.05), seed=0, device="cpu")
    before = top1(task.prepared(), data.validation)
    (*_, (_, last)) = in_process([(task, None)], lesson)
    for name, scale in task.result(last).scales.items():
        ratio = scale / start.scales[name]
        assert float(ratio.min()) > 0.2, name
        assert float(ratio.max()) < 5, name
    assert last.curve[-1]["validation_accuracy"] > before - 0.02


def test_every_arm_begins_where_it_says(trained, evaluator, schedule):
    network, dense = trained.network, trained.model
    rewind = trained.ref.build(7)
    begin = starts(schedule, evaluator, trained.ref, dense, rewind, seed=0, arms=EVERY_ARM)
    assert tuple(begin) == EVERY_ARM
    kept = evaluator.kept(schedule)

    def same(arm: str, model: nn.Module) -> bool:
        wanted = cut_network(model, network, kept, schedule).model.state_dict()
        found = begin[arm].model.state_dict()
        assert {n: t.shape for n, t in wanted.items()} == {n: t.shape for n, t in found.items()}
        return all(torch.equal(t, wanted[n]) for n, t in found.items())

    sources = {
        "inherited": dense,
        "rewind": rewind,
        "init": trained.ref.build(0),
        "fresh": trained.ref.build(1),
        "scratch": trained.ref.build(1),
    }
    assert all(same(arm, model) for arm, model in sources.items())
    assert not same("shuffled", rewind)
    assert begin["distilled"] is begin["finetuned"] is begin["reconstructed"]


def test_arms_are_trained_as_they_say(trained, schedule, evaluator):
    recipe = Recipe(epochs=2, distill=0.5)
    network = trained.network
    of = {arm: recipe_of(arm, recipe, network, schedule) for arm in EVERY_ARM}
    assert of["reconstructed"].epochs == 0
    assert of["distilled"] == Recipe(epochs=2, distill=1.0)
    macs = [evaluator.costs.cost(s).macs for s in (Schedule(), schedule)]
    assert of["scratch"].epochs == round(2 * macs[0] / macs[1]) > 2
    plain = {"finetuned", "inherited", "rewind", "init", "fresh", "shuffled"}
    assert all(of[arm] == recipe for arm in plain)


def test_answers_alone_teach(trained, evaluator, schedule, data, tmp_path):
    """With every label wrong, only the arm that sees none stays right."""
    few = data.train.sample(256, 0)
    wrong = type(few)(few.raw_NCHW, (few.labels_N + 1) % 10, few.mean, few.std)
    arms = ("distilled", "finetuned")
    lesson = Lesson.of(
        wrong, data.validation, Recipe(4, 32, 0.05), 0, trained.model, "cpu", arms=arms
    )
    begin = starts(
        schedule, evaluator, trained.ref, trained.model, trained.model, seed=0, arms=arms
    )
    played = play_arms([Plan(tmp_path, schedule, begin)], trained.network, trained.ref, lesson)
    accuracy = {arm.name: top1(arm.model, data.validation) for _, arm in played}
    assert accuracy["distilled"] > 0.7
    assert accuracy["finetuned"] < 0.3


def test_what_does_not_belong_together_is_not_written(trained, evaluator, tmp_path):
    """Widths, bits and classes."""
    network, ref = trained.network, trained.ref
    made = network.uniform(0.5, 8)
    small = fitted_network(trained.model, evaluator, made)

    def refused(schedule=made, ref=ref) -> list[str]:
        before = copy.deepcopy(small.model.state_dict())
        with pytest.raises(UserError) as caught:
            write_network(tmp_path / "a", small, network, ref, schedule)
        after = small.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not list(tmp_path.iterdir())
        return str(caught.value).splitlines()

    (bits,) = refused(network.uniform(0.5, 4))
    assert "was made for 8 bits, the schedule has 4 (" in bits
    (bits,) = refused(network.uniform(0.5, 32))
    assert "was made for 8 bits, the schedule has 32 (" in bits
    (widths,) = refused(network.uniform(0.25, 8))
    assert "channels, the schedule leaves (" in widths
    assert len(refused(network.uniform(0.25, 4))) == 2
    (unknown,) = refused(Schedule({"nowhere": 0.5}))
    assert "no group 'nowhere'" in unknown
    (classes,) = refused(ref=replace(ref, num_classes=9))
    assert "9 classes" in classes
    assert "has 9 x " in classes
    write_network(tmp_path / "a", small, network, ref, made)


def test_arguments_that_no_file_holds_are_told():
    for name in ("width", "num_classes"):
        with pytest.raises(UserError, match=rf"cnn: {name} = tensor\(1\): .* JSON serializable"):
            ModelRef("cnn", {name: torch.tensor(1), "depth": 2}, 10, (1, 8, 8))
