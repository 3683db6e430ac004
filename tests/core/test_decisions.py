"""Compression while the network trains: which decisions are taken, when, and what they count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlcompress.core.dynamic import DynamicCompressor
from rlcompress.core.schedule import Schedule
from rlcompress.core.squeeze import Pace
from tests.core.test_dynamic import EXAMPLE, PACE, Loop
from tests.core.test_dynamic import digits16 as digits16  # the fixture
from tests.toy import toy_network


def test_an_illegal_action_is_refused_and_changes_nothing(digits16):
    loop = Loop(digits16, policy=None)
    loop.train(PACE.warmup - 1)
    loop.compressor.steps += 1  # the next decision is due, and not taken
    compressor = loop.compressor
    mask_A = compressor.observation()["mask"]
    illegal = [-1, len(mask_A), 10**6, *np.flatnonzero(mask_A == 0)[:1]]
    before = compressor.schedule
    for action in illegal:
        with pytest.raises(ValueError, match=f"action {action} is illegal"):
            compressor.decide(int(action))
    assert (compressor.schedule, compressor.decisions) == (before, 0)


@pytest.mark.parametrize("steps", [12, 19, 21])
def test_what_is_applied_on_the_way_counts(digits16, steps):
    """The decisions that are left make up for it."""
    loop = Loop(digits16, policy=None, target=5.0)
    loop.train(steps)
    assert not loop.compressor.finished
    loop.compressor.apply(loop.compressor.network.uniform(0.6, 4))
    loop.train(PACE.steps(4) - steps)
    assert loop.compressor.finished
    assert loop.compressor.ratio >= 5.0


def test_what_was_applied_and_is_too_large_is_told(digits16):
    loop = Loop(digits16, policy=None)
    loop.finish()
    loop.compressor.apply(Schedule())
    with pytest.warns(UserWarning, match="a schedule that was applied is larger"):
        loop.compressor.finalize()


@pytest.mark.parametrize("recovery_steps", [1, 2, 5])
def test_every_pass_is_prepared(digits16, recovery_steps, monkeypatch):
    """Also where a pass over the layers is shorter than what it is prepared on."""
    pace = Pace(warmup=17, recovery_steps=recovery_steps, rounds=3, watch=8)
    loop = Loop(digits16, policy=None, pace=pace)
    settled: list[int] = []
    settle = loop.compressor.signals.settle
    monkeypatch.setattr(
        loop.compressor.signals,
        "settle",
        lambda: (settled.append(loop.compressor.round), settle()),
    )
    loop.train(pace.steps(4))
    assert settled == [0, 0, 1]


def test_a_compressor_draws_no_random_numbers(digits16):
    model = toy_network()
    before = torch.get_rng_state()
    DynamicCompressor(model, EXAMPLE, target=8.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_below_zero_are_seen(digits16):
    loop = Loop(digits16, policy=None)
    loop.train(PACE.warmup - 1)
    loop.compressor.steps += 1
    loop.compressor.observation()
    for name in ("loss/fast", "loss/slow"):
        loop.compressor.signals.average.values[name] = torch.tensor(-0.5)
    assert np.isfinite(loop.compressor.observation()["state"]).all()
