"""Configs: from files and bindings to a run, as a value.

A config names classes and functions and binds their arguments, ``PEER.num_experts = 16384``. What is loaded is resolved
at once into a tree: for each class or function that the run uses, its arguments with the defaults spelled out. A run's
factories, its canonical text and its fields are made from that tree alone, so two loaded runs live side by side.

What can be named is listed in ``peer_jax.config.resolve`` and defined in the modules that a config imports; the library
itself carries no decorators.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from peer_jax.config.resolve import Resolver, Source, layers_of
from peer_jax.config.tree import Node, call, flat, symbolic, text_of
from peer_jax.data.vocabulary import BYTES
from peer_jax.errors import InputError
from peer_jax.fields import Difference
from peer_jax.gin_syntax import Binding, Parsed, Reference, parse_binding, parse_file, parse_text
from peer_jax.run_directory import RunDirectory
from peer_jax.storage import AnyPath, is_in_bucket, place
from peer_jax.sweeps.sweep import Sweep
from peer_jax.training.run import Run

CORPORA = ("TextTask.corpus", "ImageTask.corpus")  # what names a text, and images

__all__ = ["BEFORE", "Binding", "Config", "begun_with", "layers_of", "load", "load_grown", "load_kept", "load_sweep"]

# What runs did before an argument existed, where its default does something else: {"AdamW.new_argument": value}. A
# ``config.gin`` has every argument of its time, so one that lacks an argument was written before it existed.
BEFORE: dict[str, Any] = {
    "local_files.split": "documents",
    "TextTask.cut_at_limits": False,
    "AdamW.rounding": "nearest",
}


def begun_with(kept: str) -> dict[str, Any]:
    """Those of ``BEFORE`` that a run was begun with, by the text of its ``config.gin``, for ``load``.

    Raises:
        InputError: if the text is no config.
    """
    return _begun_with(parse_text(kept, "the kept config.gin"))


def _begun_with(kept: Parsed) -> dict[str, Any]:
    names = [name.rpartition("/")[2] for name in _names(kept.bindings)]
    places = {name.partition(".")[0] for name in names}
    return {name: value for name, value in BEFORE.items() if name not in names and name.partition(".")[0] in places}


def load(
    files: Sequence[str | os.PathLike],
    bindings: Sequence[str | Binding] = (),
    imports: Sequence[str] = (),
    *,
    before: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """The run that a stack of config files and bindings describes; later ones override earlier ones.

    Args:
        files: config files.
        bindings: texts such as ``PEER.top_k=8``, or bindings.
        imports: names of modules whose classes and functions the config may name, beside those that files import.
        before: defaults that take the place of today's, so that a run goes on as an earlier version began it.

    Raises:
        InputError: for a missing file, an unknown name, a value of the wrong type or one that is not set.
    """
    return _run(Source.read(files, bindings, imports, before))


def load_kept(
    kept: str | os.PathLike,
    files: Sequence[str | os.PathLike] = (),
    bindings: Sequence[str | Binding] = (),
    imports: Sequence[str] = (),
) -> Run:
    """The run that a run directory's ``config.gin`` describes, with files of other text and bindings over it.

    Arguments that the file lacks have the value that they had when it was written. If the run directory has a copy of
    the run's SentencePiece model, the copy is used.

    Args:
        kept: the ``config.gin`` of a run directory.
        files: config files, each of which names a text by ``TextTask.corpus``, or images by ``ImageTask.corpus``. None
            of the arguments of the run's own corpus remain then.
        bindings: as for ``load``.
        imports: as for ``load``.

    Raises:
        InputError: as ``load``, or if a file names no text or images, or not what the run is of.
    """
    corpora = {file: [name for name in CORPORA if name in _names(parse_file(file).bindings)] for file in files}
    for file, found in corpora.items():
        if not found:
            raise InputError(
                f"{file} names no text: give a file that binds {' or '.join(CORPORA)}, such as those of configs/data",
                argument="data",
            )
    try:
        parsed = _parse_kept(place(kept))
        own = [name for name in CORPORA if name in _names(parsed.bindings)]
        for file, found in corpora.items():
            if own and not set(own) & set(found):
                raise InputError(f"{file} binds {found[0]}, but the run has {own[0]}", argument="data")
        source = Source.read([parsed, *files], bindings, imports, before=BEFORE)
        return _run(_of_kept(source, RunDirectory(place(kept).parent), bool(files)))
    except InputError as error:  # no flag has given what stands in that file
        raise InputError(str(error), argument="set" if error.argument == "set" else None) from error


def load_grown(
    kept: str | os.PathLike,
    source: str,
    num_experts: int,
    checkpoint: str = "last",
    files: Sequence[str | os.PathLike] = (),
    bindings: Sequence[str | Binding] = (),
    imports: Sequence[str] = (),
) -> Run:
    """The run of ``kept`` with other numbers of experts, which begins with a checkpoint of another run.

    Args:
        kept: the ``config.gin`` of the run to grow from; or, once it has begun, that of the run itself.
        source: the directory of the run to grow from.
        num_experts: of each layer that says how many experts it has.
        checkpoint: "last", "best" or a step.
        files, bindings: config files and bindings over all that.
        imports: as for ``load``.

    Raises:
        InputError: as ``load``, or if no layer says how many experts it has.
    """
    parsed = _parse_kept(place(kept))
    sizes = [binding.name for binding in parsed.bindings if binding.name.endswith(".num_experts")]
    if not sizes:
        raise InputError(f"{source} has no layer with num_experts, so nothing can grow: give another", argument="from")
    growth = [Binding(name, num_experts, "") for name in sizes]
    at = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    growth += [Binding("Run.grown_from", source, ""), Binding("Run.grown_at", at, "")]
    return _run(Source.read([parsed, *files], [*growth, *bindings], imports, _begun_with(parsed)))


def _parse_kept(kept: AnyPath) -> Parsed:
    """The statements of a ``config.gin``, which may be in a bucket."""
    return parse_text(kept.read_text(), str(kept)) if is_in_bucket(kept) else parse_file(kept)


def _of_kept(source: Source, directory: RunDirectory, other_text: bool) -> Source:
    """A source that begins with a kept ``config.gin``, with the run directory's copy of the SentencePiece model."""
    own, before = list(source.parsed[0].bindings), source.before
    over = source.bindings[len(own) :]
    if (copy := directory.vocabulary) is not None:
        for at, binding in enumerate(own):
            if binding.name.endswith("TextTask.vocabulary") and binding.value != BYTES:
                own[at] = dataclasses.replace(binding, value=str(copy))
    corpus = [binding.value for binding in own if _names([binding])[0] in CORPORA]
    if other_text and corpus and isinstance(corpus[-1], Reference):
        place = f"{corpus[-1].name}."
        own = [binding for binding in own if not binding.name.startswith(place)]
        before = {name: value for name, value in before.items() if not name.startswith(place)}
    return dataclasses.replace(source, bindings=(*own, *over), before=before)


