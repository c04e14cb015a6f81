"""Finished runs as rows, read from their directories and from tables of rows that reports and sweeps have written."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peer_jax.analysis import row_table
from peer_jax.analysis.row import Row, distinct, in_order
from peer_jax.analysis.row_table import EARLIER_BASELINE
from peer_jax.errors import InputError
from peer_jax.run_directory import RESULT, RunDirectory, SweepDirectory, find_runs
from peer_jax.storage import AnyPath, as_os_errors, place


def read(places: Sequence[AnyPath]) -> list[Row]:
    """Reads the finished runs of directories, with all below them, and of tables; each run once, see ``distinct``.

    Args:
        places: directories of runs, or folders of them; and tables, which are files that ``row_table.write`` wrote.

    Returns:
        rows, sorted by budget, method, size, settings and seed.

    Raises:
        InputError: if a place holds no finished run, or something that this version can't read.
    """
    rows: list[Row] = []
    for path in map(place, places):
        found = row_table.read(path) if is_table(path) else _of_directory(path)
        if not found:
            missing = "" if is_table(path) else f" (no {RESULT})"
            raise InputError(f"{path} holds no finished run{missing}: give another directory")
        rows += found
    return in_order(distinct(rows))


def is_table(path: AnyPath) -> bool:
    """Whether a place is, or should be, a table of rows and not a directory."""
    with as_os_errors(path):
        return path.suffix == ".csv" or path.is_file()


def _of_directory(directory: AnyPath) -> list[Row]:
    rows: dict[AnyPath, Row] = {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for run in find_runs(directory):
        if run.has_result:
            above = SweepDirectory(run.path.parent)
            if str(above) not in sweeps:
                sweeps[str(above)] = above.sweeps()
            named = (kept for kept in sweeps[str(above)] if kept["runs"] is None or run.name in kept["runs"])
            rows[run.path.resolve()] = row(run, directory, next(named, None), alone=len(sweeps[str(above)]) < 2)
    return list(rows.values())


def row(
    run: RunDirectory, base: str | os.PathLike, kept: Mapping[str, Any] | None = None, *, alone: bool = True
) -> Row:
    """Reads one finished run.

    Args:
        run: the directory of the run.
        base: the directory that the name of the run is relative to.
        kept: the entry of ``SweepDirectory.sweeps`` for the sweep that the run belongs to, if there is one.
        alone: whether that sweep is the only one of its directory.

    Raises:
        InputError: if the run has no result, or one that this version can't read.
    """
    base, kept = place(base), kept or {"name": "", "sweep": {}}
    result, point = run.read_result(), run.read_point()
    if result is None:
        raise InputError(f"{run} holds no finished run (no {RESULT}): give another directory")
    evaluations = result["evaluations"]
    own = evaluations[result["corpus"]["name"]]
    experts = list(own.get("experts", {}).values())

    def mean(name: str) -> float | None:
        return sum(block[name] for block in experts) / len(experts) if experts else None

    folder = run.path
    copied = [
        *("seed", "training_flops", "tokens", "steps", "params_total", "params_active", "d_model"),
        *("num_blocks", "num_experts", "batch_size", "seq_len", "tokens_per_second", "wall_seconds"),
    ]
    return Row(
        run=folder.name if folder.resolve() == base.resolve() else str(folder.relative_to(base)),
        directory=folder,
        method=point.get("method", result["method"]),
        layer=result.get("layer"),
        options=dict(result.get("options") or {}),
        is_causal=result["is_causal"] is not False,
        is_baseline=bool(result.get("is_baseline", result["method"] == EARLIER_BASELINE)),
        baseline=kept["sweep"].get("baseline"),
        sweep=str(folder.parent if alone else folder.parent / kept["name"]) if point else None,
        size=point.get("size", f"d{result['d_model']}"),
        budget=float(point.get("budget", result["training_flops"])),
        settings=point.get("settings", {}),
        config=dict(result.get("config") or {}),
        grown=dict(result.get("grown") or {}),
        epochs=result.get("epochs"),
        flops_per_token=result["forward_flops_per_token"],
        flops_by_part=result["forward_flops_by_part"],
        corpus=result["corpus"]["name"],
        cache=result["corpus"]["cache"],
        device=result["machine"]["device"],
        machine=_machine(result["machine"]),
        side_by_side=_shares(result["machine"]),
        usage=mean("usage"),
        unevenness=mean("unevenness"),
        other_losses={task: values["loss"] for task, values in evaluations.items() if values is not own},
        loss=own["loss"],
        **{name: own.get(name) for name in ("accuracy", "perplexity", "bits_per_byte")},
        **{name: result[name] for name in copied},
    )


def _machine(machine: Mapping[str, Any]) -> str | None:
    """Names what trained a run; None if the result is of an earlier version, which names the kind of device alone."""
    if machine.get("platform") != "cpu":
        devices = machine.get("devices", 1)
        return f"{devices} x {machine['device']}" if devices > 1 else machine["device"]
    if "cores" not in machine:
        return None
    return f"{machine.get('processor') or machine['device']}, {machine['cores']} of {machine['all_cores']} cores"


def _shares(machine: Mapping[str, Any]) -> bool | None:
    """Whether a run had only some of the cores, as each worker of a sweep has; None if that is not known.

    Several workers may share an accelerator, which a result does not say.
    """
    if machine.get("platform") != "cpu":
        return None
    return machine["cores"] < machine["all_cores"] if "cores" in machine else None
