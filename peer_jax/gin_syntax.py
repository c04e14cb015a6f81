"""The syntax of config files: what gin's parser makes of them, as plain data. The only file that knows gin.

Nothing is looked up or called here, and nothing is kept in gin's global state: a file becomes a list of statements, and
what they mean is decided in ``peer_jax.config.resolve``.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gin import config_parser

from peer_jax.errors import InputError

LONGEST_REASON = 300  # characters of what the parser says


@dataclasses.dataclass(frozen=True)
class Reference:
    """``@scope/Name``, a factory, or ``@scope/Name()``, what it makes."""

    name: str
    called: bool

    def __str__(self) -> str:
        return f"@{self.name}{'()' if self.called else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """``%NAME``: stands for the value that is bound to the name, or for a constant such as ``%float32``."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Binding:
    """``name = value``, and where it stands, in words; the name is ``scope/Name.argument`` or that of a macro."""

    name: str
    value: Any
    where: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A config file with what it includes: bindings in order, imported modules, and the files that were read."""

    bindings: tuple[Binding, ...]
    imports: tuple[str, ...]
    files: tuple[Path, ...]


def parse_file(file: str | os.PathLike) -> Parsed:
    """The statements of a file. The files that it includes are found beside it, or else from the current directory.

    Raises:
        InputError: if a file is missing, can't be read, isn't in gin's syntax, or includes itself.
    """
    return _parse_file(Path(file), ())


def _parse_file(path: Path, including: tuple[Path, ...]) -> Parsed:
    shown = f"{path}" if not including else f"{path}, included by {including[-1]},"
    if not path.exists():
        raise InputError(
            f"{shown} does not exist: give the path of a .gin file, such as configs/base.gin", argument="config"
        )
    if not path.is_file():
        raise InputError(
            f"{shown} is not a file: give the path of a .gin file, such as configs/base.gin", argument="config"
        )
    if path.resolve() in [above.resolve() for above in including]:
        raise InputError(f"{shown} includes itself: remove an include", argument="config")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{shown} can't be read ({error}): give a text file in gin's syntax", argument="config"
        ) from error
    return _parse_text(text, path, (*including, path))


def parse_text(text: str, source: str) -> Parsed:
    """The statements of a text that came from ``source``, which messages name.

    Raises:
        InputError: as ``parse_file``.
    """
    return _parse_text(text, Path(source), ())


def _parse_text(text: str, path: Path, including: tuple[Path, ...]) -> Parsed:
    bindings, imports, files = [], [], [path]
    for statement in _statements(text, str(path)):
        if isinstance(statement, config_parser.BindingStatement):
            where = f"{path}, line {statement.location.line_num}"
            bindings.append(Binding(_name(statement), statement.value, where))
        elif isinstance(statement, config_parser.ImportStatement):
            imports.append(statement.module)
        elif isinstance(statement, config_parser.IncludeStatement):
            beside = path.parent / statement.filename
            included = _parse_file(beside if beside.exists() else Path(statement.filename), including)
            bindings += included.bindings
            imports += included.imports
            files += included.files
    return Parsed(tuple(bindings), tuple(dict.fromkeys(imports)), tuple(files))


def parse_binding(text: str) -> Binding:
    """The binding that a text such as ``PEER.top_k=8`` is.

    Raises:
        InputError: if it is not of the form NAME=VALUE.
    """
    if "=" not in text:
        raise InputError(f"{text!r} is not of the form NAME=VALUE, such as 'PEER.top_k=8'", argument="set")
    try:
        statements = list(_statements(text, ""))
    except InputError as error:
        raise InputError(f"{text!r}: {error}", argument="set") from error
    if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
        raise InputError(f"{text!r} is not one binding: give NAME=VALUE, such as 'PEER.top_k=8'", argument="set")
    return Binding(_name(statements[0]), statements[0].value, "")


def parse_value(text: str) -> Any:
    """The value that a text such as ``@PEER`` or ``(1, 2)`` is, as the right side of a binding."""
    return parse_binding(f"VALUE = {text}").value


class _Symbols(config_parser.ParserDelegate):
    """Has gin's parser make our symbols."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


@functools.lru_cache(maxsize=256)
def _statements(text: str, source: str) -> tuple[Any, ...]:
    try:
        return tuple(config_parser.ConfigParser(text, _Symbols()))
    except Exception as error:  # the parser raises anything, tokenize.TokenError and RecursionError included
        line = getattr(error, "lineno", None)
        at = f"{source}, line {line}: " if source and line else f"{source}: " if source else ""
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split()).rstrip(".")
        if "<ast." in reason:
            reason = "the value is no Python literal (text stands in quotes)"
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        raise InputError(f"{at}{reason[0].lower()}{reason[1:]}; write NAME = VALUE in gin's syntax") from error


def _name(statement: config_parser.BindingStatement) -> str:
    """``scope/Name.argument``; a macro has no argument."""
    name = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
    return f"{name}.{statement.arg_name}" if statement.arg_name else name


def literal(value: Any) -> str:
    """A value as a config file writes it.

    Raises:
        TypeError: for a value that no config file can write.
    """
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise TypeError("nan")
        return repr(value) if math.isfinite(value) else ("-" if value < 0 else "") + "1e999"
    if isinstance(value, Reference | Macro):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    raise TypeError(type(value).__name__)


def symbols(value: Any) -> Iterator[Reference | Macro]:
    """The references and macros in a value, in containers too."""
    if isinstance(value, Reference | Macro):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from symbols(key)
            yield from symbols(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from symbols(item)
