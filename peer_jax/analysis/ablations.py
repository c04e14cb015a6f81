"""Ablations: what a sweep varied beside method, size, budget and seed, and which kind of figure shows it best."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from peer_jax.analysis.pooling import SWEEP
from peer_jax.analysis.row import Row, unit
from peer_jax.storage import AnyPath

# A name for an axis, and a short name for labels that hold several.
NAMES = {
    "num_heads": ("heads h", "h"),
    "RETRIEVAL_HEADS": ("heads h", "h"),
    "top_k": ("retrieved per head, k", "k"),
    "num_experts": ("number of experts N", "N"),
    "NUM_EXPERTS": ("number of experts N", "N"),
    "MOE_EXPERTS": ("number of coarse experts", "experts"),
    "d_key": ("query width d_key", "d_key"),
    "D_KEY": ("query width d_key", "d_key"),
    "query_norm": ("query norm", "query norm"),
    "QUERY_NORM": ("query norm", "query norm"),
    "score_activation": ("score activation", "scores"),
    "learning_rate": ("learning rate", "rate"),
    "table_learning_rate": ("learning rate of the tables", "table rate"),
    "TABLE_RATE": ("learning rate of the tables", "table rate"),
    "UP_STDDEV": ("initial standard deviation of the up table", "up std"),
    "batch_size": ("batch size", "batch"),
    "weight_decay": ("weight decay", "decay"),
}

UNUSED = "-"
"""Stands for the value of a binding that a run does not use, such as the top-k of a retrieval in a dense model."""

Kind = Literal["line", "heat map", "dots"]
Values = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """The losses of the runs of one size at one budget, by method and by the values of what was varied."""

    budget: float
    size: str
    losses: dict[str, dict[Values, list[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """What one sweep directory varied.

    Attributes:
        text: the name of the text if several are analysed together; otherwise empty.
        varied: the bindings with more than one value; heads before top-k, so that heads become the rows of a heat map.
        values: the combinations that were run, in order.
        panels: one for each budget and size.
        not_causal: the methods that see later tokens.
        unit: what the losses are means over: a token, or an image.
    """

    directory: AnyPath
    text: str
    varied: tuple[str, ...]
    values: tuple[Values, ...]
    kind: Kind
    panels: tuple[Panel, ...]
    not_causal: frozenset[str]
    unit: str

    @property
    def title(self) -> str:
        """The names of what was varied."""
        return " and ".join(readable(name) for name in self.varied)

    def label(self, values: Values) -> str:
        """The name of a combination: only the value where one binding varies."""
        if len(self.varied) == 1:
            return value_text(values[0])
        return ", ".join(f"{letter(n)}={value_text(v)}" for n, v in zip(self.varied, values, strict=True))


def find(rows: Sequence[Row]) -> list[Ablation]:
    """The ablations of the rows, one for each sweep directory (and text) that varied something.

    Of several directories that hold the same runs, the first counts.
    """
    groups = defaultdict(list)
    for row in rows:
        for folder in row.folders:
            groups[folder, row.text].append(row)
    distinct = {frozenset(map(id, own)): place for place, own in sorted(groups.items(), reverse=True)}
    found = (_ablation(*place, groups[place]) for place in sorted(distinct.values()))
    return [ablation for ablation in found if ablation is not None]


def _ablation(directory: AnyPath, text: str, rows: Sequence[Row]) -> Ablation | None:
    seen = defaultdict(dict)
    for row in rows:
        for name, value in row.settings.items():
            seen[name][repr(value)] = value
    varied = [name for name, values in seen.items() if len(values) > 1 or _is_optional(name, rows)]
    if not varied:
        return None
    varied.sort(key=lambda name: (letter(name) == "k", letter(name) != "h"))
    numeric = [name for name in varied if all(map(_is_number, seen[name].values()))]
    combinations = {_key(row, varied): None for row in rows}
    if len(numeric) == len(varied):
        combinations = dict.fromkeys(sorted(combinations, key=lambda values: tuple(map(_rank, values))))

    kind: Kind = "dots"
    if len(varied) == 1 and numeric:
        kind = "line"
    elif len(varied) == 2 and len(numeric) == 2:
        cells = math.prod(len({values[i] for values in combinations}) for i in range(2))
        # Values that were paired one to one lie on a diagonal, and a heat map that is mostly empty says little.
        kind = "heat map" if len(combinations) > cells / 2 else "dots"

    panels = {}
    for row in sorted(rows, key=lambda r: (r.budget, r.params_active)):
        panel = panels.setdefault((row.budget, row.size), Panel(budget=row.budget, size=row.size, losses={}))
        panel.losses.setdefault(row.method, {}).setdefault(_key(row, varied), []).append(row.loss)
    return Ablation(
        directory=directory,
        text=text,
        varied=tuple(varied),
        values=tuple(combinations),
        kind=kind,
        panels=tuple(panels.values()),
        not_causal=frozenset(row.method for row in rows if not row.is_causal),
        unit=unit(rows),
    )


def _is_optional(name: str, rows: Sequence[Row]) -> bool:
    """Whether some runs of a method have a setting and others lack it."""
    having = {row.method for row in rows if name in row.settings}
    return name != SWEEP and any(name not in row.settings for row in rows if row.method in having)


def _key(row: Row, varied: Sequence[str]) -> Values:
    values = (row.settings.get(name, UNUSED) for name in varied)
    return tuple(str(value) if isinstance(value, list | dict) else value for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> float:
    """The place of a value in an order; a run without the value comes first."""
    return float(value) if _is_number(value) else -math.inf


def readable(binding: str) -> str:
    """The name of a binding on an axis."""
    return NAMES.get(binding, NAMES.get(binding.split(".")[-1], (binding, binding)))[0]


def letter(binding: str) -> str:
    """The short name of a binding in a label."""
    return NAMES.get(binding, NAMES.get(binding.split(".")[-1], ("", binding.split(".")[-1])))[1]


def value_text(value: Any) -> str:
    """Writes a value as people do."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return "none" if value is None else str(value)
