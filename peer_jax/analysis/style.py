"""How figures look: a colour, marker and line for each method, plain ticks, bytes that don't change from run to run."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

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
    # A dollar in a name is a dollar.
    "text.parse_math": False,
    # Otherwise every SVG has random names in it.
    "svg.hashsalt": "peer_jax",
}
WIDTH = 9.6
QUIET = "#5f5f5f"

# Okabe and Ito's colours, told apart by the colour-blind; markers and lines tell them apart in grey. A method always
# looks the same.
METHODS = {
    "Dense": ("#000000", "o"),
    "PEER": ("#d55e00", "s"),
    "PKM": ("#0072b2", "^"),
    "MoE (expert choice)": ("#009e73", "D"),
    "MoE (token choice)": ("#cc79a7", "v"),
}
FURTHER = [
    *(("#e69f00", "P"), ("#56b4e9", "X"), ("#7f5aa2", "<"), ("#8c6d31", ">"), ("#6b6b6b", "h"), ("#b8a800", "p")),
    *(("#a6761d", "*"), ("#1b7f7a", "8")),
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
        """Its entry in a legend."""
        settings = {"color": self.colour, "marker": self.marker, "linestyle": self.line, "lw": 1.8, "ms": 7}
        return Line2D([], [], label=self.label, **settings | {"mec": "white", "mew": 0.8} | how)


def brief(text: str, most: int = 44) -> str:
    """Words in a figure must leave room for the figure; the tables have them whole."""
    return text if len(text) <= most else text[: most - 1] + "…"


def styles(series: Sequence[tuple[str, bool]]) -> dict[str, Style]:
    """A style for each of (series, whether it is causal)."""
    found, further = {}, 0
    for name, is_causal in dict.fromkeys(series):
        if name in METHODS:
            (colour, marker), line = METHODS[name], "-"
        else:
            colour, marker = FURTHER[further % len(FURTHER)]
            line = SPARE_LINES[further // len(FURTHER) % len(SPARE_LINES)]
            further += 1
        found[name] = Style(brief(named(name, is_causal)), colour, marker, line if is_causal else NOT_CAUSAL_LINE)
    return found


def legend(made: Figure, keys: Sequence[Line2D | Patch], spare: Sequence[Axes] = ()) -> None:
    """Where a panel is to spare, else below the panels, in as many columns as fit."""
    for axes in spare:
        axes.set_axis_off()
    if spare:
        spare[0].legend(handles=keys, loc="center left", labelspacing=0.8)
        return
    # In inches, for constrained layout makes no room for a legend that is too wide.
    widths = [0.72 + 0.084 * len(str(key.get_label())) for key in keys]
    room = made.get_figwidth() - 0.2

    def width(columns: int) -> float:
        return sum(max(column) for column in np.array_split(widths, columns))

    columns = next((n for n in range(len(keys), 1, -1) if width(n) <= room), 1)
    made.legend(handles=keys, loc="outside lower center", ncols=columns)


def figure(rows: int, columns: int, *, height: float, width: float = WIDTH, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels; ``height`` is that of a row in inches."""
    made = Figure(figsize=(width, rows * height), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False, **how).flat)


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """What is drawn or saved within looks like this, whatever the user's own settings of matplotlib are."""
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
    """The same bytes for the same figure."""
    return _save(made, "svg", metadata={"Date": None})


def png(made: Figure) -> bytes:
    """At 180 dots an inch."""
    return _save(made, "png", dpi=180)


def log_axis(axis: Axis, low: float, high: float, write: Callable[[float], str] = si, most: int = 7) -> None:
    """A logarithmic axis from low to high, with a little room, and round numbers at its ticks."""
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
    """At least 3 round numbers between, evenly spread on a logarithmic axis as far as they can be."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > most:
            # Only where the first choice is too many already: every second, third ...
            best = best or ticks[:: -(-len(ticks) // most)]
            break
        best = ticks
        if len(ticks) >= 4:
            break
    if len(best) >= 3:
        return best
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def value_axis(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each value, as far as they don't crowd; linear if some are not positive."""
    distinct = sorted(set(values))
    if distinct[0] <= 0:
        return
    log_axis(axis, distinct[0], distinct[-1])
    if len(distinct) <= 9:
        axis.set_major_locator(FixedLocator(distinct))
        axis.set_major_formatter(FixedFormatter([plain(value) for value in distinct]))


def plain(value: float) -> str:
    """4096 as it is, 16384 too, 0.004, 1.2M."""
    return f"{value:g}" if 1e-4 <= abs(value) < 1e6 else si(value) if abs(value) >= 1e6 else f"{value:.2g}"


def perplexity_axis(axes: Axes, *, label: bool) -> None:
    """exp(loss) on the right."""
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
    """From the lowest to the highest, with room."""
    low, high = float(np.min(losses)), float(np.max(losses))
    room = 0.06 * (high - low) or 0.02
    axes.set_ylim(low - room, high + room)
