"""Compression while the network trains: what is masked is what is cut, and nothing is forgotten."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rlcompress.core.artifact import load_artifact
from rlcompress.core.cost import CostModel
from rlcompress.core.dynamic import DynamicCompressor
from rlcompress.core.errors import UserError
from rlcompress.core.learned import LearnedLosses
from rlcompress.core.observation import ACTION_COLUMNS, OBSERVATION_VERSION, STATE_COLUMNS
from rlcompress.core.policy import DEFAULT, LEARNED, Policy, PolicyShape, save_policy
from rlcompress.core.schedule import Schedule
from rlcompress.core.squeeze import Pace
from tests.core.conftest import KEEPS
from tests.toy import toy_network

PACE = Pace(warmup=9, recovery_steps=2, rounds=2, watch=4)
CHOICES = {"keeps": (1.0, 0.6, 0.3), "bits": (2, 4, 8)}
EXAMPLE = torch.zeros(1, 1, 16, 16)


class Loop:
    """A user's loop: the toy network, SGD, digits in a fixed order."""

    def __init__(self, data, **options) -> None:
        torch.manual_seed(0)
        self.data, self.model = data, toy_network()
        self.compressor = DynamicCompressor(
            self.model,
            EXAMPLE,
            **{"target": 8.0, "pace": PACE, **CHOICES, **options},
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.at = 0

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            index = torch.arange(self.at, self.at + 16) % len(self.data)
            loss = F.cross_entropy(self.model(self.data.images(index)), self.data.labels_N[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.compressor.step(loss)
            self.at += 16

    def spoil(self) -> None:
        """A minibatch with a number that is none, which the optimizer passes over."""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        images = self.data.images(slice(16))
        images[0, 0, 0, 0] = torch.nan
        loss = F.cross_entropy(self.model.train()(images), self.data.labels_N[:16])
        self.optimizer.zero_grad()
        loss.backward()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])
        self.compressor.step(loss)

    def finish(self) -> None:
        self.train(PACE.steps(4))
        assert self.compressor.finished


@pytest.fixture(scope="module")
def digits16():
    from rlcompress.core.data import digits

    return digits(16).train


@pytest.fixture(scope="module")
def finished(digits16) -> Loop:
    loop = Loop(digits16, policy=None)
    loop.finish()
    return loop


def test_the_target_is_met_by_the_file(digits16, tmp_path, close):
    from rlcompress.core.artifact import ModelRef

    loop = Loop(digits16)
    loop.finish()
    ratio, schedule = loop.compressor.ratio, loop.compressor.schedule
    small = loop.compressor.save(
        tmp_path / "w.safetensors", ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
    )
    costs = CostModel(loop.compressor.network)
    size = (tmp_path / "w.safetensors").stat().st_size
    assert size == costs.cost(schedule).bytes
    assert costs.cost(Schedule()).bytes / size == ratio
    assert ratio >= 8.0
    back = load_artifact(tmp_path / "w.safetensors", trust=["tests.toy:toy_network"])
    images = digits16.images(slice(0, 32))
    with torch.no_grad():
        close(small.model.eval()(images), back(images))


@settings(max_examples=4, deadline=None)
@given(choices=st.data(), seed=st.integers(0, 9))
def test_masked_in_training_is_what_is_cut(net, close, choices, seed):
    model = copy.deepcopy(net.model)
    compressor = DynamicCompressor(
        model, net.ref.example(), target=1.0, keeps=KEEPS, bits=(2, 3, 4, 5, 6, 7, 8)
    )
    schedule = choices.draw(net.schedules())
    kept = net.kept(schedule, seed)
    compressor.apply(schedule, kept)
    masked = net.out(model.eval())
    small = compressor.finalize()
    close(masked, net.out(small))
    counts = net.network.counts(schedule)
    for name, layer in net.network.layers.items():
        if layer.group and not net.network.groups[layer.group].protected and not layer.inputs:
            assert dict(small.named_modules())[name].weight.shape[0] == counts[layer.group]


def test_the_model_is_plain_again_and_its_parameters_are_the_optimizer_s(digits16):
    loop = Loop(digits16)
    before = [id(p) for p in loop.model.parameters()]
    loop.train(12)
    names = set(loop.model.state_dict())
    with pytest.warns(UserWarning, match="finalized after 12 of 25 steps"):
        loop.compressor.finalize()
    renamed = {
        f"{layer}.parametrizations.weight.original" for layer in loop.compressor.network.layers
    }
    assert names - set(loop.model.state_dict()) == renamed
    assert [id(p) for p in loop.model.parameters()] == before
    assert sorted(loop.model.state_dict()) == sorted(toy_network().state_dict())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in loop.model.modules())


