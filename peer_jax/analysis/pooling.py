"""Which runs a point is a mean of: runs that differ in their seed and in nothing else.

A group is the runs of one series, size, budget and text. Where runs of a group differ in another argument of their
config, that argument becomes a setting, so that they are series of their own.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from peer_jax.analysis.row import Row
from peer_jax.analysis.row_table import value_of

SWEEP = "sweep"
"""The setting that tells sweeps apart. Its value is the directory of the sweep, with its name if there are several."""

# A point is a mean over seeds; each may have grown from a run of its own. Budgets that count as one differ by steps.
MAY_DIFFER = {"Run.seed", "Run.training_flops", "Run.steps"}
OF_SEED = "Run.grown_from"  # may differ between seeds, but not between runs of one seed


def tell_apart(rows: Sequence[Row]) -> list[Row]:
    """Adds to the settings of the rows what runs of a group differ in.

    If all runs of a group belong to sweeps, and runs of the same sweep agree, the sweep becomes the setting, so that
    rates that follow the width do not split a curve. Otherwise the arguments become settings of all rows of the method
    that have them. Rows without a config agree with all others.
    """
    methods = {
        group[0].method
        for group in _groups(rows)
        if _differing(group) and _are_sweeps(group) and not any(map(_differing, _by_sweep(group)))
    }
    rows = [_with(row, {SWEEP: row.sweep}) if row.method in methods and row.sweep is not None else row for row in rows]
    arguments = defaultdict(set)
    for group in _groups(rows):
        arguments[group[0].method] |= _differing(group)
    return [
        _with(row, {name: value_of(row.config[name]) for name in sorted(arguments[row.method]) if name in row.config})
        for row in rows
    ]


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.series, row.size, row.budget, row.cache].append(row)
    yield from groups.values()


def _differing(rows: Sequence[Row]) -> set[str]:
    """The arguments that have several values among the runs that have them."""
    values = defaultdict(set)
    for row in rows:
        for name, value in row.config.items():
            values[name, row.seed if name == OF_SEED else None].add(value)
    return {name for (name, _), own in values.items() if len(own) > 1} - MAY_DIFFER


def _are_sweeps(rows: Sequence[Row]) -> bool:
    """Whether all runs belong to sweeps, and to more than one."""
    sweeps = {row.sweep for row in rows}
    return None not in sweeps and len(sweeps) > 1


def _by_sweep(rows: Sequence[Row]) -> list[list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[row.sweep].append(row)
    return list(found.values())


def _with(row: Row, settings: dict[str, Any]) -> Row:
    """The row with more settings; those that its sweep gave stay as they are."""
    new = {name: value for name, value in settings.items() if name not in row.settings}
    return dataclasses.replace(row, settings=row.settings | new, found=(*row.found, *new)) if new else row
