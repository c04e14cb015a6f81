"""The figures of a report. Each function returns a Figure, or None where there is nothing to draw."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from peer_jax.analysis.curves import Training
from peer_jax.analysis.isoflop import MEASURES, Analysis, Curve, mean_loss
from peer_jax.analysis.reading import budget, named, si
from peer_jax.analysis.results import Row
from peer_jax.analysis.style import (
    METHODS,
    QUIET,
    WIDTH,
    Style,
    brief,
    figure,
    house_style,
    legend,
    log_axis,
    loss_limits,
    perplexity_axis,
    styles,
    value_axis,
)

SIZES = dict(zip(MEASURES, ("active parameters", "parameters", "training tokens"), strict=True))
# A minimum further out than this is only in the table.
NEARBY = 1.6
LOSS = "validation loss [nats/token]"
# A picture of more series than this is a thicket: then it shows the methods as they are.
MOST_SERIES = 8


@house_style()
def isoflop(analysis: Analysis, measure: str) -> Figure | None:
    """Loss against size on a panel a budget: runs, parabolas and their minima."""
    curves = in_picture(analysis)
    if not curves or all(len(curve.points(measure)) < 2 for curve in curves):
        return None
    looks = styles([(curve.series, curve.is_causal) for curve in curves])
    budgets = sorted({curve.budget for curve in curves})
    columns = min(2, len(budgets))
    rows = -(-len(budgets) // columns)
    made, panels = figure(rows, columns, height=4.5 if rows == 1 else 4.0, width=WIDTH if columns > 1 else 8.0)
    spare = panels[len(budgets) :]
    for place, (axes, value) in enumerate(zip(panels, budgets, strict=False)):
        own = [curve for curve in curves if curve.budget == value]
        _isoflop_panel(axes, own, measure, looks)
        axes.set_title(f"{budget(value)} training FLOPs")
        axes.set_xlabel(SIZES[measure])
        if place % columns == 0:
            axes.set_ylabel(LOSS)
        perplexity_axis(axes, label=place % columns == columns - 1 or place == len(budgets) - 1)
    keys = [look.key() for look in looks.values()]
    fits = [curve.fits[measure] for curve in curves if measure in curve.fits]
    star = {"linestyle": "", "marker": "*", "ms": 13, "color": QUIET}
    if any(not fit.is_extrapolation for fit in fits):
        keys.append(Line2D([], [], label="minimum (bar: 95% interval)", **star))
    if any(fit.is_extrapolation for fit in fits):
        keys.append(Line2D([], [], label="extrapolated minimum, no result", mfc="white", **star))
    legend(made, keys, spare)
    return made


def in_picture(analysis: Analysis) -> list[Curve]:
    """What the figures show: all series if they are few enough, else the methods as they are."""
    shown = analysis.shown()
    if len({curve.series for curve in shown}) <= MOST_SERIES:
        return shown
    return [curve for curve in shown if not curve.settings] or shown


def _isoflop_panel(axes: Axes, curves: Sequence[Curve], measure: str, looks: dict[str, Style]) -> None:
    sizes, losses = [], []
    for curve in curves:
        look, points = looks[curve.series], curve.points(measure)
        xs, means = [x for x, _ in points], [mean_loss(rows) for _, rows in points]
        sizes += xs
        losses += [row.loss for row in curve.rows]
        for x, rows in points:
            if len(rows) > 1:
                axes.plot(
                    [x] * len(rows), [r.loss for r in rows], look.marker, color=look.colour, ms=3.2, alpha=0.55, mew=0
                )
        fit = curve.fits.get(measure)
        # Without a parabola the points are joined, so that it is seen which belong together.
        line = ":" if fit is None else ""
        axes.plot(xs, means, look.marker, ls=line, lw=1, color=look.colour, ms=6.5, mec="white", mew=0.8, zorder=3)
        if fit is None:
            continue
        inside = np.geomspace(xs[0], xs[-1], 200)
        axes.plot(inside, fit(inside), ls=look.line, color=look.colour, lw=1.7, zorder=2)
        if not xs[0] / NEARBY <= fit.size <= xs[-1] * NEARBY:
            continue
        sizes.append(fit.size)
        losses.append(fit.loss)
        if fit.is_extrapolation:
            outside = np.geomspace(xs[0] if fit.size < xs[0] else xs[-1], fit.size, 50)
            axes.plot(outside, fit(outside), ls=":", color=look.colour, lw=1.2, zorder=2)
        elif fit.size_interval:
            axes.plot(fit.size_interval, [fit.loss] * 2, color=look.colour, lw=4, alpha=0.35, solid_capstyle="butt")
        face = "white" if fit.is_extrapolation else look.colour
        axes.plot(
            fit.size, fit.loss, "*", ms=15, mfc=face, mec=look.colour if fit.is_extrapolation else "white", zorder=4
        )
    if sizes:
        log_axis(axes.xaxis, min(sizes), max(sizes))
        loss_limits(axes, losses)


@house_style()
def optimum(analysis: Analysis) -> Figure | None:
    """N_opt, D_opt and the loss there against compute."""
    laws = {law.series: law for law in analysis.laws if law.params is not None}
    curves = [curve for curve in analysis.curves if curve.series in laws and curve.has_minimum]
    if not curves:
        return None
    looks = styles([(curve.series, curve.is_causal) for curve in curves])
    made, panels = figure(1, 3, height=4.3, width=WIDTH * 1.05)
    titles = ("N_opt: active parameters", "D_opt: tokens", "loss at the minimum [nats/token]")
    computes = [curve.compute for curve in curves]
    ends = np.array([min(computes), max(computes)])
    for axes, title, values in zip(panels, titles, _optima(curves), strict=True):
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("training FLOPs C")
        for series, look in looks.items():
            own = [
                (curve.compute, value) for curve, value in zip(curves, values, strict=True) if curve.series == series
            ]
            law = {titles[0]: laws[series].params, titles[1]: laws[series].tokens}.get(title)
            if law is None:
                axes.plot(*zip(*own, strict=True), ls=look.line, color=look.colour, lw=1.3)
            else:
                axes.plot(ends, law(ends), ls=look.line, color=look.colour, lw=1.3)
            axes.plot(*zip(*own, strict=True), look.marker, color=look.colour, ms=7, mec="white", mew=0.8, zorder=3)
        log_axis(axes.xaxis, *ends, write=budget, most=4)
        if len(at := sorted({curve.budget for curve in curves})) <= 4:
            axes.set_xticks(at, [budget(value) for value in at])
        if law is None:
            loss_limits(axes, values)
        else:
            log_axis(axes.yaxis, min(values), max(values))
    keys = [look.key() for look in looks.values()]
    legend(made, keys)
    return made


def _optima(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float]]:
    return [c.fit.size for c in curves], [c.tokens_at_minimum for c in curves], [c.fit.loss for c in curves]


@house_style()
def training(curves: Sequence[Training]) -> Figure | None:
    """Smoothed training loss against FLOPs on a panel a budget; thick: the best size of each series."""
    if not curves:
        return None
    looks = styles([(curve.row.series, curve.row.is_causal) for curve in curves])
    budgets = sorted({curve.row.budget for curve in curves})
    columns = min(2, len(budgets))
    rows = -(-len(budgets) // columns)
    made, panels = figure(rows, columns, height=4.2, width=WIDTH if columns > 1 else 8.0)
    spare = panels[len(budgets) :]
    for place, (axes, value) in enumerate(zip(panels, budgets, strict=False)):
        own = [curve for curve in curves if curve.row.budget == value]
        for curve in own:
            look = looks[curve.row.series]
            how = {"lw": 2.0, "zorder": 3} if curve.is_best else {"lw": 0.7, "alpha": 0.35, "zorder": 2}
            axes.plot(curve.flops, curve.losses, ls=look.line, color=look.colour, **how)
        log_axis(axes.xaxis, min(c.flops[0] for c in own), max(c.flops[-1] for c in own), write=budget, most=6)
        # Sizes far from the best may leave at the top, or all that is of interest would be at the bottom.
        top = max(c.losses[0] for c in [c for c in own if c.is_best] or own)
        bottom = min(float(c.losses.min()) for c in own)
        loss_limits(axes, [bottom, top + 0.15 * (top - bottom)])
        axes.set_title(f"{budget(value)} training FLOPs")
        axes.set_xlabel("FLOPs spent")
        if place % columns == 0:
            axes.set_ylabel("training loss [nats/token], smoothed")
    keys = [look.key(marker="", lw=2.4) for look in looks.values()]
    legend(made, keys, spare)
    return made


@house_style()
def usage(rows: Sequence[Row]) -> Figure | None:
    """The share of experts used, and how unevenly: against active parameters, and against N where that was varied."""
    rows = [row for row in rows if row.usage is not None and row.unevenness is not None]
    if not rows:
        return None
    sizes = [row for row in rows if not row.settings] or rows
    numbers = defaultdict(set)
    for row in rows:
        numbers[_place(row)].add(row.num_experts)
    varied = [row for row in rows if row.num_experts and len(numbers[_place(row)]) > 1]
    looks = styles(sorted({(row.method, row.is_causal) for row in (*sizes, *varied)}))
    budgets = sorted({row.budget for row in (*sizes, *varied)})
    made, panels = figure(2 if varied else 1, 2, height=3.7)
    _usage_panels(panels[:2], sizes, "params_active", looks, budgets)
    if varied:
        _usage_panels(panels[2:], varied, "num_experts", looks, budgets)
    keys = [look.key(linestyle="") for look in looks.values()]
    keys += [
        Line2D([], [], color=QUIET, alpha=_paleness(value, budgets), lw=2, label=f"{budget(value)} FLOPs")
        for value in (budgets if len(budgets) > 1 else ())
    ]
    legend(made, keys)
    return made


def _place(row: Row) -> tuple:
    """What runs that differ in the number of experts share."""
    return row.directory.parent, row.method, row.size, row.budget


def _paleness(value: float, budgets: Sequence[float]) -> float:
    """Budgets go from pale to full, so that it is seen what grows with them."""
    return 0.4 + 0.6 * (budgets.index(value) + 1) / len(budgets)


def _usage_panels(
    panels: Sequence[Axes], rows: Sequence[Row], x: str, looks: dict[str, Style], budgets: Sequence[float]
) -> None:
    """Means over seeds, joined within a method and budget (and size, against the number of experts)."""
    lines = defaultdict(lambda: defaultdict(list))
    for row in rows:
        lines[row.method, row.budget, row.size if x == "num_experts" else ""][getattr(row, x)].append(row)
    titles = {"usage": "usage: share of experts", "unevenness": "unevenness [nats]"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for (method, value, _), points in lines.items():
            xs = sorted(points)
            means = [float(np.mean([getattr(row, name) for row in points[x]])) for x in xs]
            how = {"color": looks[method].colour, "ls": looks[method].line, "alpha": _paleness(value, budgets)}
            axes.plot(xs, means, looks[method].marker, **how, lw=1.2, ms=6.5, mec="white", mew=0.6)
        values = [getattr(row, x) for row in rows]
        if x == "num_experts":
            value_axis(axes.xaxis, values)
        else:
            log_axis(axes.xaxis, min(values), max(values))
        axes.set_xlabel("number of experts N" if x == "num_experts" else SIZES[x])
        axes.set_title(title)
        axes.set_ylim(0, max(1.05, axes.get_ylim()[1]) if name == "usage" else axes.get_ylim()[1])


PARTS = {"attention": ("#bdbdbd", ""), "logits": ("#e3e3e3", "..")}
MOST_BARS = 36


@house_style()
def flops(rows: Sequence[Row]) -> Figure | None:
    """Where the forward FLOPs of a token go, for each method and size."""
    rows = models(rows)[:MOST_BARS]
    if not rows:
        return None
    parts = list(dict.fromkeys(part for row in rows for part in row.flops_by_part))
    made, (axes,) = figure(1, 1, height=1.5 + 0.3 * len(rows), width=8.6)
    hatches = iter(("", "///", "\\\\\\", "xxx", "++", "oo") * 3)
    looks = {}
    for part in parts:
        known = next((colour for method, (colour, _) in METHODS.items() if method.startswith(part)), "#56b4e9")
        looks[part] = PARTS.get(part) or (known, next(hatches))
    heights, height, last = [], 0.0, None
    for row in rows:
        height += 0.0 if last is None else 1.0 if row.method == last else 1.6  # room between methods
        heights.append(height)
        last = row.method
    for y, row in zip(heights, rows, strict=True):
        left = 0.0
        for part, value in row.flops_by_part.items():
            colour, hatch = looks[part]
            share = 100 * value / row.flops_per_token
            axes.barh(y, share, left=left, height=0.8, color=colour, hatch=hatch, edgecolor="white", lw=0.8)
            if share >= 7:
                dark = colour in ("#000000", "#0072b2", "#d55e00", "#009e73")
                axes.text(
                    *(left + share / 2, y, f"{share:.0f}%"),
                    **{"ha": "center", "va": "center", "fontsize": 8.5, "color": "white" if dark else "#222222"},
                    bbox={"boxstyle": "round,pad=0.12", "fc": colour, "ec": "none"} if hatch else None,
                )
            left += share
        axes.text(101, y, f"{si(row.flops_per_token)}", va="center", fontsize=9)
    axes.text(101, -1.0, "FLOPs a token", va="center", fontsize=9, color=QUIET)
    axes.set_yticks(heights, [f"{brief(named(row.series, row.is_causal))}, {brief(row.size, 16)}" for row in rows])
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the forward FLOPs of a token [%]")
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    keys = [Patch(facecolor=looks[p][0], hatch=looks[p][1], edgecolor="white", label=p) for p in parts]
    legend(made, keys)
    return made


def models(rows: Sequence[Row]) -> list[Row]:
    """A row for each model that differs in its FLOPs; those of sweeps over settings only if there are no others."""
    plain_rows = [row for row in rows if not row.settings] or list(rows)
    found = {}
    for row in sorted(plain_rows, key=lambda r: (r.series, r.flops_per_token)):
        found.setdefault((row.series, row.size, tuple(sorted(row.flops_by_part.items()))), row)
    return list(found.values())
