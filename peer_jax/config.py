"""Configs: the only file that knows gin.

A config names classes and functions of this package and their arguments, ``PEER.num_experts = 16384``. Everything that
can be named is in ``_configurables``; the library itself carries no decorators.
"""

import difflib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import jax.numpy as jnp
from beartype import BeartypeConf
from beartype.door import is_bearable
from flax import nnx

from peer_jax.data.corpora import local_files, python_packages, python_stdlib, tfds_corpus
from peer_jax.data.pipeline import TextTask
from peer_jax.data.prepared import prepared
from peer_jax.errors import InputError
from peer_jax.fields import IDENTITY, Difference, kind_of
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.sharding import Sharding
from peer_jax.sweeps.sweep import Sweep
from peer_jax.training.loop import Run
from peer_jax.training.optimizer import AdamW

_configurables: list[Callable[..., Any]] = [
    Run,
    Sharding,
    Sweep,
    AdamW,
    TextTask,
    python_stdlib,
    python_packages,
    local_files,
    tfds_corpus,
    prepared,
    Transformer,
    Dense,
    MoE,
    PKM,
    PEER,
    nnx.initializers.normal,
    nnx.initializers.variance_scaling,
]
_constants = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What the package passes itself, over any binding: whence it comes, and what to set instead.
_layers = [layer.__name__ for layer in (Dense, MoE, PKM, PEER)]
_given = {
    **{
        f"{layer}.{argument}": ("the Transformer", f"Transformer.{argument}")
        for layer in _layers
        for argument in ("d_model", "dtype", "param_dtype")
    },
    **{f"{layer}.rngs": ("the Transformer", "Run.seed") for layer in _layers},
    "Transformer.rngs": ("the run", "Run.seed"),
    "Transformer.vocab_size": ("the run", "TextTask.vocabulary"),
}


def load(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> Run:
    """The run that a stack of config files and bindings describes; later ones override earlier ones.

    Raises:
        InputError: for a missing file, an unknown name, a value of the wrong type or one that is not set.
    """
    run = _build("Run", files, bindings)
    try:  # noqa: SIM105
        run.trainer()
    except Exception:
        pass
    object.__setattr__(run, "config", _TemporaryConfig(text()))
    return run


def _parse(config: str) -> dict[str, str]:
    bindings, name = {}, None
    for line in config.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if not line.startswith(" "):
            name, _, line = (part.strip() for part in line.partition("="))
        bindings[name] = (bindings.get(name, "") + " " + line.strip().removesuffix("\\").strip()).strip()
    return bindings


class _TemporaryConfig:
    def __init__(self, text):
        self.text = text
        self.fields = _parse(text)
        self.identity = {n: v for n, v in self.fields.items() if self._is_identity(n)}

    def _is_identity(self, name):
        owner, _, argument = name.partition(".")
        if owner == "Sharding":
            return False
        for configurable in _configurables:
            if configurable.__name__ == owner:
                of = configurable.__init__ if inspect.isclass(configurable) else configurable
                hints = typing.get_type_hints(of, include_extras=True)
                return kind_of(hints.get(argument)) is IDENTITY
        return True

    def difference(self, kept, *, of_model=False):
        before, now = _parse(kept), self.fields
        parts = ("Run.", "AdamW.", "TextTask.", "python_stdlib.", "python_packages.", "local_files.", "tfds_corpus.")
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name) and self._is_identity(name):
                if of_model and name.startswith((*parts, "prepared.")):
                    continue
                return Difference(name, before.get(name, "unset"), now.get(name, "unset"))
        return None


