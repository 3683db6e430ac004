"""What a process that trains and measures asks of the machine, once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch

PRECISIONS = ("auto", "float32", "bfloat16")
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of torch, which initial weights and dropout are drawn from, NumPy and
    Python on this seed; then as they were before."""
    states = np.random.get_state(), random.getstate()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        # Of a GPU that nobody has used yet nothing could be given back.
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32: AMX, AVX-512 BF16, or CUDA from
    Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and cpu


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where `multiplies_bfloat16`. Raises ValueError on what is not one of
    `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return getattr(torch, precision)
