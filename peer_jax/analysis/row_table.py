"""The table of rows, ``results.csv``: one line per run, with all of a run that an analysis needs."""

import ast
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from etils import epath
from pydantic import BaseModel, Field, Json, ValidationError

from peer_jax import storage
from peer_jax.analysis.row import Row
from peer_jax.errors import InputError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]

TASK, PART = "loss/", "flops_per_token/"
"""The first words of the columns of further losses, and of the parts of the FLOPs."""

# A result or a table of an earlier version does not say whether its layer is the baseline. There it has this name.
EARLIER_BASELINE = "Dense"

WAY_OUT = "mend it, or give the directories of the runs"


class Line(BaseModel):
    """The columns of the table, in order; further columns hold settings, further losses and parts of the FLOPs.

    An empty cell means that a value is not known. Columns that earlier versions did not write have defaults.

    Attributes:
        directories: those that hold the run; earlier versions did not write them.
        settings: what the sweep varied. Each setting has a column, too, which people read, with what an analysis found
            to differ beside. Earlier versions wrote only those columns.
    """

    run: Name
    directories: Json[Annotated[list[Name], Field(min_length=1)]] | None = None
    method: Name
    layer: str | None = None
    options: Json[dict[str, Any]] = {}
    is_baseline: bool | None = None
    baseline: str | None = None
    sweep: str | None = None
    is_causal: bool
    size: Name
    budget: Amount
    seed: Count
    loss: float
    accuracy: Part | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    training_flops: Amount
    tokens: Size
    steps: Size
    epochs: Part | None = None
    params_total: Size
    params_active: Size
    flops_per_token: Amount
    d_model: Size
    num_blocks: Size
    num_experts: Size | None = None
    batch_size: Size
    seq_len: Size
    usage: float | None = None
    unevenness: float | None = None
    tokens_per_second: Part | None = None
    wall_seconds: Part
    corpus: Name
    cache: Name
    device: Name
    machine: str | None = None
    side_by_side: bool | None = None
    settings: Json[dict[str, Any]] | None = None
    grown: Json[dict[str, Any]] = {}
    config: Json[dict[str, str]] = {}


REQUIRED = [name for name, field in Line.model_fields.items() if field.is_required()]
LAST = "config"  # so that a file that was cut off ends within JSON


def write(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes one line per run, with a column for each setting, further task and part of the FLOPs that any run has.

    Raises:
        InputError: if the file can't be written.
    """
    settings = sorted({name for row in rows for name in row.settings} - Line.model_fields.keys())
    tasks = sorted({task for row in rows for task in row.other_losses})
    parts = list(dict.fromkeys(part for row in rows for part in row.flops_by_part))  # figures keep their order
    plain = [name for name in Line.model_fields if name != LAST]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*plain, *settings, *(TASK + task for task in tasks), *(PART + part for part in parts), LAST])
    for row in rows:
        # Settings are written even if there are none, because tables of earlier versions have none of this column.
        varied = json.dumps(row.varied, sort_keys=True, default=str)
        values = vars(row) | {"directories": json.dumps([str(place) for place in row.places]), "settings": varied}
        table.writerow(
            [
                *(_cell(values[name]) for name in plain),
                *(str(row.settings[name]) if name in row.settings else "" for name in settings),
                *(_cell(row.other_losses.get(task)) for task in tasks),
                *(_cell(row.flops_by_part.get(part)) for part in parts),
                _cell(row.config),
            ]
        )
    storage.write_whole(path, text.getvalue())


def _cell(value: Any) -> Any:
    """The text of a value: empty where it is not known, all digits of a float, JSON for a dict."""
    if value is None or value == {}:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, default=str)
    return repr(value) if isinstance(value, float) else value


def read(path: epath.Path) -> list[Row]:
    """Reads the rows of a table that this version or an earlier one wrote.

    Raises:
        InputError: if there is no such file, or it is no such table; with the line and the column.
    """
    lines = _lines(path)
    _, columns = next(lines, (1, []))
    if missing := [name for name in REQUIRED if name not in columns]:
        raise InputError(
            f"{path} line 1 has no column {missing[0]!r}, so it is no table of runs: give a results.csv that a sweep "
            "or a report wrote"
        )
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"{path} line 1 has the column {twice[0]!r} twice: {WAY_OUT}")
    return [_row(path, number, columns, cells) for number, cells in lines]


def _lines(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of the lines that are not empty, with their numbers."""
    try:
        content = storage.read(path)
        text = None if content is None else content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise storage.refusal(error, f"{path} can't be read ({error}): {WAY_OUT}") from error
    if text is None:
        raise InputError(f"{path} is not there: give a results.csv, or the directory of a sweep or a run")
    if text and not text.endswith(("\n", "\r")):
        number = len(text.splitlines())
        raise InputError(f"{path} line {number} has no line end, so the file may be cut off: {WAY_OUT}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is no CSV ({error}): {WAY_OUT}") from error


def _row(path: epath.Path, number: int, columns: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(columns):
        at = f"at column {columns[len(cells)]!r}" if len(cells) < len(columns) else f"after column {columns[-1]!r}"
        raise InputError(
            f"{path} line {number} has {len(cells)} cells where line 1 has {len(columns)}, {at}: {WAY_OUT}"
        )
    known = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    try:
        line = Line.model_validate({name: known[name] for name in Line.model_fields if name in known})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = str(first["loc"][0])
        found = f", not {known[column][:60]!r}" if column in known else ""
        raise InputError(
            f"{path} line {number} column {column!r} is damaged ({first['msg']}{found}): {WAY_OUT}"
        ) from error
    values = {name: getattr(line, name) for name in Line.model_fields if name != "directories"}
    written = {name: cell for name, cell in known.items() if name not in Line.model_fields}
    if line.settings is None:
        is_setting = (name for name in written if not name.startswith((TASK, PART)))
        values["settings"] = {name: value_of(written[name]) for name in is_setting}
    if line.is_baseline is None:
        values["is_baseline"] = (line.layer or line.method) == EARLIER_BASELINE
    parts = _numbers(path, number, PART, written)
    if line.settings is None:  # earlier versions wrote 0 for a part that a model does not have
        parts = {part: flops for part, flops in parts.items() if flops}
    # Rows of an earlier version are where the table is, as far as is known.
    try:
        directory, *copies = map(epath.Path, line.directories or [path.parent / line.run])
    except (KeyError, ValueError) as error:  # an address that is neither of a local folder nor of a bucket
        raise InputError(f"{path} line {number} column 'directories' is damaged ({error}): {WAY_OUT}") from error
    return Row(
        **values,
        directory=directory,
        copies=tuple(copies),
        other_losses=_numbers(path, number, TASK, written),
        flops_by_part=parts,
        table=path,
    )


def _numbers(path: epath.Path, number: int, prefix: str, cells: Mapping[str, str]) -> dict[str, float]:
    """The numbers of the columns with a prefix, by the rest of their names."""
    found = {}
    for column, cell in cells.items():
        if column.startswith(prefix):
            try:
                found[column.removeprefix(prefix)] = float(cell)
            except ValueError as error:
                raise InputError(
                    f"{path} line {number} column {column!r} is damaged (no number: {cell[:60]!r}): {WAY_OUT}"
                ) from error
    return found


def value_of(text: str) -> Any:
    """The value that Python or a config writes as ``text``; the text itself where it is no plain value."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