def load_sweep(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[Sweep, list[str]]:
    """The sweep that files and bindings describe, and those of the bindings that are not the sweep's but its runs'.

    Raises:
        InputError: as ``load``.
    """
    own = [binding for binding in bindings if binding.lstrip().startswith("Sweep.")]
    return _build("Sweep", files, own), [binding for binding in bindings if binding not in own]


def _build(name: str, files: Sequence[str | Path], bindings: Sequence[str]) -> Any:
    """What the configurable of that name makes of the files and bindings."""
    _register()
    gin.clear_config()
    read = []
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--config {file} does not exist: give the path of a .gin file, such as configs/base.gin")
        with _one_sentence(f"--config {file}"):
            read.append(gin.parse_config_file(str(file), skip_unknown=False, print_includes_and_imports=False))
    for binding in bindings:
        if "=" not in binding:
            raise InputError(f"--set {binding!r} is not of the form NAME=VALUE, such as 'PEER.top_k=8'")
        with _one_sentence(f"--set {binding!r}"):
            gin.parse_config(binding, skip_unknown=False)
    _refuse_unknown_macros(bindings, [file for parsed in read for file in _with_included(parsed)])
    _refuse_given()
    with _one_sentence("the config"):
        _finalize()
        return gin.get_configurable(name)()


def _refuse_unknown_macros(bindings: Sequence[str], files: Sequence[Path]) -> None:
    """An InputError for a macro that no config sets or uses: gin takes it, and nothing would change.

    One of a file beside the given ones is known, too: a sweep sets ``TABLE_RATE`` for its dense models as well.
    """
    names = [binding.partition("=")[0].strip() for binding in bindings]
    names = [name for name in names if "." not in name]  # gin itself knows whether there is a PEER.top_k
    if not names:
        return
    known = set(re.findall(r"%([\w/]+)", "\n".join(bindings)))
    beside = {neighbour for file in files for neighbour in (file, *file.parent.glob("*.gin")) if neighbour.is_file()}
    for config in sorted(beside):
        found = re.finditer(r"^([\w/]+)[ \t]*=|%([\w/]+)", config.read_text(errors="replace"), re.MULTILINE)
        known.update(match[1] or match[2] for match in found)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            way_out = f"did you mean {close[0]}?" if close else "name what it belongs to, as in PEER.top_k=8"
            raise InputError(f"--set {name}: no config sets or uses a macro of that name; {way_out}")


def _with_included(parsed: Any) -> Iterator[Path]:
    """The path of a file that gin has read, and those of the files that it includes."""
    yield Path(parsed.filename)
    for included in parsed.includes:
        yield from _with_included(included)


def _refuse_given() -> None:
    """An InputError for a binding that would have no effect, since the package passes that argument itself."""
    for name, (giver, instead) in _given.items():
        try:
            gin.query_parameter(name)
        except ValueError:  # not bound
            continue
        raise InputError(f"{name} is given by {giver}: set {instead}")


def _finalize() -> None:
    """Checks references; gin's own message about a macro that is not set has the whole config in it."""
    try:
        gin.finalize()
    except ValueError as error:
        unset = re.match(r"No bindings specified for '(.+)/gin\.macro'", str(error))
        if unset is None:
            raise
        name = unset[1]
        if re.match(r"(b|bf|fp|bfloat|float|u?int)\d", name):
            types = " and ".join(f"%{constant}" for constant in _constants)
            raise InputError(f"%{name} is no type that a config can name: there are {types}") from None
        raise InputError(
            f"{name} is not set: add a config that sets it, such as one of configs/sizes, or --set it"
        ) from None


def text() -> str:
    """What the run has used of the config, every default included."""
    return gin.operative_config_str()


class _one_sentence:  # noqa: N801, a context manager that reads as a phrase
    """Turns gin's errors into an InputError of one sentence."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, InputError):
            raise InputError(sentence(error)) from None
        if isinstance(error, Exception):  # gin's parser raises anything, tokenize.TokenError included
            raise InputError(f"{self._where}: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """The message without the lines that gin adds about where a call came from."""
    message = str(error).split("\n  In call to configurable")[0].split("\n  In file")[0].strip()
    return " ".join(message.split())


@functools.cache
def _register() -> None:
    for configurable in _configurables:
        gin.external_configurable(_checked(configurable), name=configurable.__name__, module="peer_jax")
    for name, value in _constants.items():
        gin.constant(name, value)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, with missing arguments and arguments of the wrong type refused by name."""
    signature = _signature(function)
    name = function.__name__
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    conf = BeartypeConf(is_pep484_tower=True)  # an int is a float, too
    is_module = inspect.isclass(function) and issubclass(function, nnx.Module)  # the others never get a value by place

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := sorted(kwargs.keys() - signature.parameters.keys()):
            raise InputError(f"{name} has no argument {unknown[0]!r}: it takes {', '.join(signature.parameters)}")
        if args and not is_module:
            raise InputError(f"@{name} stands where what it makes is needed: did you mean @{name}()?")
        given = signature.bind_partial(*args, **kwargs).arguments
        for argument, parameter in signature.parameters.items():
            if argument not in given:
                if parameter.default is parameter.empty:
                    raise InputError(f"{name}.{argument} is not set: add it to the config, or --set it")
            elif argument in hints and not is_bearable(given[argument], hints[argument], conf=conf):
                expected = inspect.formatannotation(hints[argument]).replace("typing.", "")
                raise InputError(f"{name}.{argument} = {given[argument]!r} is not of type {expected}")
        return function(*args, **kwargs)

    call.__signature__ = signature
    del call.__wrapped__  # gin would look through to it, and a Flax module's metaclass takes any argument
    return call


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The arguments of a call; those of ``__init__`` for a class, since a Flax module's metaclass hides them."""
    if not inspect.isclass(function):
        return inspect.signature(function)
    signature = inspect.signature(function.__init__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
