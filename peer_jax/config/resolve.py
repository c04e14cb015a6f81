"""What names in configs mean: which class or function a name is, which bindings are its, and what macros stand for."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flax import nnx
from flax.typing import Initializer

from peer_jax import layers
from peer_jax.config.tree import CONSTANTS, Configurable, Node, is_literal
from peer_jax.data.corpora import local_files, python_packages, python_stdlib, tfds_corpus
from peer_jax.data.images import digits, tfds_images
from peer_jax.data.pipeline import ImageTask, TextTask
from peer_jax.data.prepared import prepared, prepared_images
from peer_jax.errors import InputError
from peer_jax.fields import arguments_of, given_to
from peer_jax.gin_syntax import Binding, Macro, Parsed, Reference, parse_binding, parse_file, parse_value, symbols
from peer_jax.models import Transformer, ViT
from peer_jax.sharding import Sharding
from peer_jax.sweeps.sweep import Sweep
from peer_jax.training.optimizer import AdamW
from peer_jax.training.run import Run


def normal(stddev: float = 1e-2, dtype: Any = None) -> Initializer:
    """``nnx.initializers.normal``, whose own annotations let any value pass for a number."""
    if not 0 <= stddev < math.inf:
        raise InputError(f"stddev={stddev} must be at least 0 and finite")
    return nnx.initializers.normal(stddev, dtype)


_CONFIGURABLES: tuple[Configurable, ...] = (
    *(Run, Sharding, Sweep, AdamW, Transformer, ViT, *layers.families().values()),
    *(TextTask, python_stdlib, python_packages, local_files, tfds_corpus, prepared),
    *(ImageTask, digits, tfds_images, prepared_images),
    *(normal, nnx.initializers.variance_scaling),
)


LONGEST_SHOWN = 120  # characters of a binding in a message


@dataclasses.dataclass(frozen=True)
class Source:
    """Bindings in order, later ones over earlier ones, and the modules that are imported."""

    bindings: tuple[Binding, ...]
    imports: tuple[str, ...]
    before: Mapping[str, Any]
    parsed: tuple[Parsed, ...]

    @classmethod
    def read(
        cls,
        files: Sequence[str | os.PathLike | Parsed],
        bindings: Sequence[str | Binding],
        imports: Sequence[str],
        before: Mapping[str, Any] = {},
    ) -> "Source":
        parsed = [file if isinstance(file, Parsed) else parse_file(file) for file in files]
        over = [on_top(binding) for binding in bindings]
        refuse_unknown_macros(over, parsed)
        return cls.of([*parsed, Parsed(tuple(over), (), ())], imports, before)

    @classmethod
    def of(cls, parsed: Sequence[Parsed], imports: Sequence[str], before: Mapping[str, Any]) -> "Source":
        found = dict.fromkeys([*imports, *(name for part in parsed for name in part.imports)])
        return cls(tuple(b for part in parsed for b in part.bindings), tuple(found), before, tuple(parsed))

    def resolver(self) -> "Resolver":
        return Resolver(self)


def on_top(binding: str | Binding) -> Binding:
    """A binding over the files. A text in a sweep that begins with @ or % is a reference or a macro."""
    if isinstance(binding, str):
        parsed = parse_binding(binding)
        shown = binding if len(binding) <= LONGEST_SHOWN else f"{binding[:LONGEST_SHOWN]}..."
        return dataclasses.replace(parsed, where=repr(shown))
    if isinstance(binding.value, str) and binding.value[:1] in ("@", "%"):
        return dataclasses.replace(binding, value=parse_value(binding.value))
    return binding


def refuse_unknown_macros(bindings: Sequence[Binding], parsed: Sequence[Parsed]) -> None:
    """An InputError for a macro that no config sets or uses, since nothing would change.

    A macro of a file beside the given ones is known, too: a sweep sets ``TABLE_RATE`` for its dense models as well.
    """
    macros = [binding for binding in bindings if "." not in binding.name]
    if not macros:
        return
    known = {symbol.name for binding in bindings for symbol in symbols(binding.value)}
    known |= _named_in(parsed).macros
    for binding in macros:
        if binding.name not in known:
            close = difflib.get_close_matches(binding.name, sorted(known), n=1)
            way_out = f"did you mean {close[0]}?" if close else "name what it belongs to, as in PEER.top_k=8"
            raise InputError(
                f"{binding.name[:80]}: no config sets or uses a macro of that name; {way_out}", argument="set"
            )


class _Named(NamedTuple):
    """The macros that files set or use, and the references with a scope that they have, such as ``up/normal``."""

    macros: frozenset[str]
    scoped: frozenset[str]


def _named_in(parsed: Sequence[Parsed]) -> _Named:
    """What files and all files beside them name."""
    files = {file for part in parsed for file in part.files}
    folders = {file.parent for file in files}
    macros, scoped = set(), set()
    for file in sorted(files | {beside for folder in folders for beside in folder.glob("*.gin")}):
        try:
            named = _named_in_file(file, file.stat().st_mtime_ns)
        except (OSError, InputError):  # a file beside, which this run doesn't need
            continue
        macros |= named.macros
        scoped |= named.scoped
    return _Named(frozenset(macros), frozenset(scoped))


@functools.lru_cache(maxsize=256)
def _named_in_file(file: Path, changed: int) -> _Named:
    bindings = parse_file(file).bindings
    found = [symbol for binding in bindings for symbol in symbols(binding.value)]
    used = {symbol.name for symbol in found if isinstance(symbol, Macro)}
    return _Named(
        frozenset(used | {binding.name for binding in bindings if "." not in binding.name}),
        frozenset(symbol.name for symbol in found if isinstance(symbol, Reference) and "/" in symbol.name),
    )


def import_module(name: str) -> ModuleType:
    """A user's module, found as ``python`` would find it from the current directory.

    Raises:
        InputError: if it can't be imported.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(
            f"{name} can't be imported ({type(error).__name__}: {' '.join(str(error).split())}): name a module that is "
            "installed, or in the current directory, or on PYTHONPATH",
            argument="import",
        ) from error


