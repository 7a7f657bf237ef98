"""Keep freed memory in the process for the next call."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names as in mallopt(3), without M_


@contextmanager
def keep_memory() -> Iterator[bool]:
    """Do not return freed memory to the system inside, so that the next call need not request it page by page.

    glibc returns memory freed at the end of its heap, and getting it back costs a page fault for each page. Eight rows
    of 128 tokens in TinyLlama's MLP are tensors of 23 MB each. (Ours; not in the paper.) The environment variables
    ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_=2147483647`` do the same for a whole program.

    Yields
    ------
    bool
        Whether it has an effect, which requires glibc as the C library.

    Notes
    -----
    `softlms.experiments.timing.time_tricks` measures the gain. Requests of one size stop costing page faults after
    about ten: aligned ones do not fit where the last one lay until small leftovers merge. Afterwards glibc's thresholds
    are the largest that it would choose by itself: 32 MiB and twice that.
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
