"""Tables of what was measured, a JSON file, and a figure per table."""

import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peer_jax.errors import InputError
from peer_jax.storage import local

Row = dict[str, Any]
MIB = 2**20


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Titles and rows of the tables: one table per op, layer or step, and direction."""
    for (name, direction), own in itertools.groupby(rows, key=lambda row: (row["name"], row["direction"])):
        yield f"{name}, {direction}", list(own)


def sizes(row: Row) -> str:
    """Writes sizes in one line: T=2048 d=256 N=512^2 h=8 k=16."""
    return " ".join(f"{symbol}={value}" for symbol, value in row["sizes"].items())


def seconds(value: float) -> str:
    """Writes seconds with three digits, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _memory(row: Row) -> str:
    value = row["memory"] if row["extra_memory"] is None else row["extra_memory"]
    return "" if value is None else f"{value / MIB:.0f} MiB"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def line(row: Row) -> str:
    """The line that is printed when a row has been measured."""
    return f"{row['name']}, {row['direction']}, {sizes(row)}, {row['shown']}: {seconds(row['median'])}"


# An implementation looks the same in all figures; the colour-blind can tell these colours apart, too.
LOOKS = {
    "reference": ("#000000", "o"),
    "xla": ("#d55e00", "s"),
    "pytorch": ("#0072b2", "^"),
    "pytorch, keeping memory": ("#56b4e9", "v"),
    "mosaic_gpu": ("#009e73", "D"),
    "xla, touched rows": ("#0072b2", "o"),
}
COLUMNS = ("sizes", "implementation", "median", "quartiles", "ratio", "floor, token", "expert", "memory")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The text of a table's cells."""
    return [
        (
            sizes(row),
            row["shown"],
            seconds(row["median"]),
            f"{seconds(row['low'])} to {seconds(row['high'])}",
            f"{row['faster_than_first']:.2f}",
            *(_percent(row["fraction_of_floor"][order]) for order in ("token", "expert")),
            _memory(row),
        )
        for row in rows
    ]


def heading(result: dict[str, Any]) -> str:
    """What the machine was measured to do, and what the columns mean."""
    machine = result["machine"]
    return (
        f"{machine['device']} ({machine['platform']}, {machine['cores']} cores): "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s and {machine['flops_per_second'] / 1e9:.0f} GFLOP/s measured. "
        "ratio: how many times as fast as the first row of the same sizes. floor: share of the measured time that the "
        "fewest bytes and FLOPs need at these rates; - if unknown."
    )


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    for title, rows in tables(result["rows"]):
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for place, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place < 2)
        for line in cells(rows):
            table.add_row(*line)
        console.print(table, end="\n\n")
    console.print(heading(result), highlight=False)
    for note in result["notes"]:
        console.print(f"left out: {note}", highlight=False, markup=False)


def make_folder(folder: Path) -> None:
    """Makes the folder that ``write`` fills. Call it before measuring, so that nothing is measured in vain.

    Raises:
        InputError: if the folder can't be made or written to.
    """
    try:
        local(folder, "out").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder} can't be written to ({error.strerror}): name another folder", argument="out"
        ) from error


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes WHAT.json and, if matplotlib is installed, a PNG per table into ``folder``; returns the files' paths."""
    make_folder(folder)
    options = result["options"]
    stem = options["what"] + (f"-{options['against']}" if options["against"] else "")
    written = [folder / f"{stem}.json"]
    written[0].write_text(json.dumps(result, indent=1) + "\n")
    try:
        from peer_jax.analysis.style import png
    except ImportError:
        return written
    for title, rows in tables(result["rows"]):
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        written.append(folder / f"{stem}-{slug}.png")
        written[-1].write_bytes(png(figure_of(title, rows)))
    return written


def figure_of(title: str, rows: Sequence[Row]):
    """Seconds of each implementation with quartiles and floors: a line per size or, for steps, a curve against N."""
    from matplotlib.lines import Line2D

    from peer_jax.analysis.style import QUIET, Style, figure, house_style, legend, log_axis

    with house_style():
        labels = list(dict.fromkeys(sizes(row) for row in rows))
        against_n = rows[0]["what"] == "step" and len({row["num_experts"] for row in rows}) == len(labels) > 1
        names = dict.fromkeys(row["shown"] for row in rows)
        looks = {name: Style(name, *LOOKS.get(name, ("#7f5aa2", "v")), "-") for name in names}
        made, (axes,) = figure(1, 1, height=4.0 if against_n else 1.6 + 0.34 * len(labels), width=8.0)
        axes.set_title(title)
        for name, look in looks.items():
            own = [row for row in rows if row["shown"] == name]
            place = [row["num_experts"] if against_n else labels.index(sizes(row)) for row in own]
            medians = [row["median"] for row in own]
            spread = [[row["median"] - row["low"] for row in own], [row["high"] - row["median"] for row in own]]
            how = {"fmt": look.marker, "color": look.colour, "ms": 6.5, "mec": "white", "mew": 0.8, "elinewidth": 1.6}
            if against_n:
                axes.errorbar(place, medians, yerr=spread, ls="-", lw=1.2, **how)
            else:
                axes.errorbar(medians, place, xerr=spread, **how)
        keys = [look.key(linestyle="") for look in looks.values()]
        least = {label: row["floor"] for label, row in zip(map(sizes, rows), rows, strict=True)}
        values = [row["median"] for row in rows]
        for order, marker in (("token", "|"), ("expert", "1"))[: 1 if against_n else 2]:
            known = [label for label in labels if least[label][order] is not None]
            if not known:
                continue
            floors = [least[label][order]["seconds"] for label in known]
            values += floors
            if against_n:
                counts = {sizes(row): row["num_experts"] for row in rows}
                axes.plot([counts[label] for label in known], floors, ":", color=QUIET)
                keys.append(Line2D([], [], ls=":", color=QUIET, label="floor"))
            else:
                axes.plot(floors, [labels.index(label) for label in known], marker, ms=10, color=QUIET)
                keys.append(Line2D([], [], ls="", marker=marker, ms=10, color=QUIET, label=f"floor, {order} order"))
        if against_n:
            counts = sorted({row["num_experts"] for row in rows})
            log_axis(axes.xaxis, counts[0], counts[-1])
            axes.set_xticks(counts, [f"{math.isqrt(n)}²" if math.isqrt(n) ** 2 == n else str(n) for n in counts])
            axes.set_xlabel("experts N")
            axes.set_ylabel("seconds per step")
            log_axis(axes.yaxis, min(values), max(values), write=lambda value: f"{value:g}")
        else:
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_xlabel("seconds")
            log_axis(axes.xaxis, min(values), max(values), write=seconds)
        legend(made, keys)
        return made
