"""A run's config as a tree: classes and functions with their arguments, from which objects and the text are made."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from beartype import BeartypeConf
from beartype.door import is_bearable

from peer_jax.errors import InputError
from peer_jax.fields import IDENTITY, arguments_of, kind_of
from peer_jax.gin_syntax import Macro, Reference, literal

Configurable = Callable[..., Any]

CONSTANTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Node:
    """A class or function with its arguments: a factory, or, if it is called, what it makes.

    Attributes:
        name: with its scope.
        configurable: what is called.
        called: whether it stands for what it makes.
        arguments: bound or by default; those of neither are not there. Values are plain, or nodes, or constants.
        bound: the names of the arguments that the config binds.
    """

    name: str
    configurable: Configurable
    called: bool
    arguments: Mapping[str, Any]
    bound: frozenset[str]

    def build(self) -> Any:
        """The value of the call if it is called, else a factory."""
        if not self.called:
            return Factory(self)
        return call(self, self.values())

    def values(self) -> dict[str, Any]:
        """The bound arguments, built."""
        return {name: _build(value) for name, value in self.arguments.items() if name in self.bound}

    def __str__(self) -> str:
        return str(Reference(self.name, self.called))


class Factory:
    """A class or function that a config names without calling it, with the arguments that the config binds."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = arguments_of(self._node.configurable)
        by_place = dict(zip(parameters, args, strict=False))
        fits = all(_is_of(value, parameters[name].annotation) for name, value in by_place.items())
        if len(args) > len(parameters) or not (fits or inspect.isclass(self._node.configurable)):
            raise InputError(f"{self} stands where what it makes is needed: did you mean {self}()?")
        if unknown := [name for name in kwargs if name not in parameters]:
            raise InputError(
                f"{self} is given {unknown[0]!r} and takes no such argument: a model must fit its task, and a layer "
                "its model, so name another"
            )
        return call(self._node, self._node.values() | by_place | kwargs)

    def __repr__(self) -> str:
        return str(self._node)


def _build(value: Any) -> Any:
    """A value with what its nodes and constants stand for."""
    if isinstance(value, Node):
        return value.build()
    if isinstance(value, Macro):
        return CONSTANTS[value.name]
    if isinstance(value, Mapping):
        return {_build(key): _build(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_build, value))
    return value


def call(node: Node, arguments: Mapping[str, Any]) -> Any:
    """The call, with missing arguments and arguments of the wrong type refused by name."""
    parameters = arguments_of(node.configurable)
    if unknown := sorted(arguments.keys() - parameters.keys()):
        raise InputError(f"{node.name} has no argument {unknown[0]!r}: it takes {', '.join(parameters)}")
    for argument, parameter in parameters.items():
        if argument not in arguments:
            if parameter.default is parameter.empty:
                is_layer = node.called and inspect.isclass(node.configurable) and "rngs" in parameters
                hint = f" (or did you mean @{node.name}, without brackets?)" if is_layer else ""
                raise InputError(f"{node.name}.{argument} is not set: add it to the config, or --set it{hint}")
        elif not _is_of(arguments[argument], parameter.annotation):
            value, expected = arguments[argument], _shown(parameter.annotation)
            hint = f": did you mean {value}()?" if isinstance(value, Factory) else ""
            raise InputError(f"{node.name}.{argument} = {_brief(value)} is not of type {expected}{hint}")
    return node.configurable(**arguments)


_TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a float, too


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, if there is one; True and False are no numbers."""
    if hint is inspect.Parameter.empty:
        return True
    if isinstance(value, bool) and not is_bearable("", hint) and is_bearable(1, hint) and "bool" not in str(hint):
        return False
    return is_bearable(value, hint, conf=_TOWER)


def _shown(hint: Any) -> str:
    """A type as people write it, without what ``peer_jax.fields`` adds."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return inspect.formatannotation(hint).replace("typing.", "")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_literal(value: Any) -> bool:
    """Whether a config file can write a default."""
    try:
        literal(value)
    except TypeError:
        return False
    return True


# The tree as text.


def symbolic(value: Any) -> Any:
    """A value of the tree as ``literal`` takes it."""
    if isinstance(value, Node):
        return Reference(value.name, value.called)
    if isinstance(value, Mapping):
        return {symbolic(key): symbolic(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(symbolic, value))
    return value


def _nodes(value: Any) -> Iterator[Node]:
    """The nodes in a value, in containers too."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _nodes(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes(item)


def flat(node: Node, *, identity: bool = False) -> Iterator[tuple[str, str]]:
    """Name and value of the arguments of a node and of all nodes among them; only those of identity if wanted."""
    parameters = arguments_of(node.configurable)
    for argument, value in node.arguments.items():
        if identity and kind_of(parameters[argument].annotation) is not IDENTITY:
            continue
        yield f"{node.name}.{argument}", literal(symbolic(value))
        for inner in _nodes(value):
            yield from flat(inner, identity=identity)


def text_of(root: Node, imports: Sequence[str]) -> str:
    """A config file that loads to the same run."""
    lines = ["# Every argument that this run has, defaults included.", *(f"import {module}" for module in imports)]
    before = None
    for name, value in sorted(dict(flat(root)).items(), key=lambda field: field[0].rpartition(".")):
        place = name.rpartition(".")[0]
        if place != before:
            lines.append("")
        lines.append(f"{name} = {value}")
        before = place
    return "\n".join(lines) + "\n"
