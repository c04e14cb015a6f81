"""Figures of ablations: lines, heat maps or dots, whichever ``ablations`` has chosen."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from peer_jax.analysis.ablations import UNUSED, Ablation, Panel, readable, value_text
from peer_jax.analysis.reading import budget
from peer_jax.analysis.style import (
    WIDTH,
    Style,
    brief,
    figure,
    house_style,
    legend,
    loss_label,
    loss_limits,
    value_axis,
)


@house_style()
def ablation(found: Ablation, looks: dict[str, Style]) -> Figure | None:
    """Loss against what was varied, a panel for each budget and size; heat maps have a panel for each method too."""
    if not any(np.isfinite(loss) for panel in found.panels for loss in _losses(panel)):
        return None
    methods = {method for panel in found.panels for method in panel.losses}
    looks = {method: look for method, look in looks.items() if method in methods}
    if found.kind == "heat map":
        return _heat_maps(found, looks)
    panels = [panel for panel in found.panels if np.isfinite(_losses(panel)).any()]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 4.2 if found.kind == "line" else 1.4 + 0.42 * len(found.values)
    made, places = figure(rows, columns, height=height, width=WIDTH if columns > 1 else 7.4)
    spare = places[len(panels) :]
    for place, (axes, panel) in enumerate(zip(places, panels, strict=False)):
        (_line if found.kind == "line" else _dots)(axes, found, panel, looks)
        axes.set_title(f"{brief(panel.size, 24)}, {budget(panel.budget)} FLOPs")
        if found.kind == "line":
            axes.set_xlabel(brief(readable(found.varied[0])))
            axes.set_ylabel(loss_label(found.unit) if place % columns == 0 else "")
        else:
            axes.set_xlabel(loss_label(found.unit))
            axes.set_ylabel(brief(found.title, 24) if place % columns == 0 and len(found.varied) == 1 else "")
    keys = [look.key(linestyle=look.line if found.kind == "line" else "") for look in looks.values()]
    legend(made, keys, spare)
    return made


def _losses(panel: Panel) -> list[float]:
    return [loss for losses in panel.losses.values() for own in losses.values() for loss in own]


def _line(axes: Axes, found: Ablation, panel: Panel, looks: dict[str, Style]) -> None:
    finite = [loss for loss in _losses(panel) if np.isfinite(loss)]
    for method, losses in panel.losses.items():
        look = looks[method]
        known = [(float(v[0]), own) for v in found.values if v[0] != UNUSED and (own := losses.get(v))]
        xs, means = [x for x, _ in known], [float(np.mean(own)) for _, own in known]
        if level := losses.get((UNUSED,)):  # a level to compare the others with
            axes.axhline(np.mean(level), ls=look.line, color=look.colour, lw=1.1, alpha=0.8)
        for x, own in known:
            if len(own) > 1:
                axes.plot([x] * len(own), own, look.marker, color=look.colour, ms=3.2, alpha=0.55, mew=0)
        axes.plot(xs, means, look.marker, ls=look.line, lw=1.6, color=look.colour, ms=7, mec="white", mew=0.8)
    value_axis(axes.xaxis, [float(values[0]) for values in found.values if values[0] != UNUSED])
    loss_limits(axes, finite)


def _dots(axes: Axes, found: Ablation, panel: Panel, looks: dict[str, Style]) -> None:
    methods = [method for method in looks if method in panel.losses]
    for place, method in enumerate(methods):
        look = looks[method]
        shift = (place - (len(methods) - 1) / 2) * min(0.2, 0.7 / len(methods))
        for y, values in enumerate(found.values):
            if own := [loss for loss in panel.losses[method].get(values, ()) if np.isfinite(loss)]:
                if len(own) > 1:
                    axes.plot([min(own), max(own)], [y + shift] * 2, color=look.colour, lw=1.2, alpha=0.5)
                    axes.plot(own, [y + shift] * len(own), look.marker, color=look.colour, ms=3.2, alpha=0.6, mew=0)
                axes.plot(np.mean(own), y + shift, look.marker, color=look.colour, ms=8, mec="white", mew=0.8, zorder=3)
    axes.set_yticks(range(len(found.values)), [brief(found.label(values)) for values in found.values])
    axes.set_ylim(len(found.values) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _heat_maps(found: Ablation, looks: dict[str, Style]) -> Figure | None:
    """Heat maps with the first binding as rows and the second as columns; a frame marks the lowest cell."""
    heads, columns_of = (sorted({v[i] for v in found.values if UNUSED not in v}) for i in range(2))
    grids = []
    for panel in found.panels:
        for method in (method for method in looks if method in panel.losses):
            means = {values: float(np.mean(own)) for values, own in panel.losses[method].items()}
            grid = np.array([[means.get((a, b), np.nan) for b in columns_of] for a in heads])
            # A method that does not use the bindings was run once, and one cell is no map.
            if np.isfinite(grid).sum() > 1:
                grids.append((f"{looks[method].label}\n{brief(panel.size, 24)}, {budget(panel.budget)} FLOPs", grid))
    if not grids:
        return None
    values = np.concatenate([grid[np.isfinite(grid)] for _, grid in grids])
    # The colours end at a quantile: a single very high loss would leave all others in one colour.
    limits = float(values.min()), float(np.quantile(values, 0.9))
    columns = min(len(grids), 2 if len(columns_of) > 4 else 3)
    rows = -(-len(grids) // columns)
    made, places = figure(rows, columns, height=1.7 + 0.5 * len(heads), width=min(WIDTH, 2.0 + 3.4 * columns))
    for spare in places[len(grids) :]:
        spare.set_visible(False)
    for place, (axes, (title, grid)) in enumerate(zip(places, grids, strict=False)):
        image = axes.imshow(grid, cmap="cividis_r", vmin=limits[0], vmax=limits[1], aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                shade = image.cmap(image.norm(value))
                light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 0.55
                colour = "#111111" if light else "white"
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=10)
        y, x = np.unravel_index(np.nanargmin(grid), grid.shape)
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, ec="#d55e00", lw=2.4))
        axes.set_xticks(range(len(columns_of)), [value_text(v) for v in columns_of])
        axes.set_yticks(range(len(heads)), [value_text(v) for v in heads])
        axes.set_xlabel(brief(readable(found.varied[1])))
        if place % columns == 0:
            axes.set_ylabel(brief(readable(found.varied[0])))
        axes.set_title(title, fontsize=10.5)
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    extend = "max" if values.max() > limits[1] else "neither"
    made.colorbar(image, ax=places, label=loss_label(found.unit), pad=0.02, extend=extend)
    return made
