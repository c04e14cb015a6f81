"""What glibc does with the memory that a step frees."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees: on CPU fetching it anew costs up to half of a step (docs/log.md).

    One arena, as those of XLA's threads can't hold large arrays and map them anew each time; no mapping, no trimming.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # not glibc
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 2**27)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Gives back to the system what has been freed so far, so that it doesn't count as the process's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
