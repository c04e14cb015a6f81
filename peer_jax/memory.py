"""How much memory a device has, and the refusal of what can't fit before any of it is taken.

What is counted elsewhere for ``check`` are lower bounds, so that nothing is refused that would have run.
"""

import os
from pathlib import Path

import jax

from peer_jax.errors import InputError

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def of_device() -> int | None:
    """Bytes of a device, which on CPU shares the machine's memory with the process's other devices; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min(machine, *filter(None, map(_limit, CGROUPS)), machine) // jax.local_device_count()


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
