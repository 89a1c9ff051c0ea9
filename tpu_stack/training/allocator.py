"""Keeping freed memory, so that a train step on a CPU does not fault its buffers in anew.

XLA:CPU allocates its temporaries per step. glibc serves large ones by mmap and gives them back on
free, so the next step faults the pages in again. With the thresholds raised, freed pages are
reused; a step of a 0.8M-parameter model went from 57 to 49.5 ms (one pair of runs, in
experiments/LOG.md).

    keep_freed_memory()
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