def configurables_of(module: ModuleType) -> dict[str, Configurable]:
    """The public classes and functions that a module, or a package with its modules, defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (value.__module__ == module.__name__ or value.__module__.startswith(module.__name__ + "."))
    }


def layers_of(imports: Sequence[str]) -> dict[str, type[layers.FeedForward]]:
    """The layer classes of imported modules, by name.

    Raises:
        InputError: if a module can't be imported.
    """
    found = (pair for module in imports for pair in configurables_of(import_module(module)).items())
    return {name: value for name, value in found if inspect.isclass(value) and issubclass(value, layers.FeedForward)}


class Names:
    """The classes and functions that a config can name: this package's, and those of imported modules."""

    def __init__(self, imports: Sequence[str]) -> None:
        own = {configurable.__name__: [configurable] for configurable in _CONFIGURABLES}
        for module in imports:
            for name, configurable in configurables_of(import_module(module)).items():
                if configurable not in (known := own.setdefault(name, [])):
                    known.append(configurable)
        self._by_name = own

    def find(self, selector: str) -> Configurable:
        """The configurable of a name, or of a name with the end of its module's name before it."""
        *module, name = selector.split(".")
        found = self._by_name.get(name, [])
        if module:
            ending = ".".join(module)
            found = [
                configurable
                for configurable in found
                if (ending == "peer_jax" and configurable in _CONFIGURABLES)
                or f".{configurable.__module__}".endswith(f".{ending}")
            ]
        if len(found) > 1:
            whole = " and ".join(f"{configurable.__module__}.{name}" for configurable in found)
            raise InputError(f"{selector} may be {whole}: write the whole name")
        if not found:
            close = difflib.get_close_matches(name, self._by_name, n=1)
            way_out = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(self._by_name))}"
            raise InputError(f"{selector[:80]} is nothing that a config can name; {way_out}")
        return found[0]

    def shortest(self, configurable: Configurable) -> str:
        """The name that ``find`` finds a configurable by."""
        name = configurable.__name__
        return name if len(self._by_name[name]) == 1 else f"{configurable.__module__}.{name}"


def _refused(binding: Binding, reason: object) -> InputError:
    """Why a binding can't be, with where it stands."""
    if not binding.where:
        return InputError(f"{binding.name[:LONGEST_SHOWN]}: {reason}")
    given = "set" if binding.where.startswith(("'", '"')) else "config"
    return InputError(f"{binding.where}: {reason}", argument=given)


def _as_constant(default: Any) -> Any:
    """A default as a config writes it: the name of a constant for its value."""
    return next((Macro(name) for name, value in CONSTANTS.items() if value is default), default)


