"""How figures look: a colour, marker and line for each series, round ticks, and files whose bytes are reproducible."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from peer_jax.analysis.isoflop import Analysis
from peer_jax.analysis.reading import named, si

SETTINGS = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "hatch.linewidth": 0.6,
    # A dollar sign in a name is not the start of a formula.
    "text.parse_math": False,
    # Without a fixed salt, the names inside an SVG are random.
    "svg.hashsalt": "peer_jax",
}
WIDTH = 9.6
QUIET = "#5f5f5f"

# The colours of Okabe and Ito and some more, which the colour-blind can tell apart. Markers and lines tell series apart
# in print without colour.
BASELINE_LOOK = ("#000000", "o")
PALETTE = [
    *(("#d55e00", "s"), ("#0072b2", "^"), ("#009e73", "D"), ("#cc79a7", "v"), ("#e69f00", "P"), ("#56b4e9", "X")),
    *(("#7f5aa2", "<"), ("#8c6d31", ">"), ("#6b6b6b", "h"), ("#b8a800", "p"), ("#a6761d", "*"), ("#1b7f7a", "8")),
]
SPARE_LINES = ("-", (0, (6, 1.5)), (0, (3, 1.2, 1, 1.2)))
NOT_CAUSAL_LINE = (0, (4, 2.2))


@dataclasses.dataclass(frozen=True)
class Style:
    """How a series is drawn, and what it is called."""

    label: str
    colour: str
    marker: str
    line: Any

    def key(self, **how: Any) -> Line2D:
        """The entry of the series in a legend."""
        settings = {"color": self.colour, "marker": self.marker, "linestyle": self.line, "lw": 1.8, "ms": 7}
        return Line2D([], [], label=self.label, **settings | {"mec": "white", "mew": 0.8} | how)


def brief(text: str, most: int = 44) -> str:
    """Shortens words in a figure, which must leave room for the figure. The tables have them whole."""
    return text if len(text) <= most else text[: most - 1] + "…"


def looks(analysis: Analysis) -> dict[str, Style]:
    """A style for each family, series and method of an analysis, so that all its figures draw them alike.

    The baseline has black circles. The others take their colours from the palette, first families and then the series
    with settings, each in sorted order.
    """
    ranks: dict[str, tuple[int, str]] = {}
    is_causal: dict[str, bool] = {}
    for row in analysis.rows:
        for rank, name in enumerate((row.family, row.series, row.method)):
            ranks[name] = min(ranks.get(name, (rank, name)), (rank, name))
            is_causal[name] = is_causal.get(name, True) and row.is_causal
    families = {(row.family, row.method) for row in analysis.rows if row.method in analysis.baselines}
    names = sorted(ranks, key=ranks.__getitem__)
    return styles([(name, is_causal[name]) for name in names], baseline=min(families, default=()))


def styles(series: Sequence[tuple[str, bool]], baseline: Collection[str] = ()) -> dict[str, Style]:
    """A style for each of (series, whether it is causal): black circles for the baseline, the palette for others."""
    causal = dict(series)
    labels = {name: brief(named(name, is_causal)) for name, is_causal in causal.items()}
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    found, taken = {}, 0
    for name, is_causal in causal.items():
        if name in baseline:
            (colour, marker), line = BASELINE_LOOK, "-"
        else:
            colour, marker = PALETTE[taken % len(PALETTE)]
            line = SPARE_LINES[taken // len(PALETTE) % len(SPARE_LINES)]
            taken += 1
        # Two series must not have the same label because their names were shortened.
        label = named(name, is_causal) if labels[name] in shared else labels[name]
        found[name] = Style(label, colour, marker, line if is_causal else NOT_CAUSAL_LINE)
    return found


def legend(made: Figure, keys: Sequence[Line2D | Patch], spare: Sequence[Axes] = ()) -> None:
    """Puts the legend into a spare panel if there is one, else below the panels, in as many columns as fit."""
    for axes in spare:
        axes.set_axis_off()
    if spare:
        spare[0].legend(handles=keys, loc="center left", labelspacing=0.8)
        return
    # Widths are in inches. Constrained layout makes no room for a legend that is too wide.
    widths = [0.72 + 0.084 * len(str(key.get_label())) for key in keys]
    room = made.get_figwidth() - 0.2

    def width(columns: int) -> float:
        return sum(max(column) for column in np.array_split(widths, columns))

    columns = next((n for n in range(len(keys), 1, -1) if width(n) <= room), 1)
    made.legend(handles=keys, loc="outside lower center", ncols=columns)


def figure(rows: int, columns: int, *, height: float, width: float = WIDTH, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels. ``height`` is the height of one row of panels, ``width`` that of the figure, in inches."""
    made = Figure(figsize=(width, rows * height), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False, **how).flat)


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Applies SETTINGS to what is drawn or saved within, whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


