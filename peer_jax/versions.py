"""Versions of jaxlib with a fault that costs a run much of its time, and the way out of each."""

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """What jaxlib does wrong on a platform, from version ``first`` to ``last``, and the ``way_out``."""

    first: str
    last: str
    platform: str
    says: str
    way_out: str


FAULTS = (
    Fault(
        "0.10.2",
        "0.11.0",
        "gpu",
        "compiles the gradient of embeddings, a float32 scatter-add, to a loop that is hundreds of times slower where "
        "tokens repeat (openxla/xla#46225)",
        "install jax[cuda13]>=0.11.1, for which Python 3.11 is too old",
    ),
)


def warnings(jaxlib: str, platform: str) -> list[str]:
    """A sentence for each fault that this version of jaxlib has on ``platform``, as ``jax.default_backend()`` names it.

    Suffixes of a version, as those of a release candidate or a fourth number, are ignored.
    """
    return [
        f"jaxlib {jaxlib} {fault.says}: {fault.way_out}"
        for fault in FAULTS
        if platform == fault.platform and _numbers(fault.first) <= _numbers(jaxlib) <= _numbers(fault.last)
    ]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