class Resolver:
    """Makes nodes of references, by the bindings of a source."""

    def __init__(self, source: Source) -> None:
        self._names = Names(source.imports)
        self._macros: dict[str, Any] = {}
        self._bound: dict[tuple[str, Configurable], dict[str, Binding]] = {}
        self.used: set[str] = set()
        self._scoped: set[tuple[str, Configurable]] = set()  # what has been resolved within each scope
        for name, value in source.before.items():
            self._bind(Binding(name, value, "an earlier version's default"))
        for binding in source.bindings:
            self._bind(binding)

    def _bind(self, binding: Binding) -> None:
        place, dot, argument = binding.name.rpartition(".")
        if not dot:
            self._macros[binding.name] = binding.value
            return
        scope, _, selector = place.rpartition("/")
        try:
            configurable = self._names.find(selector)
            parameters = arguments_of(configurable)
            if argument not in parameters:
                raise InputError(
                    f"{configurable.__name__} has no argument {argument[:80]!r}: it takes {', '.join(parameters)}"
                )
        except InputError as error:
            raise _refused(binding, error) from None
        self._bound.setdefault((scope, configurable), {})[argument] = binding

    def node(self, reference: Reference, scope: str, given: Mapping[str, str] = {}, within: tuple = ()) -> "Node":
        """What a reference stands for, with all of its arguments.

        Args:
            reference: to a class or function.
            scope: of the node that has the reference among its arguments; the reference's own scope replaces it.
            given: the arguments that the caller of a factory passes, and what to set instead.
            within: what is being resolved.

        Raises:
            InputError: for an unknown name, a macro that is not set, a given argument, or a reference to itself.
        """
        own_scope, _, selector = reference.name.rpartition("/")
        scope = own_scope or scope
        configurable = self._names.find(selector)
        name = f"{scope}/" * bool(scope) + self._names.shortest(configurable)
        if name in within:
            raise InputError(f"{name} has itself among its arguments, by way of {', '.join(within)}: bind another")
        bound: dict[str, Binding] = {}
        parts = scope.split("/") if scope else []
        for length in range(len(parts) + 1):
            self._scoped.add(("/".join(parts[:length]), configurable))
            bound |= self._bound.get(("/".join(parts[:length]), configurable), {})
        for argument in given:
            if argument in bound:
                raise InputError(f"{name}.{argument} is given by its caller: set {given[argument]} instead")
        arguments = {}
        for argument, parameter in arguments_of(configurable).items():
            factory = given_to(parameter.annotation)
            if argument in bound:
                self.used.add(bound[argument].name.removeprefix("peer_jax."))
                arguments[argument] = self._value(bound[argument].value, scope, factory, (*within, name))
            elif argument not in given and is_literal(default := _as_constant(parameter.default)):
                arguments[argument] = default
        return Node(name, configurable, reference.called, arguments, frozenset(bound))

    def _value(self, value: Any, scope: str, given: Mapping[str, str], within: tuple, macros: tuple = ()) -> Any:
        """A value with nodes for its references, and the values of its macros for these; constants stay."""
        if isinstance(value, Reference):
            return self.node(value, scope, {} if value.called else given, within)
        if isinstance(value, Macro):
            if value.name in macros:
                raise InputError(f"{value.name} stands for itself, by way of {', '.join(macros)}: bind a value")
            if value.name in self._macros:
                self.used.add(value.name)
                return self._value(self._macros[value.name], scope, given, within, (*macros, value.name))
            if value.name in CONSTANTS:
                return value
            raise self._not_set(value.name)
        if isinstance(value, Mapping):
            return {
                self._value(k, scope, given, within, macros): self._value(v, scope, given, within, macros)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self._value(item, scope, given, within, macros) for item in value)
        return value

    def refuse_unknown_scopes(self, source: Source) -> None:
        """An InputError for a binding in a scope that nothing has, once the run is resolved: it would change nothing.

        A scope of a file beside the given ones is known, too, as macros are.
        """
        named: frozenset[str] | None = None
        for (scope, configurable), bound in self._bound.items():
            if not scope or (scope, configurable) in self._scoped:
                continue
            if named is None:
                named = _named_in(source.parsed).scoped
            here = {name for name, _ in self._scoped}
            elsewhere = any(f"{name.rpartition('/')[0]}/".startswith(f"{scope}/") for name in named)
            if f"{scope}/{configurable.__name__}" in named or (elsewhere and scope not in here):
                continue
            binding = next(iter(bound.values()))
            shown = f"{scope[:40]}/{configurable.__name__}"
            raise _refused(
                binding, f"no config has a reference @{shown}, so this changes nothing; leave {scope[:40]}/ out"
            )

    def _not_set(self, name: str) -> InputError:
        if name.startswith(("b", "f", "u", "i")) and name.rstrip("0123456789") != name:
            types = " and ".join(f"%{constant}" for constant in CONSTANTS)
            return InputError(f"%{name} is no type that a config can name: there are {types}")
        return InputError(f"{name} is not set: add a config that sets it, such as one of configs/sizes, or --set it")
