"""What a process that trains and measures asks of the machine, once."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: glibc's numbers (malloc.h), and values in bytes: blocks up to the first come from the heap
#: instead of fresh pages, the heap grows by the second and keeps the third when it is freed.
_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD = (-3, 2**30), (-2, 2**26), (-1, 2**29)


@functools.cache
def settle_process() -> None:
    """Denormals count as zero, and freed memory is used again instead of going back to the system:
    its pages would be cleared anew for every activation, which takes a quarter of a training
    step on a CPU. At most 512 MiB are held back. Where the C library is not glibc, that is left as
    it is."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            for option in (_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD):
                library.mallopt(*option)


@contextmanager
def products_like(dtype: torch.dtype) -> Iterator[None]:
    """Within, products of float32 may round their factors to bfloat16 if `dtype` is that; sums stay
    float32. Where the hardware has no such product, another library's float32 one is taken, which
    on processors that are not Intel's is up to three times as fast."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
