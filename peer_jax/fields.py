"""What a configurable argument decides: the numbers of a run, where it runs, or what is kept of it.

An argument is *identity* unless its annotation says otherwise: the numbers of a run depend on it, so a run directory is
bound to it. ``Placed[...]`` marks *placement* (where and how the same numbers are computed) and ``Bookkeeping[...]``
marks *bookkeeping* (how often a run logs, saves and evaluates; checks). A run may go on with another placement or
bookkeeping.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument decides; see the module."""

    name: str


IDENTITY, PLACEMENT, BOOKKEEPING = Kind("identity"), Kind("placement"), Kind("bookkeeping")

T = TypeVar("T")
Placed = Annotated[T, PLACEMENT]
Bookkeeping = Annotated[T, BOOKKEEPING]


class Gives:
    """Marks a factory among the arguments, and what its caller passes: a config can't set these of what it names.

    Each keyword is such an argument, its value what to set instead: ``Gives(d_model="Transformer.d_model")``.
    """

    def __init__(self, **instead: str) -> None:
        self.instead = instead


def given_to(annotation: object) -> Mapping[str, str]:
    """What the callers of a factory pass, and what to set instead; empty for any other argument."""
    if typing.get_origin(annotation) is Annotated:
        found = (extra.instead for extra in typing.get_args(annotation)[1:] if isinstance(extra, Gives))
    else:  # a union, such as that of a factory and None
        found = (given for part in typing.get_args(annotation) if (given := given_to(part)))
    return next(found, {})


@functools.cache
def arguments_of(configurable: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function, or of a class's constructor, by name, their annotations evaluated.

    A constructor that takes ``**`` hands it on to that of its base class, whose arguments are among the class's then.
    An annotation that names what isn't there when the program runs (an import for type checkers) is left empty.
    """
    if not inspect.isclass(configurable):
        return _own_arguments(configurable, skip=0)[0]
    found: dict[str, inspect.Parameter] = {}
    for cls in configurable.__mro__:
        if "__init__" in vars(cls):
            own, hands_on = _own_arguments(cls.__init__, skip=1)
            found = own | found
            if not hands_on:
                break
    return found


def _own_arguments(function: Callable[..., object], *, skip: int) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named arguments of a function after the first ``skip``, and whether it takes ``**``."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    names = getattr(inspect.unwrap(function), "__globals__", {})
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    found = {p.name: p.replace(annotation=_evaluated(p.annotation, names)) for p in named}
    return found, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _evaluated(annotation: object, names: Mapping[str, object]) -> object:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))  # what ``from __future__ import annotations`` has made a string
    except Exception:
        return inspect.Parameter.empty


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
        model: those of ``identity`` that make the model.
    """

    text: str
    fields: Mapping[str, str]
    identity: Mapping[str, str]
    model: Mapping[str, str]

    def uses(self, name: str) -> bool:
        """Whether a binding of this name, such as ``PEER.top_k`` or ``TABLE_RATE``, has an effect on the run."""
        ...

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

    def kept(self, workdir: str) -> Any:
        """The ``Run`` that the ``config.gin`` of another run's directory describes.

        Raises:
            InputError: if there is none, or it is no config.
        """
        ...
