"""How much memory a device has, and the refusal of what can't fit before any of it is taken.

What is counted elsewhere for ``check`` are lower bounds, so that nothing is refused that would have run.
"""

import os
import subprocess
from pathlib import Path

import jax

from peer_jax.errors import InputError

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def of_device() -> int | None:
    """Bytes of a device, which on CPU shares the machine's memory with the process's other devices; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    machine = of_machine()
    return None if machine is None else machine // jax.local_device_count()


def of_machine() -> int | None:
    """Bytes that the processes of this machine or container have together; None if unknown."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min(machine, *filter(None, map(_limit, CGROUPS)), machine)


def of_gpu() -> int | None:
    """Bytes of the largest GPU of this machine, found without starting JAX on it; None if unknown."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max((int(mebibytes) * 2**20 for mebibytes in told if mebibytes.isdecimal()), default=None)


def _limit(file: str) -> int | None:
    """The limit in a control group's file; None if there is none."""
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return None


def shown(size: float) -> str:
    """Writes bytes to three digits: 12.3 GiB."""
    units = {"MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
    unit = next((unit for unit, one in units.items() if size < 1000 * one), "TiB")
    return f"{size / units[unit]:.3g} {unit}"


def check(size: float, what: str, way_out: str, argument: str | None = None) -> None:
    """An InputError if a device can't hold ``size`` bytes.

    Args:
        size: the least number of bytes that it takes on each device.
        what: what takes them, as the subject of a sentence.
        way_out: what to change, and the values it has.
        argument: of the caller that mends it.
    """
    there = of_device()
    if there is not None and size > there:
        raise InputError(
            f"{what} takes at least {shown(size)} of memory, and there are {shown(there)}: {way_out}", argument=argument
        )
