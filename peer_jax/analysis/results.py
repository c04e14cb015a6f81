"""Finished runs as rows: read from their directories, written as one tidy table."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peer_jax.errors import InputError
from peer_jax.run_directory import RESULT, RunDirectory, SweepDirectory, find_runs
from peer_jax.storage import AnyPath, place, write_whole

# A result of an earlier version does not say whether its layer is the baseline. There the baseline has this method.
EARLIER_BASELINE = "Dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run. A field whose value is not known is None.

    Attributes:
        method: the label that the sweep gives the method; without a sweep, the name that the layer gives itself.
        layer: the name of the layer.
        options: the options of the layer that differ from their defaults.
        is_baseline: whether the layer says that others are compared with it.
        baseline: the label of the method that the sweep names as its baseline.
        sweep: the directory of the sweep that the run belongs to, with the sweep's name if the directory has several;
            None if the run belongs to no sweep.
        budget: the training FLOPs that the run was given; ``training_flops`` is what it spent.
        settings: what the sweep varies beside method, size, budget and seed, and after ``isoflop.analyse`` also the
            arguments in which runs were found to differ.
        found: the names of those ``settings`` that no sweep varied.
        config: the arguments that decide the numbers of the run, as a config writes them.
        grown: the steps and FLOPs that the run had spent when its pool of experts grew; empty if it has not grown.
        text: the name of the text if several are analysed together; otherwise empty.
        is_causal: False if tokens see the later ones that they are to predict. True for images, of which no token is
            predicted.
        loss: nats per token, or per image, on the validation split of the run's own task.
        accuracy: the share of the images that were classified rightly; None for text.
        other_losses: losses on further tasks, by task.
        usage, unevenness: means over the blocks that route.
    """

    run: str
    directory: AnyPath
    method: str
    layer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_baseline: bool = False
    baseline: str | None = None
    sweep: str | None = None
    is_causal: bool
    size: str
    budget: float
    seed: int
    settings: dict[str, Any]
    found: tuple[str, ...] = ()
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    grown: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    loss: float
    accuracy: float | None = None
    perplexity: float | None
    bits_per_byte: float | None
    training_flops: float
    tokens: int
    steps: int
    epochs: float | None
    params_total: int
    params_active: int
    flops_per_token: float
    flops_by_part: dict[str, float]
    d_model: int
    num_blocks: int
    num_experts: int | None
    batch_size: int
    seq_len: int
    usage: float | None
    unevenness: float | None
    tokens_per_second: float | None
    wall_seconds: float
    corpus: str
    cache: str
    device: str
    other_losses: dict[str, float]

    @property
    def unit(self) -> str:
        """What the loss is a mean over: a token, or an image."""
        return "token" if self.accuracy is None else "image"

    @property
    def varied(self) -> dict[str, Any]:
        """The settings that the sweep varied."""
        return {name: value for name, value in self.settings.items() if name not in self.found}

    @property
    def series(self) -> str:
        """The name of the curve that the run is a point of: method, settings and text."""
        return self._named(self.settings)

    @property
    def family(self) -> str:
        """The series without the settings that the sweep varied."""
        return self._named({name: value for name, value in self.settings.items() if name in self.found})

    def _named(self, settings: Mapping[str, Any]) -> str:
        short = [name.split(".")[-1] for name in settings]
        # Two names with the same last part are written in full.
        names = [last if short.count(last) == 1 else name for name, last in zip(settings, short, strict=True)]
        values = [f"{name}={value}" for name, value in zip(names, settings.values(), strict=True)]
        return ", ".join([self.method, *values, *([f"on {self.text}"] if self.text else [])])


NOT_IN_TABLE = {"directory", "is_baseline", "baseline", "sweep", "found", "config", "grown", "text"}
SEVERAL_COLUMNS = {"settings", "other_losses", "flops_by_part"}


def read(directories: Sequence[AnyPath]) -> list[Row]:
    """Reads the finished runs in the directories and below; sorted by budget, method, size, settings and seed.

    Raises:
        InputError: if a directory holds no finished run, or a result that this version can't read.
    """
    rows: dict[AnyPath, Row] = {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for directory in directories:
        directory = place(directory)
        runs = [run for run in find_runs(directory) if run.has_result]
        if not runs:
            raise InputError(f"{directory} holds no finished run (no {RESULT}): give another directory")
        for run in runs:
            above = SweepDirectory(run.path.parent)
            if str(above) not in sweeps:
                sweeps[str(above)] = above.sweeps()
            named = (kept for kept in sweeps[str(above)] if kept["runs"] is None or run.name in kept["runs"])
            rows[run.path.resolve()] = row(run, directory, next(named, None), alone=len(sweeps[str(above)]) < 2)
    return in_order(rows.values())


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorts rows by budget, method, size, settings and seed."""
    return sorted(rows, key=lambda r: (r.budget, r.method, r.params_active, str(r.settings), r.seed, r.run))


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
        usage=mean("usage"),
        unevenness=mean("unevenness"),
        other_losses={task: values["loss"] for task, values in evaluations.items() if values is not own},
        loss=own["loss"],
        **{name: own.get(name) for name in ("accuracy", "perplexity", "bits_per_byte")},
        **{name: result[name] for name in copied},
    )


def unit(rows: Iterable[Row]) -> str:
    """What the losses of the rows are means over."""
    return " or ".join(sorted({row.unit for row in rows}, reverse=True)) or "token"


def write_csv(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes one line per run, with a column for each setting, further task and part of the FLOPs that any run has.

    Raises:
        InputError: if the file can't be written.
    """
    settings = sorted({name for row in rows for name in row.settings})
    tasks = sorted({task for row in rows for task in row.other_losses})
    parts = sorted({part for row in rows for part in row.flops_by_part})
    plain = [f.name for f in dataclasses.fields(Row) if f.name not in NOT_IN_TABLE | SEVERAL_COLUMNS]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*plain, *settings, *(f"loss/{t}" for t in tasks), *(f"flops_per_token/{p}" for p in parts)])
    for row in rows:
        table.writerow(
            [
                *(_cell(getattr(row, name)) for name in plain),
                *(str(row.settings[name]) if name in row.settings else "" for name in settings),
                *(_cell(row.other_losses.get(task)) for task in tasks),
                *(_cell(row.flops_by_part.get(part, 0.0)) for part in parts),
            ]
        )
    write_whole(path, text.getvalue())


def _cell(value: Any) -> Any:
    """The text of a value: empty where it is not known, all digits of a float, JSON for a dict."""
    if value is None or value == {}:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, default=str)
    return repr(value) if isinstance(value, float) else value
