"""A sweep as data: methods, sizes, budgets, seeds and bindings to vary, and the runs that they make."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_jax.errors import InputError
from peer_jax.gin_syntax import Binding, Macro, Reference, literal
from peer_jax.layers.checks import check_positive
from peer_jax.training.flops import short

Bindings = Mapping[str, Any]
WIDTHS = ("Transformer.d_model", "ViT.d_model")

# Bindings that are a run's place in the sweep, and the axis that sets them.
PLACES = {"Run.training_flops": "budgets", "Run.steps": "budgets", "Run.seed": "seeds"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs that are to be compared: each of the methods at each size, for each budget and seed, with each setting.

    An axis maps a label to the gin bindings that it stands for. If several bind the same name, the last of
    ``bindings``, methods, sizes, budgets, ``cross`` and ``zip`` wins. Runs that turn out to be the same, such as a
    dense model with another ``PEER.top_k``, are made once.

    Args:
        configs: gin files that every run is stacked from, relative to the folder of the sweep's own file. The
            method's file comes after the first of them: base, layer, size, data.
        bindings: bindings of every run.
        layers: folder of the methods' gin files, relative to the folder of the sweep's own file.
        methods: labels, each with bindings of its own, such as rates that were tuned for it. A label is the name of a
            file in ``layers``, unless ``method_files`` names another.
        method_files: the file of a method, by its label: a name in ``layers``, or the path of a gin file, relative to
            the folder of the sweep's own file. So several methods can share a file and differ in their bindings.
        sizes: labels with bindings, ``Transformer.d_model`` or ``ViT.d_model`` among them.
        budgets: training FLOPs, with bindings such as a batch size, or alone.
        sizes_at: the sizes of a budget that does not have all of them: a larger budget needs larger models.
        seeds: seeds of parameters and data order.
        cross: bindings with the values that each takes; all combinations of the values are run.
        zip: bindings with the values that each takes; the first values are run together, then the second ...
        rate_exponents: exponents of the rates that change with width. The value of such a rate is meant for
            d_model = ``rates_at`` and is multiplied by (d_model / rates_at) ** exponent.
        rates_at: the width at which the rates were tuned.
        tuning: what was tuned and how, in words, for the report.
        baseline: the method that the others are compared with; if None, the method whose layers are plain dense.
        min_steps: a run of fewer steps says nothing and is refused.
        max_epochs: a run that needs more passes over the corpus is refused. Up to 4 passes, repeated text is worth
            nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264). More than one pass is reported.
    """

    configs: Sequence[str]
    methods: Mapping[str, Bindings] | Sequence[str]
    sizes: Mapping[str, Bindings]
    budgets: Mapping[float, Bindings] | Sequence[float]
    sizes_at: Mapping[float, Sequence[str]] = dataclasses.field(default_factory=dict)
    bindings: Bindings = dataclasses.field(default_factory=dict)
    layers: str = "../layers"
    method_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    cross: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    rate_exponents: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rates_at: int | None = None
    tuning: str = ""
    baseline: str | None = None
    min_steps: int = 100
    max_epochs: float = 4.0

    def __post_init__(self) -> None:
        for name in ("configs", "methods", "sizes", "budgets", "seeds"):
            if not getattr(self, name):
                raise InputError(f"Sweep.{name} is empty: name at least one")
            if isinstance(getattr(self, name), str):
                raise InputError(f"Sweep.{name} = {getattr(self, name)!r} is one string: give a list of them")
        for budget in self.budgets:
            check_positive(**{"each of Sweep.budgets": budget})
        for axis in ("methods", "sizes"):
            for label in getattr(self, axis):
                if not label or _word(label) != label:
                    raise InputError(
                        f"Sweep.{axis} has the name {label!r}, which can't be a part of a folder's name: "
                        "use letters, digits, '.', '+' and '-'"
                    )
        for budget, sizes in self.sizes_at.items():
            if budget not in self.budgets:
                raise InputError(f"Sweep.sizes_at has the budget {budget:g}, which is not in Sweep.budgets")
            if isinstance(sizes, str) or not sizes:
                raise InputError(f"Sweep.sizes_at has {sizes!r} at {budget:g}, but it takes a list of names of sizes")
            if unknown := [size for size in sizes if size not in self.sizes]:
                raise InputError(f"Sweep.sizes_at names {unknown[0]!r}, but Sweep.sizes has {', '.join(self.sizes)}")
        for axis in ("cross", "zip"):
            for binding, values in getattr(self, axis).items():
                if isinstance(values, str) or not values:
                    raise InputError(f"Sweep.{axis} has {binding!r}: {values!r}, but it takes a list of values")
        if len({len(values) for values in self.zip.values()}) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in self.zip.items())
            raise InputError(f"Sweep.zip pairs values one to one, but the numbers of values differ: {lengths}")
        if both := sorted(self.cross.keys() & self.zip.keys()):
            raise InputError(f"{both[0]} is in Sweep.cross and in Sweep.zip: leave it in one")
        if self.rate_exponents and self.rates_at is None:
            raise InputError("Sweep.rate_exponents needs Sweep.rates_at, the d_model at which the rates were tuned")
        if self.rates_at is not None:
            check_positive(**{"Sweep.rates_at": self.rates_at})
        if self.baseline is not None and self.baseline not in self.methods:
            raise InputError(
                f"Sweep.baseline = {self.baseline!r} is not one of Sweep.methods: {', '.join(self.methods)}"
            )
        if strange := sorted(self.method_files.keys() - set(self.methods)):
            raise InputError(f"Sweep.method_files names {strange[0]!r}, which is not in Sweep.methods")
        axes = (self.methods, self.sizes, self.budgets)
        each = [bindings for axis in axes for bindings in _axis(axis).values()]
        for bindings in (self.bindings, *each, self.cross, self.zip):
            _refuse_places(bindings)

    def settings(self) -> list[dict[str, Any]]:
        """The combinations of ``cross`` and ``zip``; a single empty one if there are none."""
        crossed = [dict(zip(self.cross, values, strict=True)) for values in itertools.product(*self.cross.values())]
        zipped = [dict(zip(self.zip, values, strict=True)) for values in zip(*self.zip.values(), strict=True)] or [{}]
        return [c | z for c in crossed for z in zipped]

    def describe(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["budgets"] = [[budget, dict(bindings)] for budget, bindings in _axis(self.budgets).items()]
        fields["sizes_at"] = [[budget, list(sizes)] for budget, sizes in self.sizes_at.items()]
        return {name: _plain(value) for name, value in fields.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep: its place on the axes, and the config that makes it."""

    method: str
    size: str
    budget: float
    seed: int
    settings: dict[str, Any]
    files: tuple[str, ...]
    bindings: tuple[Binding, ...]
    imports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its run directory."""
        parts = [self.method, self.size, short(self.budget)]
        parts += [f"{binding.split('.')[-1]}={_word(value)}" for binding, value in self.settings.items()]
        return "-".join([*parts, f"seed{self.seed}"])

    def describe(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        bindings = [f"{binding.name} = {literal(binding.value)}" for binding in self.bindings]
        return vars(self) | {"bindings": bindings, "settings": _plain(self.settings)}


def _plain(value: Any) -> Any:
    """A value that JSON can hold; references and macros are written as in a config."""
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Reference | Macro) else value


def expand(sweep: Sweep, folder: Path, extra: Sequence[Binding] = (), imports: Sequence[str] = ()) -> list[Point]:
    """The runs of a sweep: by budget, then by method, size, setting and seed.

    Args:
        folder: the folder of the sweep's own file.
        extra: bindings of every run, which override all others.
        imports: modules whose names the configs of the runs may use.

    Raises:
        InputError: if a method has no file, if a size has no width but rates change with width, if ``rate_exponents``
            has a name that no run binds, or if ``extra`` binds what an axis sets.
    """
    _refuse_places(binding.name for binding in extra)
    _refuse_axes(sweep, extra)
    methods, budgets = _axis(sweep.methods), _axis(sweep.budgets)
    bound: set[str] = set()
    shared = [_path(folder / file) for file in sweep.configs]
    points = []
    for budget, (method, own), (size, sizing) in itertools.product(budgets, methods.items(), sweep.sizes.items()):
        if size not in sweep.sizes_at.get(budget, sweep.sizes):
            continue
        layer = _method_file(sweep, folder, method)
        for settings, seed in itertools.product(sweep.settings(), sweep.seeds):
            bindings = {**sweep.bindings, **own, **sizing, **budgets[budget], **settings}
            bound |= bindings.keys()
            bindings |= dict(_scaled_rates(sweep, size, bindings))
            bindings |= {"Run.training_flops": float(budget), "Run.seed": seed}
            points.append(
                Point(
                    method=method,
                    size=size,
                    budget=float(budget),
                    seed=seed,
                    settings=settings,
                    files=(shared[0], _path(layer), *shared[1:]),
                    bindings=(*(Binding(name, value, "") for name, value in bindings.items()), *extra),
                    imports=tuple(imports),
                )
            )
    # A method without tables has no table rate. But a rate that no run has would be reported as scaled and never be.
    if unbound := [name for name in sweep.rate_exponents if name not in bound]:
        raise InputError(
            f"Sweep.rate_exponents has {unbound[0]!r}, which no run binds: bind it in Sweep.bindings, "
            "or set Sweep.rate_exponents={}"
        )
    return points


def _method_file(sweep: Sweep, folder: Path, method: str) -> Path:
    """The gin file of a method's layer."""
    name = sweep.method_files.get(method, method)
    file = folder / name if name.endswith(".gin") else folder / sweep.layers / f"{name}.gin"
    if not file.is_file():
        raise InputError(
            f"Sweep.methods names {method!r}, but there is no {_path(file)}: name its file in Sweep.method_files"
        )
    return file


def _refuse_places(names: Iterable[str]) -> None:
    """Raises InputError for a binding that would give a run another budget or seed than its name says."""
    for name in names:
        if axis := PLACES.get(name.strip().removeprefix("peer_jax.")):
            raise InputError(f"{name.strip()} can't be bound in a sweep, which names runs by it: use Sweep.{axis}")


def _refuse_axes(sweep: Sweep, extra: Sequence[Binding]) -> None:
    """Raises InputError for a binding of all runs that would override what the names of some runs say."""
    axes = {"methods": _axis(sweep.methods), "sizes": sweep.sizes, "budgets": _axis(sweep.budgets)}
    bound = {name: axis for axis, labels in axes.items() for bindings in labels.values() for name in bindings}
    bound |= dict.fromkeys(sweep.cross, "cross") | dict.fromkeys(sweep.zip, "zip")
    bound |= dict.fromkeys(sweep.rate_exponents, "rate_exponents")
    for binding in extra:
        if axis := bound.get(binding.name.removeprefix("peer_jax.")):
            raise InputError(
                f"{binding.name} can't be bound for all runs, because Sweep.{axis} sets it: change Sweep.{axis}",
                argument="set",
            )


def _scaled_rates(sweep: Sweep, size: str, bindings: Bindings) -> Iterator[tuple[str, Any]]:
    """The rates that change with width, at this width."""
    for name, exponent in sweep.rate_exponents.items():
        width = next((bindings[binding] for binding in WIDTHS if binding in bindings), None)
        if not isinstance(width, int) or width < 1:
            raise InputError(
                f"Sweep.rate_exponents needs a width, {' or '.join(WIDTHS)}, in Sweep.sizes, but {size!r} binds {width}"
            )
        if name in bindings:
            yield name, _scaled(name, bindings[name], (width / sweep.rates_at) ** exponent)


def _scaled(name: str, rate: Any, factor: float) -> Any:
    """A rate, or each rate of a mapping, times the factor."""
    if isinstance(rate, Mapping):
        return {key: _scaled(name, value, factor) for key, value in rate.items()}
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise InputError(f"{name} is {rate!r}, but Sweep.rate_exponents needs a number to scale: bind one")
    # Rounded to four digits: rates are not known better, and people read them.
    return float(f"{rate * factor:.4g}")


def _axis(values: Mapping | Sequence) -> dict:
    """Labels with their bindings."""
    return dict(values) if isinstance(values, Mapping) else {value: {} for value in values}


def _path(path: Path) -> str:
    """The path without "..", relative to the working directory if it lies there."""
    resolved = path.resolve()
    here = Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)


def _word(value: Any) -> str:
    """A value as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")
