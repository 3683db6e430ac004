"""Numbers as bytes: packing what was unpacked changes nothing, and the error is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcompress.core.codec import (
    HIGHEST,
    LOWEST,
    pack_biases,
    pack_codes,
    pack_scales,
    reach,
    unpack_biases,
    unpack_codes,
    unpack_scales,
)
from rlcompress.core.errors import UserError
from rlcompress.core.quant import max_code

TINY = float(np.finfo(np.float32).tiny)


@given(bits=st.integers(1, 8), count=st.integers(0, 100), seed=st.integers(0, 2**16))
def test_codes_survive_packing_in_no_more_bytes_than_they_need(bits, count, seed):
    top, step = max_code(bits), 2 if bits <= 3 else 1
    codes = np.random.default_rng(seed).choice(np.arange(-top, top + 1, step), count)
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack_codes(packed, count, bits), codes)


def spread(octaves: float):
    """Scales, some zero, the rest spread over so many octaves somewhere in float32's range."""
    exponents = st.lists(st.floats(0, octaves, allow_subnormal=False), min_size=1, max_size=40)
    return st.builds(
        lambda es, low, zeros: np.array(
            [0.0] * zeros + [2.0 ** (low + e) for e in es], dtype=np.float64
        ),
        exponents,
        st.floats(-120, 120 - octaves, allow_subnormal=False),
        st.integers(0, 3),
    )


@given(values=st.floats(0, 200, allow_subnormal=False).flatmap(spread))
def test_packed_scales_survive_to_the_byte(values):
    packed = pack_scales(values, "x")
    once = unpack_scales(*packed)
    assert len(packed[0]) == len(values)
    assert once.dtype == np.float32
    assert np.isfinite(once).all()
    assert np.array_equal(unpack_scales(*pack_scales(once, "x")), once)
    # Batch norms hand them back with the noise of float32.
    noisy = once * (1 + 1e-6 * np.cos(np.arange(len(once))))
    assert np.array_equal(unpack_scales(*pack_scales(noisy, "x")), once)


@pytest.mark.parametrize(
    ("octaves", "error"), [(0.9, 0.0014), (1.9, 0.0028), (3.9, 0.0055), (7.9, 0.011)]
)
@given(data=st.data())
def test_the_narrower_the_scales_the_finer_they_are_kept(octaves, error, data):
    values = data.draw(spread(octaves))
    positive = values > 0
    back = unpack_scales(*pack_scales(values, "x"))
    assert not back[~positive].any()
    assert np.abs(back[positive] / values[positive] - 1).max() < error


@given(eighths=st.lists(st.integers(0, 160), max_size=40), zeros=st.integers(0, 3))
def test_below_what_is_in_reach_most_scales_keep_their_byte(eighths, zeros):
    # Eighths of an octave: none lies on the edge of the span, 63.5 of them.
    values = np.array([0.0] * zeros + [2.0 ** (n / 8) for n in eighths])
    positive = values[values > 0]
    most = reach(values)

    def kept(top: float) -> int:
        back = unpack_scales(*pack_scales(np.minimum(positive, top), "x"))
        return int((np.abs(back / positive - 1) < 0.012).sum())

    if len(positive):
        assert all(kept(most) >= kept(top) for top in positive)
    else:
        assert most == float("inf")


def test_scales_out_of_reach_go_to_the_nearer_of_bottom_and_zero():
    values = np.array([1.0, 2.0**-6, 2.0**-8.5, 2.0**-9.5, 1e-30])
    back = unpack_scales(*pack_scales(values, "x"))
    assert back[0] == 1
    assert back[1] == 2.0**-6
    assert back[2] == pytest.approx(2.0 ** (-254 / 32))
    assert not back[3:].any()


@given(
    values=st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1, max_size=40),
    scale=st.floats(-60, 0, allow_subnormal=False),
)
def test_packed_biases_survive_and_are_within_half_a_step(values, scale):
    biases = np.array(values) * 2.0**scale
    data, step = pack_biases(biases, "x")
    once = unpack_biases(data, step)
    largest = float(np.abs(biases).max())
    assert len(data) == len(values)
    assert np.abs(once - biases).max() <= max(0.504 * largest / 127, TINY)
    again = unpack_biases(*pack_biases(once * (1 + 1e-6 * np.cos(np.arange(len(once)))), "x"))
    assert np.array_equal(again, once)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1e-44], [3e38, 1.0]])
def test_the_ends_of_the_range(values):
    array = np.array(values)
    for back in (unpack_scales(*pack_scales(array, "x")), unpack_biases(*pack_biases(array, "x"))):
        assert back.shape == array.shape
        assert np.isfinite(back).all()


@pytest.mark.parametrize("pack", [pack_scales, pack_biases])
def test_what_is_not_finite_is_refused_by_name(pack):
    with pytest.raises(UserError, match=r"conv1.*not finite"):
        pack(np.array([1.0, np.inf]), "conv1")


@pytest.mark.parametrize("level", [LOWEST - 1, HIGHEST + 1])
def test_levels_that_no_file_has_are_refused(level):
    with pytest.raises(ValueError, match="level"):
        unpack_scales(b"\xff", level, 1)
    with pytest.raises(ValueError, match="level"):
        unpack_biases(b"\x01", level)
    with pytest.raises(ValueError, match="apart"):
        unpack_scales(b"\xff", 0, 3)
