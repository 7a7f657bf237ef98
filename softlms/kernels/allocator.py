"""Memory that a call freed stays with the process for the next call."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names that mallopt(3) gives, without their M_


@contextmanager
def keep_memory() -> Iterator[bool]:
    """Freed memory is not handed back to the system inside, so that the next call need not ask for it page by page.

    glibc hands back what is freed at the end of its heap, and gets it again at the price of a fault for each page;
    eight rows of 128 tokens in TinyLlama's MLP are tensors of 23 MB each. (Ours; not of the paper.) The environment
    variables ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_=2147483647`` do the same for a whole program.

    Yields
    ------
    bool
        Whether it has an effect: only where the C library is glibc.

    Notes
    -----
    `softlms.experiments.timing.time_tricks` measures what it is worth. Afterwards glibc's thresholds are the largest
    that it would have chosen by itself: 32 MiB and twice that.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield True
    finally:
        libc.mallopt(MMAP_MAX, 1 << 16)
        libc.mallopt(MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(TRIM_THRESHOLD, 1 << 26)
        libc.malloc_trim(0)
