"""Numbers as bytes: weight codes of b bits, scales and biases of 8, float32.

Scales and the steps of biases lie on one logarithmic grid, `LEVELS` levels an octave: level k is
2^(k / LEVELS). Packing what was unpacked changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from rlcompress.core.errors import UserError
from rlcompress.core.quant import ODD_BITS, max_code

LEVELS = 256
#: Normal float32s.
LOWEST, HIGHEST = -126 * LEVELS, 128 * LEVELS - 1
#: Levels between neighbouring scale codes: powers of two, so that a coarser grid lies on a finer.
SPACINGS = (1, 2, 4, 8)
SPAN = 254  # codes below the largest
_OCTAVE = np.exp2(np.arange(LEVELS) / LEVELS)


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes (any shape) as a bit string, least significant bit first, padded to a byte."""
    unsigned = codes.ravel().astype(np.int32)
    top = max_code(bits)
    unsigned = (unsigned + top) // 2 if bits in ODD_BITS else unsigned + top
    rows = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(rows.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: int32 (count,)."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    unsigned = flat.reshape(count, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    top = max_code(bits)
    return 2 * unsigned - top if bits in ODD_BITS else unsigned - top


def _finite(values: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    array = values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if not np.isfinite(array).all():
        raise UserError(f"{name}: a number in it is not finite; nothing was written")
    return array


def _levels(positive: np.ndarray) -> np.ndarray:
    """Where positive numbers lie between the levels (float64)."""
    levels = LEVELS * np.log2(positive.astype(np.float64))
    return np.clip(levels, LOWEST, HIGHEST)  # type: ignore[no-any-return]


def _values(levels: np.ndarray | int) -> np.ndarray:
    """Level k's float32: 2^(k / LEVELS)."""
    return np.ldexp(_OCTAVE[levels % LEVELS], levels // LEVELS).astype(np.float32)


def pack_scales(values: np.ndarray, name: str) -> tuple[bytes, int, int]:
    """One byte a number >= 0, the level of the largest, and the levels from code to code.

    Code 0 is zero, code c > 0 is level largest - (255 - c) x spacing. The spacing is the
    smallest that spans all numbers. What is below the widest span goes to its bottom or to
    zero, whichever is nearer.
    """
    values = _finite(values, name)
    levels = _levels(np.where(values > 0, values, 1.0))
    codes = np.zeros(len(values), np.uint8)
    if not (values > 0).any():
        return codes.tobytes(), LOWEST, SPACINGS[0]
    top = int(np.rint(levels[values > 0].max()))
    alive = (values > 0) & (levels >= top - SPAN * SPACINGS[-1] - LEVELS)
    below = top - levels[alive]
    spacing = next((g for g in SPACINGS if np.rint(below.max() / g) <= SPAN), SPACINGS[-1])
    codes[alive] = 255 - np.minimum(np.rint(below / spacing), SPAN)
    return codes.tobytes(), top, spacing


def reach(values: np.ndarray) -> float:
    """The most that a number may be beside these: as many of the positive ones as can be lie
    within the widest span below it. Infinite if none is positive."""
    ordered = np.sort(values[values > 0].astype(np.float64))
    if not len(ordered):
        return float("inf")
    span = 2.0 ** ((SPAN - 1) * SPACINGS[-1] / LEVELS)
    within = np.searchsorted(ordered, ordered * span, side="right") - np.arange(len(ordered))
    lowest = len(ordered) - 1 - int(np.argmax(within[::-1]))  # of equally many, the largest
    return float(ordered[lowest] * span)


def unpack_scales(data: bytes, top: int, spacing: int) -> np.ndarray:
    """The inverse of `pack_scales`: float32. Raises ValueError if no file says so."""
    if not LOWEST <= top <= HIGHEST or spacing not in SPACINGS:
        raise ValueError(f"scales up to level {top}, {spacing} apart")
    codes = np.frombuffer(data, np.uint8).astype(np.int64)
    return np.where(codes > 0, _values(top - (255 - codes) * spacing), np.float32(0))


def pack_biases(values: np.ndarray, name: str) -> tuple[bytes, int]:
    """One signed byte a number, and the level of their step: a 127th of the largest."""
    values = _finite(values, name)
    largest = np.abs(values).max(initial=0.0)
    step = int(np.rint(_levels(largest / 127))) if largest else LOWEST
    codes = np.clip(np.rint(values / _values(step).astype(np.float64)), -127, 127)
    return codes.astype(np.int8).tobytes(), step


def unpack_biases(data: bytes, step: int) -> np.ndarray:
    """The inverse of `pack_biases`: float32. Raises ValueError if no file says so."""
    if not LOWEST <= step <= HIGHEST:
        raise ValueError(f"a bias step of level {step}")
    return np.frombuffer(data, np.int8).astype(np.float32) * _values(step)


def pack_float(values: np.ndarray | torch.Tensor, name: str) -> bytes:
    """Little-endian float32."""
    return _finite(values, name).astype("<f4").tobytes()