def test_weights_behind_a_mask_learn_and_come_back(digits16):
    loop = Loop(digits16, target=1.0)
    compressor = loop.compressor
    loop.train(PACE.warmup - 1)
    dense = loop.model[4].weight.detach().clone()
    compressor.apply(Schedule({"0": 0.3}, {}))
    assert float((loop.model[4].weight.detach() == 0).float().mean()) > 0.5
    images, labels = digits16.images(slice(0, 16)), digits16.labels_N[:16]
    loop.optimizer.zero_grad()
    F.cross_entropy(loop.model(images), labels).backward()
    gradient = loop.model[4].parametrizations.weight.original.grad
    gone = torch.from_numpy(~compressor.kept["0"])
    assert float(gradient[:, gone].abs().max()) > 0
    compressor.apply(Schedule({"0": 1.0}, {}))
    assert torch.equal(loop.model[4].weight.detach(), dense)


@pytest.mark.parametrize("stop", [6, 10, 18, 24])
def test_a_restored_run_ends_bit_for_bit_as_an_undisturbed_one(digits16, stop):
    whole, first, second = Loop(digits16), Loop(digits16), Loop(digits16)
    whole.finish()
    first.train(stop)
    state = copy.deepcopy(
        (
            first.model.state_dict(),
            first.optimizer.state_dict(),
            first.compressor.state_dict(),
        )
    )
    second.model.load_state_dict(state[0])
    second.optimizer.load_state_dict(state[1])
    second.compressor.load_state_dict(state[2])
    second.at = first.at
    second.train(PACE.steps(4) - stop)
    assert second.compressor.schedule == whole.compressor.schedule
    a, b = whole.compressor.finalize(), second.compressor.finalize()
    images = digits16.images(slice(0, 32))
    with torch.no_grad():
        assert torch.equal(a(images), b(images))


