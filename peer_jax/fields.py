"""What a configurable argument decides: the numbers of a run, where it runs, or what is kept of it.

An argument is *identity* unless its annotation says otherwise: the numbers of a run depend on it, so a run directory is
bound to it. ``Placed[...]`` marks *placement* (where and how the same numbers are computed) and ``Bookkeeping[...]``
marks *bookkeeping* (how often a run logs, saves and evaluates; checks). A run may go on with another placement or
bookkeeping.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, NamedTuple, Protocol, TypeVar, runtime_checkable


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


class Difference(NamedTuple):
    """An argument with other values in two configs, by its name (``PEER.top_k``); values as configs write them."""

    name: str
    before: str
    now: str


@runtime_checkable
class RunConfig(Protocol):
    """The config that a run was loaded from, as a value.

    Attributes:
        text: a config file that loads to the same run, every default spelled out.
        fields: every argument by its name, such as ``AdamW.b1``, with its value as a config writes it.
        identity: those of ``fields`` that the numbers of the run depend on.
    """

    text: str
    fields: Mapping[str, str]
    identity: Mapping[str, str]

    def difference(self, kept: str, *, of_model: bool = False) -> Difference | None:
        """The first argument of identity in which a run differs that was begun with the config text ``kept``.

        Arguments that ``kept`` lacks have the value that they had when it was written.

        Args:
            kept: the text of a ``config.gin``.
            of_model: compare only what makes the model.

        Raises:
            InputError: if ``kept`` is no config.
        """
        ...
