"""Keeping freed memory, so that a train step on a CPU does not fault its buffers in anew.

XLA:CPU allocates its temporaries per step. glibc serves large ones by mmap and gives them back on
free, so every step pays a page fault per 4 KiB: 7.5 of 57 ms on a 0.8M-parameter model (see
experiments/LOG.md). With the thresholds raised, freed pages are reused.

>>> keep_freed_memory()
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1
_MMAP_FROM = 2**30


def keep_freed_memory() -> bool:
    """Raises glibc's mmap and trim thresholds for this process; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
