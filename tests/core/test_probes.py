"""Probes and the tables that they correct."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcompress.core.prior import Losses
from rlcompress.core.probes import Probe, halving, measured_losses, probes
from rlcompress.core.schedule import Measurement, Schedule

KEEPS, BITS = (0.3, 1.0, 0.6, 0.1), (8, 2, 4)


def measurement(kl: float) -> Measurement:
    return Measurement(0.9, 0.1, kl, 1, 1, 1, 1, 1.0)


def rising(choices, values) -> np.ndarray:
    """A row of losses by choice: the less of it, the more loss."""
    row = np.empty(len(choices))
    row[np.argsort(-np.array(choices))] = np.sort(values)
    return row


nats = st.floats(0, 20, allow_subnormal=False)


@st.composite
def cases(draw):
    """Estimates of two groups (and a protected one) and two layers, and a few measured entries."""
    prune = [rising(KEEPS, [0.0, *draw(st.lists(nats, min_size=3, max_size=3))]) for _ in range(2)]
    prune.append(np.array([np.inf, 0.0, np.inf, np.inf]))
    quantize = [rising(BITS, draw(st.lists(nats, min_size=3, max_size=3))) for _ in range(2)]
    losses = Losses(KEEPS, BITS, np.array(prune), np.array(quantize))
    entries = [("prune", g, k) for g in range(2) for k in (0, 2, 3)]
    entries += [("quantize", layer, b) for layer in range(2) for b in range(3)]
    chosen = draw(st.lists(st.sampled_from(entries), unique=True))
    kls = draw(st.lists(nats, min_size=len(chosen), max_size=len(chosen)))
    return losses, [Probe(Schedule(), t, r, (c,)) for t, r, c in chosen], kls


def rows(losses: Losses, table: str):
    choices, values = (
        (losses.keeps, losses.prune_GK) if table == "prune" else (losses.bits, losses.quantize_LB)
    )
    order = np.argsort(-np.array(choices))
    return order, values


@given(cases())
@settings(max_examples=200)
def test_what_was_measured_stands_and_less_never_costs_less(case):
    losses, asked, kls = case
    corrected = measured_losses(losses, asked, kls)
    for table in ("prune", "quantize"):
        order, values = rows(corrected, table)
        with np.errstate(invalid="ignore"):
            steps = np.diff(values[:, order])
        assert not (steps < 0).any()
        rank = np.argsort(order)
        for probe, kl in zip(asked, kls, strict=True):
            if probe.table != table:
                continue
            milder = [
                other
                for p, other in zip(asked, kls, strict=True)
                if (p.table, p.row) == (table, probe.row)
                and rank[p.columns[0]] <= rank[probe.columns[0]]
            ]
            assert values[probe.row, probe.columns[0]] == max(milder) >= kl
    assert (corrected.prune_GK[:2, KEEPS.index(1.0)] == 0).all()
    np.testing.assert_array_equal(corrected.prune_GK[2], losses.prune_GK[2])


def test_what_was_not_measured_is_scaled_like_its_row_or_else_like_the_table():
    prune = np.array([rising(KEEPS, [0, 1, 2, 4]), rising(KEEPS, [0, 1, 2, 4])])
    losses = Losses(KEEPS, BITS, prune, np.array([rising(BITS, [0, 1, 2])]))
    middle = Probe(Schedule(), "prune", 0, (KEEPS.index(0.3),))
    corrected = measured_losses(losses, [middle], [6.0])
    np.testing.assert_allclose(corrected.prune_GK, 3 * prune)
    np.testing.assert_array_equal(corrected.quantize_LB, losses.quantize_LB)
    mild = Probe(Schedule(), "prune", 0, (KEEPS.index(0.6),))
    harsh = Probe(Schedule(), "prune", 0, (KEEPS.index(0.1),))
    corrected = measured_losses(losses, [mild, harsh], [1.0, 16.0])
    np.testing.assert_allclose(corrected.prune_GK[0], rising(KEEPS, [0, 1, 2 * 2, 16]))
    np.testing.assert_allclose(corrected.prune_GK[1], 2 * prune[1])


@given(st.integers(0, 70))
def test_halving_is_an_order_whose_first_ones_lie_evenly(count):
    order = halving(count)
    assert sorted(order) == list(range(count))
    for n in range(1, count + 1):
        gaps = np.diff([-1, *sorted(order[:n]), count])
        assert gaps.max() <= 2 * -(-(count + 1) // (n + 1)) + 1


def test_probes_are_every_choice_alone_and_start_with_one_of_each(net, net_estimates):
    network, estimates = net.network, net_estimates
    asked = probes(network, estimates)
    free = [g for g in network.groups.values() if not g.protected]
    for probe in asked:
        network.validate(probe.schedule)
        assert len(probe.schedule.keep) + len(probe.schedule.bits) == 1
        for name, ratio in probe.schedule.keep.items():
            group = network.groups[name]
            assert group.count(ratio) < group.channels
            assert {group.count(estimates.keeps[k]) for k in probe.columns} == {group.count(ratio)}
    assert len({probe.schedule for probe in asked}) == len(asked)
    each = len(free) + len(network.layers)
    first = asked[:each]
    assert {name for p in first for name in p.schedule.keep} == {g.name for g in free}
    assert {name for p in first for name in p.schedule.bits} == set(network.layers)


@pytest.mark.parametrize("name", ["none", "bn", "reconstruct"])
def test_another_recovery_measures_what_an_evaluator_made_for_it_does(
    make_evaluator, uniform, name
):
    schedule = uniform(0.4, 3)
    other = make_evaluator(recovery="bn").with_recovery(name)
    made = make_evaluator(recovery=name)
    assert other.evaluate(schedule) == made.evaluate(schedule)
    with pytest.raises(ValueError, match="allowed: none, bn, reconstruct"):
        made.with_recovery("luck")