@house_style()
def _save(made: Figure, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    made.savefig(file, format=kind, **how)
    return file.getvalue()


def svg(made: Figure) -> bytes:
    """The figure as SVG. The same figure gives the same bytes."""
    return _save(made, "svg", metadata={"Date": None})


def png(made: Figure) -> bytes:
    """The figure as PNG with 180 dots per inch."""
    return _save(made, "png", dpi=180)


def log_axis(axis: Axis, low: float, high: float, write: Callable[[float], str] = si, most: int = 7) -> None:
    """Makes an axis logarithmic, from low to high with a little room, with round numbers at its ticks."""
    room = 0.06 * math.log(high / low) or math.log(1.5)
    low, high = low * math.exp(-room), high * math.exp(room)
    set_scale, set_lim = (
        (axis.axes.set_xscale, axis.axes.set_xlim)
        if axis.axis_name == "x"
        else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("log")
    set_lim(low, high)
    ticks = round_numbers(low, high, most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([write(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float, most: int = 7) -> list[float]:
    """At least 3 round numbers between low and high, spread as evenly on a logarithmic axis as they can be."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > most:
            # If even the first choice has too many, take every second, third ... of them.
            best = best or ticks[:: -(-len(ticks) // most)]
            break
        best = ticks
        if len(ticks) >= 4:
            break
    if len(best) >= 3:
        return best
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def value_axis(axis: Axis, values: Sequence[float]) -> None:
    """Makes an axis logarithmic, with a tick at each value if they are few; it stays linear if any is not positive."""
    distinct = sorted(set(values))
    if distinct[0] <= 0:
        return
    log_axis(axis, distinct[0], distinct[-1])
    if len(distinct) <= 9:
        axis.set_major_locator(FixedLocator(distinct))
        axis.set_major_formatter(FixedFormatter([plain(value) for value in distinct]))


def plain(value: float) -> str:
    """Writes a number in full where that is short (4096, 0.004), else with a suffix (1.2M)."""
    return f"{value:g}" if 1e-4 <= abs(value) < 1e6 else si(value) if abs(value) >= 1e6 else f"{value:.2g}"


def loss_label(unit: str) -> str:
    """The label of an axis of validation losses per token, or per image."""
    return f"validation loss [nats/{unit}]"


def perplexity_axis(axes: Axes, *, label: bool) -> None:
    """Adds an axis of perplexity, exp(loss), on the right."""
    right = axes.twinx()
    low, high = axes.get_ylim()
    right.set_ylim(low, high)
    right.grid(False)
    right.spines["right"].set_visible(True)
    ticks = [
        t for t in MaxNLocator(6).tick_values(math.exp(low), math.exp(high)) if math.exp(low) <= t <= math.exp(high)
    ]
    right.yaxis.set_major_locator(FixedLocator([math.log(tick) for tick in ticks]))
    right.yaxis.set_major_formatter(FixedFormatter([f"{tick:.4g}" for tick in ticks]))
    if label:
        right.set_ylabel("perplexity")


def loss_limits(axes: Axes, losses: Sequence[float]) -> None:
    """Limits the axis of losses to those given, with a little room."""
    low, high = float(np.min(losses)), float(np.max(losses))
    room = 0.06 * (high - low) or 0.02
    axes.set_ylim(low - room, high + room)
