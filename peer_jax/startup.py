"""What a process does before it imports JAX: quiet libraries, compiled programs kept on disk, and, on CPU, malloc.

Commands and the worker processes of a sweep call ``prepare``; a library never changes its process like this.
"""

import ctypes
import glob
import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

PROGRAMS_BYTES = 4 * 2**30  # of compiled programs; the oldest go first


def prepare(*, keep_programs: bool = True) -> None:
    """Prepares this process.

    Args:
        keep_programs: have JAX keep compiled programs on disk, so that a run of the same shapes, or one that goes on,
            starts in a second.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _silence_threads()
    if not accelerators():
        keep_freed_memory()
    if keep_programs:
        root = Path(os.environ.get("PEER_JAX_CACHE") or "~/.cache/peer_jax").expanduser()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS_BYTES))


def _silence_threads() -> None:
    """Keeps Orbax and TensorStore from printing a traceback in each of their threads that fails, as on a full disk.

    They raise the same errors in the thread that waits for them, which says in one line what has happened.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_of_main_thread(error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            show(error)

    sys.unraisablehook = show_of_main_thread


def accelerators() -> list[str]:
    """The accelerators that worker processes can share, found without starting JAX.

    Returns:
        Indices of GPUs; ["tpu"], for all chips of a TPU host belong to one process; or nothing.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return [device for device in visible.split(",") if device.strip()]
        return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if importlib.util.find_spec("libtpu"):
        return ["tpu"] if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*") else []
    return []


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees: on CPU, fetching it anew costs up to half of a step (docs/log.md).

    There is one arena, since the arenas of XLA's threads can't hold large arrays and would map them anew each time;
    nothing is mapped by itself, and nothing is trimmed.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 2**27)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Gives back to the system what has been freed so far, so that it doesn't count as the process's memory."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str):
    """A function of glibc; None where the process has another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
