"""The ladder: a schedule for every size that is possible at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcompress.core.cost import CostModel
from rlcompress.core.prior import Losses, Prior
from rlcompress.core.schedule import Schedule


@pytest.fixture(scope="module", params=[True, False], ids=["refitted", "plain"])
def prior(request, net, net_estimates) -> Prior:
    losses = Losses.of(net.network, net_estimates, refitted=request.param)
    return Prior(net.network, CostModel(net.network), losses)


def test_a_rungs_bytes_are_its_schedules(prior):
    for keep_G, bits_L, size in zip(prior.keep_RG, prior.bits_RL, prior.bytes_R, strict=True):
        schedule = Schedule(
            dict(zip(prior.network.groups, prior.keeps[keep_G].tolist(), strict=True)),
            dict(zip(prior.network.layers, prior.bits[bits_L].tolist(), strict=True)),
        )
        assert prior.costs.cost(schedule).bytes == size


def test_dearer_bytes_smaller_networks(prior):
    assert (np.diff(prior.price_R) < 0).all()
    assert prior.bytes_R[0] == prior.smallest_bytes() == prior.bytes_R.min()
    assert (np.diff(prior.bytes_R) >= 0).mean() > 0.9
    assert prior.bytes_R[-1] > 1.5 * prior.bytes_R[0]


def test_no_schedule_is_smaller_than_the_smallest(prior):
    least = Schedule(
        dict.fromkeys(prior.network.groups, 0.1), dict.fromkeys(prior.network.layers, 2)
    )
    assert prior.smallest_bytes() == prior.costs.cost(least).bytes


@given(share=st.floats(0, 1, allow_subnormal=False))
@settings(max_examples=15)
def test_every_possible_size_is_met(prior, share):
    smallest, dense = prior.smallest_bytes(), prior.costs.cost(Schedule()).bytes
    max_bytes = smallest + share * (dense - smallest)
    schedule = prior.schedule(max_bytes)
    prior.network.validate(schedule)
    assert prior.costs.cost(schedule).bytes <= max_bytes


def loss_of(prior: Prior, schedule: Schedule) -> float:
    keeps, bits = prior.keeps.tolist(), prior.bits.tolist()
    pruned = sum(
        prior.losses.prune_GK[i, keeps.index(schedule.ratio(name))]
        for i, name in enumerate(prior.network.groups)
    )
    return pruned + sum(
        prior.losses.quantize_LB[i, bits.index(schedule.width(name))]
        for i, name in enumerate(prior.network.layers)
    )


@given(share=st.floats(0.02, 0.5, allow_subnormal=False))
@settings(max_examples=8)
def test_no_single_change_that_fits_would_save_loss(prior, share):
    max_bytes = prior.smallest_bytes() + share * (prior.bytes_R.max() - prior.smallest_bytes())
    found = prior.schedule(max_bytes)
    size, loss = prior.costs.cost(found).bytes, loss_of(prior, found)
    others = [
        Schedule({**found.keep, g: float(k)}, found.bits) for g in found.keep for k in prior.keeps
    ]
    others += [
        Schedule(found.keep, {**found.bits, n: int(b)}) for n in found.bits for b in prior.bits
    ]
    for other in others:
        if size < prior.costs.cost(other).bytes <= max_bytes:
            assert loss_of(prior, other) >= loss - 1e-12


def test_more_room_never_costs_more_loss(prior):
    rooms = np.geomspace(prior.smallest_bytes(), prior.bytes_R.max(), 40)
    losses = prior.loss_R[prior.rungs(prior.bytes_R[None], rooms)]
    assert (np.diff(losses) <= 0).all()


def test_an_impossible_size_gets_the_smallest(prior):
    assert prior.costs.cost(prior.schedule(1)).bytes == prior.smallest_bytes()


def test_estimates_beat_the_same_choice_everywhere(trained, estimates, make_evaluator, uniform):
    """The prior's schedules, at the sizes of uniform ones, are closer to the dense network."""
    evaluator = make_evaluator()
    losses = Losses.of(trained.network, estimates, refitted=True)
    prior = Prior(trained.network, evaluator.costs, losses)
    decades = []
    for keep, bits in itertools.product((0.8, 0.6, 0.4), (3, 4, 6)):
        plain = evaluator.evaluate(uniform(keep, bits))
        found = evaluator.evaluate(prior.schedule(plain.bytes))
        assert found.bytes <= plain.bytes
        decades.append(np.log10(found.kl / plain.kl))
    assert np.mean(decades) < -0.1


def test_losses_never_fall_when_more_is_cut(prior):
    prune, quantize = prior.losses.prune_GK, prior.losses.quantize_LB
    assert (np.diff(prune, axis=1) <= 0).all()
    assert (np.diff(quantize, axis=1) <= 0).all()
    assert (prune[:, -1] == 0).all()


@pytest.mark.parametrize("net", ["vgg19"], indirect=True)
def test_a_shaken_prior_answers_otherwise_and_within_the_same_bytes(net, net_estimates):
    costs = CostModel(net.network)
    plain = Prior(net.network, costs, Losses.of(net.network, net_estimates, refitted=True))
    dense = costs.cost(Schedule()).bytes
    still = plain.shaken(np.random.default_rng(0), 0.0)
    found = set()
    for ratio in (10, 20, 40):
        assert still.schedule(dense / ratio) == plain.schedule(dense / ratio)
        for seed in range(3):
            shaken = plain.shaken(np.random.default_rng(seed), 0.5, 24)
            again = plain.shaken(np.random.default_rng(seed), 0.5, 24)
            schedule = shaken.schedule(dense / ratio)
            assert again.schedule(dense / ratio) == schedule
            assert costs.cost(schedule).bytes <= dense / ratio
            found.add(schedule)
    assert len(found) > 6