def test_the_state_is_loaded_with_weights_only(digits16, tmp_path):
    loop = Loop(digits16)
    loop.train(14)
    torch.save(loop.compressor.state_dict(), tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    other = Loop(digits16)
    other.compressor.load_state_dict(state)
    assert other.compressor.schedule == loop.compressor.schedule


@pytest.mark.parametrize("what", ["kept", "clip"])
def test_a_state_of_another_width_changes_nothing(digits16, what):
    first, second = Loop(digits16), Loop(digits16)
    first.train(14)
    state, before = first.compressor.state_dict(), second.compressor.state_dict()
    name, table = next(iter(state["squeezed"][what].items()))
    state["squeezed"][what][name] = table[:-1]
    with pytest.raises(UserError, match="of a network with other layers"):
        second.compressor.load_state_dict(state)
    after = second.compressor.state_dict()
    assert (after["steps"], after["squeezed"]["bits"]) == (0, before["squeezed"]["bits"])


@pytest.mark.parametrize("episodes", [0, 1])
def test_a_policy_that_has_learned_nothing_is_the_prior(digits16, finished, tmp_path, episodes):
    torch.manual_seed(3)
    shape = PolicyShape(len(ACTION_COLUMNS), len(STATE_COLUMNS), 16, OBSERVATION_VERSION)
    save_policy(tmp_path, Policy(shape), {"temperature": 1.0, "episodes": episodes})
    LearnedLosses().save(tmp_path / LEARNED)
    loop = Loop(digits16, policy=tmp_path)
    loop.finish()
    assert loop.compressor.schedule == finished.compressor.schedule


def test_the_policy_that_comes_along_plays_where_none_is_named(digits16):
    """Its prior goes by what it has learned of other networks."""
    seen = {}
    for name, options in {"none": {"policy": None}, "named": {"policy": DEFAULT}, "": {}}.items():
        loop = Loop(digits16, **options)
        loop.train(PACE.warmup - 1)
        loop.compressor.read(torch.tensor(1.0))
        seen[name] = loop.compressor.observation()["actions"]
    assert np.array_equal(seen[""], seen["named"])
    assert not np.array_equal(seen[""], seen["none"])


def test_channels_that_carry_the_label_survive(digits16):
    """Channels of the first layer that are silent from the start go first."""
    loop = Loop(digits16, target=2.0, pace=replace(PACE, warmup=40, watch=15))
    silent = [1, 4, 6]
    with torch.no_grad():
        loop.model[1].weight[silent] = 0.0
        loop.model[1].bias[silent] = -1.0
    for parameter in loop.model[1].parameters():
        parameter.requires_grad_(False)
    loop.train(38)
    loop.compressor.apply(Schedule({"0": 0.6}, {}))
    assert not loop.compressor.kept["0"][silent].any()


def test_observations_tell_of_the_training(digits16):
    loop = Loop(digits16)
    compressor = loop.compressor
    seen = []
    while not compressor.finished:
        loop.model.train()
        index = torch.arange(loop.at, loop.at + 16) % len(digits16)
        loss = F.cross_entropy(loop.model(digits16.images(index)), digits16.labels_N[index])
        loop.optimizer.zero_grad()
        loss.backward()
        loop.optimizer.step()
        compressor.read(loss)
        loop.at += 16
        if compressor.due:
            observation = compressor.observation()
            seen.append(dict(zip(STATE_COLUMNS, observation["state"], strict=True)))
            compressor.decide(int(np.flatnonzero(observation["mask"])[-1]))
    assert len(seen) == 8
    assert seen[0]["loss"] == seen[0]["gradient"] == 0.0
    assert seen[0]["bits_now"] == 2.0
    assert seen[4]["bits_now"] < 2.0
    assert [s["round"] for s in seen] == [0.0] * 4 + [0.5] * 4
    trained = [s["trained"] for s in seen]
    assert trained == sorted(trained)
    assert seen[-1]["loss"] != 0.0


class ReadElsewhere(nn.Module):
    """Its head's weight is read, its head is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.conv(x).mean((2, 3)), self.head.weight, self.head.bias)


def test_mistakes_are_said_in_a_line(digits16, tmp_path):
    with pytest.raises(UserError, match="target = 999: from 1 to"):
        Loop(digits16, target=999.0)
    with pytest.raises(UserError, match=r"1\.0 must be among them"):
        Loop(digits16, keeps=(0.5, 0.3), target=4.0)
    with pytest.raises(UserError, match=r"warmup = 3: must be at least 9\nrounds = 0"):
        Pace(warmup=3, rounds=0, watch=4)
    with pytest.raises(UserError, match="read by other code than its module"):
        DynamicCompressor(ReadElsewhere(), EXAMPLE, target=1.2)
    with pytest.raises(UserError, match="policy: it is of shape"):
        Loop(digits16, policy=Policy(PolicyShape(3, 3, 4, OBSERVATION_VERSION)))
    with pytest.raises(UserError, match="no intact policy"):
        Loop(digits16, policy=tmp_path)
    loop = Loop(digits16)
    with pytest.raises(ValueError, match="no decision is due after 0 steps"):
        loop.compressor.decide(0)
    loop.train(PACE.warmup - 1)
    state = loop.compressor.state_dict()
    loop.optimizer.zero_grad()
    with pytest.raises(UserError, match="no weight has a gradient"):
        loop.compressor.step(1.0)
    with pytest.raises(UserError, match=r"pace = <class '.*Pace'>: must be a Pace"):
        Loop(digits16, pace=Pace)
    with pytest.raises(UserError, match=r"target is 8.0, this one's is 6.0"):
        Loop(digits16, target=6.0).compressor.load_state_dict(state)
    for wrong in (loop.model.state_dict(), {}, None):
        with pytest.raises(UserError, match="state: it is no DynamicCompressor's"):
            loop.compressor.load_state_dict(wrong)
    with pytest.raises(UserError, match="no group 'nose'"):
        loop.compressor.apply(Schedule({"nose": 0.5}, {}))


def test_a_training_that_was_too_short_is_told_with_what_is_missing(digits16, tmp_path):
    from rlcompress.core.artifact import ModelRef

    loop = Loop(digits16)
    assert loop.compressor.steps_needed == PACE.steps(4) == 25
    loop.train(11)
    ratio = loop.compressor.ratio
    assert ratio < 8.0
    said = rf"after 11 of 25 steps: {ratio:.1f}x fewer bytes, the target is 8x; 14 more steps"
    with pytest.warns(UserWarning, match=said) as told:
        loop.compressor.save(
            tmp_path / "w.safetensors", ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
        )
    assert [w.filename for w in told] == [__file__]


def test_a_loop_of_the_steps_needed_reaches_the_target_without_a_word(digits16):
    loop = Loop(digits16)
    loop.train(loop.compressor.steps_needed)
    assert loop.compressor.finished
    assert loop.compressor.ratio >= 8.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.compressor.finalize()


def test_gradients_are_missed_at_the_first_step(digits16):
    loop = Loop(digits16)
    F.cross_entropy(loop.model(digits16.images(slice(0, 16))), digits16.labels_N[:16]).backward()
    loop.optimizer.zero_grad()
    with pytest.raises(UserError, match="no weight has a gradient: call step before"):
        loop.compressor.step(1.0)
    assert loop.compressor.steps == 0


def test_finalized_once_it_stays_as_it_is(digits16, tmp_path):
    from rlcompress.core.artifact import ModelRef

    ref = ModelRef("tests.toy:toy_network", {}, 10, (1, 16, 16))
    first, second = Loop(digits16), Loop(digits16)
    state = copy.deepcopy(first.compressor.state_dict())
    for loop in (first, second):
        loop.finish()
    first.compressor.save(tmp_path / "first", ref)
    small = second.compressor.finalize()
    before = copy.deepcopy(small.state_dict())
    second.compressor.save(tmp_path / "second", ref)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert second.compressor.finalize() is small
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    compressor = second.compressor
    for verb, call in {
        "step": lambda: compressor.step(1.0),
        "decide": lambda: compressor.decide(0),
        "apply": lambda: compressor.apply(Schedule()),
        "load_state_dict": lambda: compressor.load_state_dict(state),
    }.items():
        with pytest.raises(UserError, match=f"{verb}: finalize or save has made the model plain"):
            call()


def test_a_minibatch_that_is_no_number_when_samples_are_taken_is_passed_over(digits16):
    """As with mixed precision: its gradients overflow, the optimizer's step is left out."""
    own = [*Loop(digits16).compressor.network.layers]
    for bad in range(PACE.warmup - PACE.watch, PACE.warmup - PACE.watch + 3):
        loop = Loop(digits16)
        loop.train(bad)
        loop.spoil()
        loop.train(PACE.warmup - bad)
        estimates = loop.compressor.signals.estimates()
        for table in (estimates.prune, estimates.prune_solved, estimates.quantize):
            assert all(np.isfinite(costs).all() for costs in table.values())
            assert all(costs.max() > 0 for name, costs in table.items() if name in own)