def _names(bindings: Sequence[Binding]) -> list[str]:
    return [binding.name.removeprefix("peer_jax.") for binding in bindings]


def load_sweep(
    files: Sequence[str | os.PathLike], bindings: Sequence[str | Binding] = (), imports: Sequence[str] = ()
) -> tuple[Sweep, list[Binding], tuple[str, ...]]:
    """The sweep that files and bindings describe; those of the bindings that are its runs', and what its runs import.

    Raises:
        InputError: as ``load``.
    """
    parsed = [parse_binding(binding) if isinstance(binding, str) else binding for binding in bindings]
    own = [binding for binding in parsed if binding.name.removeprefix("peer_jax.").startswith("Sweep.")]
    source = Source.read(files, own, imports)
    root = source.resolver().node(Reference("Sweep", called=True), "")
    sweep = call(root, {name: symbolic(value) for name, value in root.arguments.items() if name in root.bound})
    return sweep, [binding for binding in parsed if binding not in own], source.imports


def _run(source: Source) -> Run:
    resolver = source.resolver()
    root = resolver.node(Reference("Run", called=True), "")
    resolver.refuse_unknown_scopes(source)
    run = root.build()
    object.__setattr__(run, "config", Config.of(root, resolver, source.imports))
    layers = [name for name in _names(source.bindings) if name.endswith(".sparse_ffw")]
    taken = [name for name in run.config.fields if name.endswith(".sparse_ffw")]
    if layers and taken and not any(run.config.uses(name) for name in layers):
        raise InputError(f"{layers[-1]} is set, but the model of this run takes {taken[0]}: set that")
    return run


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run as a value: see ``peer_jax.fields.RunConfig``."""

    text: str
    fields: Mapping[str, str]
    identity: Mapping[str, str]
    model: Mapping[str, str]
    imports: tuple[str, ...]
    used: frozenset[str] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, root: Node, resolver: Resolver, imports: tuple[str, ...]) -> "Config":
        """The config of a resolved run."""
        return cls(
            text=text_of(root, imports),
            fields=dict(flat(root)),
            identity=dict(sorted(flat(root, identity=True))),
            model=dict(sorted(flat(root.arguments["model"], identity=True))) if "model" in root.arguments else {},
            imports=imports,
            used=frozenset(resolver.used),
        )

    def uses(self, name: str) -> bool:
        """Whether a binding of this name has an effect on the run."""
        return name.removeprefix("peer_jax.") in self.used

    def difference(self, kept: str, *, of_model: bool = False) -> Difference | None:
        """The first argument of identity in which a run differs that was begun with the config text ``kept``."""
        source = Source.of([parse_text(kept, "the kept config.gin")], self.imports, BEFORE)
        resolver = source.resolver()
        root = resolver.node(Reference("Run", called=True), "")
        then = Config.of(root, resolver, source.imports)
        before, now = (then.model, self.model) if of_model else (then.identity, self.identity)
        return next(differences(before, now), None)

    def kept(self, workdir: str) -> Run:
        """The run that the ``config.gin`` of another run's directory describes."""
        return load_kept(RunDirectory(workdir).kept_config())


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    """The names with other values in two sets of fields, in order."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield Difference(name, before.get(name, "unset"), now.get(name, "unset"))
