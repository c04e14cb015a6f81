"""What a configurable argument decides: the numbers of a run, where it runs, or what is kept of it.

An argument is *identity* unless its annotation says otherwise: the numbers of a run depend on it, so a run directory is
bound to it. ``Placed[...]`` marks *placement* (where and how the same numbers are computed) and ``Bookkeeping[...]``
marks *bookkeeping* (how often a run logs, saves and evaluates; checks). A run may go on with another placement or
bookkeeping.
"""

import dataclasses
import typing
from typing import Annotated, TypeVar


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument decides; see the module."""

    name: str


IDENTITY, PLACEMENT, BOOKKEEPING = Kind("identity"), Kind("placement"), Kind("bookkeeping")

T = TypeVar("T")
Placed = Annotated[T, PLACEMENT]
Bookkeeping = Annotated[T, BOOKKEEPING]


def kind_of(annotation: object) -> Kind:
    """The kind that an annotation declares; ``IDENTITY`` where it declares none."""
    kinds = (extra for extra in typing.get_args(annotation)[1:] if isinstance(extra, Kind))
    return next(kinds, IDENTITY) if typing.get_origin(annotation) is Annotated else IDENTITY
