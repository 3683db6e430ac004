"""Numbers as bytes: codes of b bits, float16 under a common exponent, float32."""

from __future__ import annotations

import math

import numpy as np
import torch

from rlcompress.core.errors import UserError
from rlcompress.core.quant import max_code


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes (any shape) as a bit string, least significant bit first, padded to a byte."""
    unsigned = codes.ravel().astype(np.int32)
    top = max_code(bits)
    unsigned = (unsigned + top) // 2 if bits <= 3 else unsigned + top
    rows = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(rows.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: int32 (count,)."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    unsigned = flat.reshape(count, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    top = max_code(bits)
    return 2 * unsigned - top if bits <= 3 else unsigned - top


def pack_half(values: np.ndarray, name: str) -> tuple[bytes, int]:
    """float16 bytes and the exponent e: value = float16 x 2^e, the largest one in [0.5, 1)."""
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise UserError(f"{name}: its scale or bias is not finite; nothing was written")
    exponent = math.frexp(largest)[1] if largest else 0
    return np.ldexp(values.astype(np.float64), -exponent).astype("<f2").tobytes(), exponent


def unpack_half(data: bytes, exponent: int) -> np.ndarray:
    return np.ldexp(np.frombuffer(data, "<f2").astype(np.float64), exponent).astype(np.float32)


def pack_float(values: np.ndarray | torch.Tensor, name: str) -> bytes:
    """Little-endian float32."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if not np.isfinite(array).all():
        raise UserError(f"{name}: a number in it is not finite; nothing was written")
    return array.astype("<f4").tobytes()
