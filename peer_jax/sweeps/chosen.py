"""Which runs of a sweep are trained here, and in which order."""

import difflib
import re
from collections.abc import Sequence

from peer_jax.errors import InputError
from peer_jax.sweeps.plan import Planned

SHARD_VARIABLE = "PEER_JAX_SHARD"


def parse_shard(text: str) -> tuple[int, int]:
    """The number of a share, from 0, and the number of shares, from "I/N".

    Raises:
        InputError: if it is no such text.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip(), re.ASCII)
    number, count = map(int, found.groups()) if found else (0, 0)
    if number >= count:
        raise InputError(
            f"{text!r} (or {SHARD_VARIABLE}) is not I/N with I from 0 to N - 1: the first of four shares is 0/4",
            argument="shard",
        )
    return number, count


def chosen(planned: Sequence[Planned], shard: tuple[int, int] = (0, 1), name: str | None = None) -> list[Planned]:
    """The runs of a share, or the one of a name, the most expensive first.

    Shares have about the same cost, and stay the same while runs are being finished.

    Args:
        planned: all runs of the sweep.
        shard: the number of the share and the number of shares.
        name: of the only run; then ``shard`` doesn't count.

    Raises:
        InputError: if no run has the name.
    """
    ordered = sorted(planned, key=lambda run: (-run.training_flops, run.point.name))
    if name is None:
        number, count = shard
        return ordered[number::count]
    if found := [run for run in ordered if run.point.name == name]:
        return found
    names = [run.point.name for run in ordered]
    like = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise InputError(f"{name!r} is none of the {len(names)} runs of the sweep: did you mean {like[0]}?", argument="run")
