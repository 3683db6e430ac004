"""Sums over positions against the positions themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcompress.core import moments
from rlcompress.core.moments import HELD_OUT, NARROW, Rows, Sample, Sums, gram
from rlcompress.core.reconstruct import refit, refit_sample


def drawn(seed: int, count: int, groups: int, inputs: int, outputs: int):
    """Patches like a ReLU's, and outputs."""
    generator = torch.Generator().manual_seed(seed)
    patch_PGD = torch.randn(count, groups, inputs, generator=generator).relu()
    return patch_PGD, torch.randn(count, groups * outputs, generator=generator)


@given(
    count=st.integers(20, 60),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_sums_say_what_rows_say(count, groups, inputs, outputs, seed):
    patch_PGD, targets_PO = drawn(seed, count, groups, inputs, outputs)
    rows = Rows(
        patch_PGD.permute(1, 0, 2), targets_PO.view(count, groups, outputs).permute(1, 0, 2)
    )
    sums = rows.sums()
    w_GDo = torch.randn(groups, inputs, outputs, generator=torch.Generator().manual_seed(seed))
    for said, wanted in (
        (sums.error(w_GDo), rows.error(w_GDo)),
        (sums.energy(w_GDo), rows.energy(w_GDo)),
        (sums.energies(), rows.energies()),
    ):
        assert torch.allclose(said, wanted, rtol=1e-3, atol=1e-3)
    ridge_G = torch.full((groups,), 0.1)
    assert torch.allclose(
        sums.change(w_GDo, ridge_G), rows.change(w_GDo, ridge_G), rtol=1e-2, atol=1e-3
    )


@given(
    count=st.sampled_from([12, 400]),  # fewer positions than inputs, and more
    kept=st.lists(st.integers(0, 19), min_size=1, unique=True),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_some_inputs_are_refitted_from_the_sums_of_all(count, kept, seed):
    patch_PGD, targets_PO = drawn(seed, count, 1, 20, 4)
    at_D = torch.tensor(sorted(kept))
    weight = torch.randn(4, len(kept), generator=torch.Generator().manual_seed(seed))
    whole = Sample.of(patch_PGD, targets_PO)
    assert isinstance(whole.whole, Sums) == (count > 20)
    ours = refit_sample(whole.part(at_D), weight, (0.1,)).weight
    assert torch.allclose(
        ours, refit(patch_PGD[:, :, at_D], targets_PO, weight, (0.1,)).weight, atol=2e-3
    )


@pytest.mark.parametrize("inputs", [NARROW + 1, NARROW + 16, 4 * NARROW])
def test_inputs_in_bfloat16_give_the_sums_of_float32(inputs, monkeypatch):
    """Their products are exact, so nothing is lost by the faster hardware, nor without it."""
    monkeypatch.setattr(moments, "multiplies_bfloat16", lambda device: True)
    patch_PGD, targets_PO = drawn(0, 1000, 1, inputs, 8)
    few_bits = patch_PGD.bfloat16()
    for centred in (True, False):
        ours = Sample.of(few_bits, targets_PO, centred=centred)
        wanted = Sample.of(few_bits.double().float(), targets_PO, centred=centred)
        for one, other in ((ours.known, wanted.known), (ours.held, wanted.held)):
            assert torch.allclose(one.gram_GDD, other.gram_GDD, rtol=1e-4, atol=2e-3)
            assert torch.allclose(one.cross_GDo, other.cross_GDo, rtol=1e-3, atol=5e-3)
    # And other products stay what they were.
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-4)


@pytest.mark.parametrize("fan", [3, NARROW, NARROW + 1, 3 * NARROW + 5])
def test_gram_matrices_by_halves(fan):
    x_GPD = torch.randn(2, 50, fan)
    assert torch.allclose(gram(x_GPD), x_GPD.transpose(1, 2) @ x_GPD, atol=1e-3)


def test_a_quarter_is_held_out_and_the_whole_is_both():
    patch_PGD, targets_PO = drawn(0, 100, 1, 5, 2)
    sample = Sample.of(patch_PGD, targets_PO)
    centred = patch_PGD[:, 0] - patch_PGD[:, 0].mean(0)
    known = 100 - 100 // HELD_OUT
    for sums, at in ((sample.known, slice(known)), (sample.held, slice(known, None))):
        assert torch.allclose(sums.gram_GDD[0], centred[at].T @ centred[at], atol=1e-3)
    assert torch.allclose(sample.whole.gram_GDD[0], centred.T @ centred, atol=1e-3)
    assert Sample.of(patch_PGD[:3], targets_PO[:3]).held is None


def test_sums_of_inputs_far_from_zero_keep_their_deviations(monkeypatch):
    """Through the products of bfloat16, where there are such, and without them."""
    torch.manual_seed(0)
    x_PD = (100 + torch.randn(2000, NARROW + 2)).bfloat16()
    y_PO = torch.randn(2000, 3)
    monkeypatch.setattr(moments, "multiplies_bfloat16", lambda device: True)
    found = Sample.of(x_PD[:, None], y_PO).known
    assert isinstance(found, Sums)
    deviation = (x_PD.double() - x_PD.double().mean(0))[:1500]
    wanted = deviation.T @ deviation
    assert (found.gram_GDD[0] - wanted).abs().max() < 1e-3 * wanted.diagonal().mean()
