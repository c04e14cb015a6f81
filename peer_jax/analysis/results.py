"""Finished runs as rows: read from their directories, written as one tidy ``results.csv``."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer_jax import run_directory
from peer_jax.errors import InputError

POINT = "point.json"
FAILURE = "failure.json"
SWEEP = "sweep.json"
RESULTS = "results.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run.

    ``budget`` is what it was given, ``training_flops`` what it spent; ``settings`` are the bindings that its sweep
    varies beside method, size, budget and seed. Losses are in nats per token, on the validation split of the run's own
    task; ``other_losses`` by task. ``usage`` and ``unevenness`` are means over the blocks that route. Unknown: None.
    """

    run: str
    directory: Path
    method: str
    is_causal: bool
    size: str
    budget: float
    seed: int
    settings: dict[str, Any]
    loss: float
    perplexity: float
    bits_per_byte: float
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
    def series(self) -> str:
        """Method and settings: what a curve joins."""
        settings = ", ".join(f"{name.split('.')[-1]}={value}" for name, value in self.settings.items())
        return f"{self.method}, {settings}" if settings else self.method


def read(directories: Sequence[Path]) -> list[Row]:
    """The finished runs in the directories and below, by budget, method, size, settings and seed.

    Raises:
        InputError: if a directory holds none, or a result of another version.
    """
    rows = {}
    for directory in directories:
        paths = sorted(directory.rglob(run_directory.RESULT))
        if not paths:
            raise InputError(f"{directory} holds no finished run (no result.json): give another directory")
        for path in paths:
            try:
                rows[path.parent.resolve()] = _row(path.parent, directory)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{path} or {POINT} beside it is not of a run of this version: remove them, or report others"
                ) from error
    return sorted(rows.values(), key=lambda r: (r.budget, r.method, r.params_active, str(r.settings), r.seed, r.run))


def _row(folder: Path, directory: Path) -> Row:
    result = run_directory.RunDirectory(folder).read_result()
    if result is None:
        raise ValueError("no result of this version")
    point = read_json(folder / POINT) or {}
    evaluations = result["evaluations"]
    own = evaluations[result["corpus"]["name"]]
    experts = list(own.get("experts", {}).values())

    def mean(name: str) -> float | None:
        return sum(block[name] for block in experts) / len(experts) if experts else None

    copied = [
        *("method", "is_causal", "seed", "training_flops", "tokens", "steps", "params_total", "params_active"),
        *("d_model", "num_blocks", "num_experts", "batch_size", "seq_len", "tokens_per_second", "wall_seconds"),
    ]
    return Row(
        run=folder.name if folder.resolve() == directory.resolve() else str(folder.relative_to(directory)),
        directory=folder,
        size=point.get("size", f"d{result['d_model']}"),
        budget=float(point.get("budget", result["training_flops"])),
        settings=point.get("settings", {}),
        epochs=result.get("epochs"),
        flops_per_token=result["forward_flops_per_token"],
        flops_by_part=result["forward_flops_by_part"],
        corpus=result["corpus"]["name"],
        cache=result["corpus"]["cache"],
        device=result["machine"]["device"],
        usage=mean("usage"),
        unevenness=mean("unevenness"),
        other_losses={task: values["loss"] for task, values in evaluations.items() if values is not own},
        **{name: own[name] for name in ("loss", "perplexity", "bits_per_byte")},
        **{name: result[name] for name in copied},
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One row a run; a column for each binding in any row's settings and for each further task."""
    settings = sorted({name for row in rows for name in row.settings})
    tasks = sorted({task for row in rows for task in row.other_losses})
    parts = sorted({part for row in rows for part in row.flops_by_part})
    plain = [f.name for f in dataclasses.fields(Row) if f.type not in (dict[str, Any], dict[str, float], Path)]
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
    run_directory.write_whole(path, text.getvalue())


def _cell(value: Any) -> Any:
    """What isn't known is empty, and floats keep all their digits."""
    return "" if value is None else repr(value) if isinstance(value, float) else value


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file says; None if it isn't there or was left half-written."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
