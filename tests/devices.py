"""Devices that this machine lacks, as far as choices ask for them."""

from typing import NamedTuple


class Device(NamedTuple):
    platform: str
    compute_capability: str | None = None
