"""Losses that are learned from whole schedules of many networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlcompress.core.errors import UserError
from rlcompress.core.learned import (
    COLUMNS,
    LearnedLosses,
    Lessons,
    agreement,
    columns_of,
    fit,
    load_learned,
)
from rlcompress.core.prior import Losses
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.core.tensors import load_tensors, save_tensors
from tests.toy import toy_bundle

DEPTH = COLUMNS.index("depth")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [toy_bundle(epochs=1, seed=seed).problem() for seed in range(3)]


def taught(problem: Problem, seed: int, count: int = 60) -> list[Record]:
    """Random schedules whose KL is the sum of the estimates, each times a factor that grows with
    the depth: the truth that is to be found."""
    rng, costs = np.random.default_rng(seed), problem.evaluator.costs
    estimates = problem.evaluator.estimates
    losses = Losses.of(problem.network, estimates, refitted=True)
    of_groups, of_layers = columns_of(problem.network, costs, estimates)
    prune_GK = np.where(np.isfinite(losses.prune_GK), losses.prune_GK, 0)
    prune_GK = prune_GK * np.exp(3 * of_groups[..., DEPTH])
    quantize_LB = losses.quantize_LB * np.exp(3 * of_layers[..., DEPTH])
    whole, records = problem.dense, []
    for i in range(count):
        keep = [
            problem.keeps.index(1.0) if g.protected else int(rng.integers(len(problem.keeps)))
            for g in problem.network.groups.values()
        ]
        bits = rng.integers(len(problem.bits), size=len(problem.network.layers))
        schedule = Schedule(
            {
                g.name: problem.keeps[k]
                for g, k in zip(problem.network.groups.values(), keep, strict=True)
                if not g.protected
            },
            {n: problem.bits[b] for n, b in zip(problem.network.layers, bits, strict=True)},
        )
        kl = prune_GK[np.arange(len(keep)), keep].sum()
        kl += quantize_LB[np.arange(len(bits)), bits].sum()
        size = costs.cost(schedule).bytes
        measurement = dataclasses.replace(whole, kl=float(kl), bytes=size)
        records.append(Record(schedule, measurement, "sample", seed, i + 1))
    return records


def lessons(problem: Problem, seed: int) -> Lessons:
    evaluator = problem.evaluator
    records = taught(problem, seed)
    return Lessons.of(problem.network, evaluator.costs, evaluator.estimates, records)


def test_untrained_it_leaves_the_estimates_as_they_are(problems):
    evaluator = problems[0].evaluator
    known = (problems[0].network, evaluator.costs, evaluator.estimates)
    losses = Losses.of(known[0], known[2], refitted=True)
    found = LearnedLosses().corrected(*known)
    np.testing.assert_allclose(found.prune_GK, losses.prune_GK)
    np.testing.assert_allclose(found.quantize_LB, losses.quantize_LB)


def test_it_finds_factors_that_networks_share_and_carries_them_to_another(problems):
    first, second, unseen = (lessons(problem, i) for i, problem in enumerate(problems))
    learned = fit([first, second], epochs=200, penalty=0.01, members=1)
    assert agreement(first, learned) > 0.98
    assert agreement(unseen, learned) > max(0.95, agreement(unseen, None))


def test_less_kept_and_fewer_bits_never_cost_less(problems):
    learned = fit([lessons(problems[0], 0)], epochs=20, members=1)
    evaluator = problems[0].evaluator
    found = learned.corrected(problems[0].network, evaluator.costs, evaluator.estimates)
    by_keep = found.prune_GK[:, np.argsort(found.keeps)]
    by_bits = found.quantize_LB[:, np.argsort(found.bits)]
    finite = by_keep[np.isfinite(by_keep).all(1)]
    assert (np.diff(finite, axis=1) <= 0).all()
    assert (np.diff(by_bits, axis=1) <= 0).all()


def test_the_seed_decides(problems):
    known = [lessons(problems[0], 0)]
    a, b, c = (fit(known, epochs=5, members=1, seed=s).state_dict() for s in (0, 0, 1))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_it_is_small_and_the_same_from_a_file(problems, tmp_path):
    learned = fit([lessons(problems[0], 0)], epochs=5)
    path = tmp_path / "losses.safetensors"
    learned.save(path)
    assert path.stat().st_size < 2**20
    evaluator = problems[0].evaluator
    known = (problems[0].network, evaluator.costs, evaluator.estimates)
    again = load_learned(path).corrected(*known)
    np.testing.assert_array_equal(again.prune_GK, learned.corrected(*known).prune_GK)


def test_another_version_and_damage_are_told_in_a_line(tmp_path):
    path = tmp_path / "losses.safetensors"
    LearnedLosses().save(path)
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, **{**about, "version": 99})
    with pytest.raises(UserError, match=r"version 99, this rlcompress reads version 2; train"):
        load_learned(path)
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match="no intact learned losses"):
        load_learned(path)
    with pytest.raises(UserError, match="no intact learned losses"):
        load_learned(tmp_path / "missing")
