"""The figures of a report. Each function returns a Figure, or None where there is nothing to draw.

``looks`` are the styles of ``style.looks``, by the names of families, series and methods.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from peer_jax.analysis.curves import Training
from peer_jax.analysis.isoflop import Analysis
from peer_jax.analysis.reading import budget, named, si
from peer_jax.analysis.row import Row, unit
from peer_jax.analysis.series import MEASURES, Curve, mean_loss
from peer_jax.analysis.style import (
    PALETTE,
    QUIET,
    WIDTH,
    Style,
    brief,
    figure,
    house_style,
    legend,
    log_axis,
    loss_label,
    loss_limits,
    perplexity_axis,
    value_axis,
)

LABELS = dict(
    zip(MEASURES, ("active parameters", "parameters", "training tokens", "seconds of training steps"), strict=True)
)
# A minimum further outside the sizes tried than this factor is only in the table.
NEARBY = 1.6
# A picture of more series than this is unreadable. It then leaves out the settings that sweeps varied.
MOST_SERIES = 8


@house_style()
def isoflop(analysis: Analysis, measure: str, looks: Mapping[str, Style]) -> Figure | None:
    """Loss against a measure, one panel per budget: runs, and parabolas with their minima where there are some."""
    curves = in_picture(analysis)
    if not curves or all(len(curve.points(measure)) < 2 for curve in curves):
        return None
    looks = _only(looks, {curve.series for curve in curves})
    budgets = sorted({curve.budget for curve in curves})
    columns = min(2, len(budgets))
    rows = -(-len(budgets) // columns)
    made, panels = figure(rows, columns, height=4.5 if rows == 1 else 4.0, width=WIDTH if columns > 1 else 8.0)
    spare = panels[len(budgets) :]
    for place, (axes, value) in enumerate(zip(panels, budgets, strict=False)):
        own = [curve for curve in curves if curve.budget == value]
        _isoflop_panel(axes, own, measure, looks)
        axes.set_title(f"{budget(value)} training FLOPs")
        axes.set_xlabel(LABELS[measure])
        if place % columns == 0:
            axes.set_ylabel(loss_label(analysis.unit))
        if analysis.unit == "token":
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
    """The curves that the figures show: all if they are few enough, else those that no sweep varied."""
    shown = analysis.shown()
    if len({curve.series for curve in shown}) <= MOST_SERIES:
        return shown
    return [curve for curve in shown if not curve.varied] or shown


def _only(looks: Mapping[str, Style], names: Collection[str]) -> dict[str, Style]:
    """The styles of some names, in the order of ``looks``."""
    return {name: look for name, look in looks.items() if name in names}


def _isoflop_panel(axes: Axes, curves: Sequence[Curve], measure: str, looks: Mapping[str, Style]) -> None:
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
        axes.plot(xs, means, look.marker, ls="", color=look.colour, ms=6.5, mec="white", mew=0.8, zorder=3)
        if fit is None:
            # The points are joined in the order of their sizes, to show which belong together.
            joined = sorted(zip(points, means, strict=True), key=lambda pair: pair[0][1][0].params_active)
            axes.plot([x for (x, _), _ in joined], [mean for _, mean in joined], ls=":", lw=1, color=look.colour)
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
def optimum(analysis: Analysis, looks: Mapping[str, Style]) -> Figure | None:
    """N_opt, D_opt and the loss at the minimum against compute."""
    laws = {law.series: law for law in analysis.laws if law.params is not None}
    curves = [curve for curve in analysis.curves if curve.series in laws and curve.has_minimum]
    if not curves:
        return None
    looks = _only(looks, laws.keys() & {curve.series for curve in curves})
    made, panels = figure(1, 3, height=4.3, width=WIDTH * 1.05)
    titles = ("N_opt: active parameters", "D_opt: tokens", f"loss at the minimum [nats/{analysis.unit}]")
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
def frontier(analysis: Analysis, measure: str, looks: Mapping[str, Style]) -> Figure | None:
    """The lowest mean loss of each series within seconds, or within total parameters with one panel per budget."""
    series = {curve.series for curve in in_picture(analysis)}
    found = [own for own in analysis.frontiers if own.measure == measure and own.series in series]
    if sum(len(own.steps) for own in found) < 3:
        return None
    looks = _only(looks, {own.series for own in found})
    budgets = list(dict.fromkeys(own.budget for own in found))
    columns = min(2, len(budgets))
    rows = -(-len(budgets) // columns)
    made, panels = figure(rows, columns, height=4.2, width=WIDTH if columns > 1 else 8.0)
    for place, (axes, at) in enumerate(zip(panels, budgets, strict=False)):
        own = [line for line in found if line.budget == at]
        last = max(line.last for line in own)
        for line in own:
            xs, ys = [step.value for step in line.steps], [step.loss for step in line.steps]
            look = looks[line.series]
            axes.step([*xs, last], [*ys, ys[-1]], where="post", ls=look.line, color=look.colour, lw=1.5)
            axes.plot(xs, ys, look.marker, ls="", color=look.colour, ms=6.5, mec="white", mew=0.8, zorder=3)
        log_axis(axes.xaxis, min(line.steps[0].value for line in own), last)
        loss_limits(axes, [step.loss for line in own for step in line.steps])
        axes.set_title("all budgets" if at is None else f"{budget(at)} training FLOPs")
        axes.set_xlabel(f"at most so many {LABELS[measure]}")
        if place % columns == 0:
            axes.set_ylabel(f"lowest {loss_label(analysis.unit)}")
    legend(made, [look.key() for look in looks.values()], panels[len(budgets) :])
    return made


@house_style()
def training(curves: Sequence[Training], looks: Mapping[str, Style]) -> Figure | None:
    """Smoothed training loss against FLOPs, one panel per budget. The best size of each series has a thick line."""
    if not curves:
        return None
    looks = _only(looks, {curve.row.series for curve in curves})
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
        # Curves of sizes far from the best may leave the panel at its top: otherwise they would squeeze the others.
        top = max(c.losses[0] for c in [c for c in own if c.is_best] or own)
        bottom = min(float(c.losses.min()) for c in own)
        loss_limits(axes, [bottom, top + 0.15 * (top - bottom)])
        axes.set_title(f"{budget(value)} training FLOPs")
        axes.set_xlabel("FLOPs spent")
        if place % columns == 0:
            axes.set_ylabel(f"training loss [nats/{unit(curve.row for curve in curves)}], smoothed")
    keys = [look.key(marker="", lw=2.4) for look in looks.values()]
    legend(made, keys, spare)
    return made


@house_style()
def usage(rows: Sequence[Row], looks: Mapping[str, Style]) -> Figure | None:
    """Usage and unevenness of experts, against active parameters, and against N where N was varied."""
    rows = [row for row in rows if row.usage is not None and row.unevenness is not None]
    if not rows:
        return None
    sizes = [row for row in rows if not row.varied] or rows
    numbers = defaultdict(set)
    for row in rows:
        numbers[_place(row)].add(row.num_experts)
    varied = [row for row in rows if row.num_experts and len(numbers[_place(row)]) > 1]
    looks = _only(looks, {row.family for row in (*sizes, *varied)})
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
    """What runs have in common that differ only in the number of experts."""
    return row.directory.parent, row.family, row.size, row.budget


def _paleness(value: float, budgets: Sequence[float]) -> float:
    """The opacity of a budget. Larger budgets are less pale, which shows what grows with them."""
    return 0.4 + 0.6 * (budgets.index(value) + 1) / len(budgets)


def _usage_panels(
    panels: Sequence[Axes], rows: Sequence[Row], x: str, looks: Mapping[str, Style], budgets: Sequence[float]
) -> None:
    """Draws means over seeds, with a line per method and budget, and per size if ``x`` is the number of experts."""
    lines = defaultdict(lambda: defaultdict(list))
    for row in rows:
        # A setting that is not on the axis makes a line of its own.
        apart = row.size if x == "num_experts" else row.series
        lines[row.family, row.budget, apart][getattr(row, x)].append(row)
    titles = {"usage": "usage: share of experts", "unevenness": "unevenness [nats]"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for (family, value, _), points in lines.items():
            xs = sorted(points)
            means = [float(np.mean([getattr(row, name) for row in points[x]])) for x in xs]
            how = {"color": looks[family].colour, "ls": looks[family].line, "alpha": _paleness(value, budgets)}
            axes.plot(xs, means, looks[family].marker, **how, lw=1.2, ms=6.5, mec="white", mew=0.6)
        values = [getattr(row, x) for row in rows]
        if x == "num_experts":
            value_axis(axes.xaxis, values)
        else:
            log_axis(axes.xaxis, min(values), max(values))
        axes.set_xlabel("number of experts N" if x == "num_experts" else LABELS[x])
        axes.set_title(title)
        axes.set_ylim(0, max(1.05, axes.get_ylim()[1]) if name == "usage" else axes.get_ylim()[1])


PARTS = {"attention": ("#bdbdbd", ""), "logits": ("#e3e3e3", "..")}
HATCHES = ("", "///", "\\\\\\", "xxx", "++", "oo")
MOST_BARS = 36


@house_style()
def flops(rows: Sequence[Row], looks: Mapping[str, Style]) -> Figure | None:
    """The parts of the forward FLOPs per token, for each method and size."""
    rows = models(rows)[:MOST_BARS]
    if not rows:
        return None
    parts = _part_looks(rows, looks)
    made, (axes,) = figure(1, 1, height=1.5 + 0.3 * len(rows), width=8.6)
    heights, height, last = [], 0.0, None
    for row in rows:
        height += 0.0 if last is None else 1.0 if row.family == last else 1.6  # room between methods
        heights.append(height)
        last = row.family
    for y, row in zip(heights, rows, strict=True):
        left = 0.0
        for part, value in row.flops_by_part.items():
            colour, hatch = parts[part]
            share = 100 * value / row.flops_per_token
            axes.barh(y, share, left=left, height=0.8, color=colour, hatch=hatch, edgecolor="white", lw=0.8)
            if share >= 7:
                dark = np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.5
                axes.text(
                    *(left + share / 2, y, f"{share:.0f}%"),
                    **{"ha": "center", "va": "center", "fontsize": 8.5, "color": "white" if dark else "#222222"},
                    bbox={"boxstyle": "round,pad=0.12", "fc": colour, "ec": "none"} if hatch else None,
                )
            left += share
        axes.text(101, y, f"{si(row.flops_per_token)}", va="center", fontsize=9)
    axes.text(101, -1.0, "FLOPs per token", va="center", fontsize=9, color=QUIET)
    axes.set_yticks(heights, [f"{brief(named(row.series, row.is_causal))}, {brief(row.size, 16)}" for row in rows])
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the forward FLOPs per token [%]")
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    keys = [Patch(facecolor=fill, hatch=hatch, edgecolor="white", label=part) for part, (fill, hatch) in parts.items()]
    legend(made, keys)
    return made


def _part_looks(rows: Sequence[Row], looks: Mapping[str, Style]) -> dict[str, tuple[str, str]]:
    """The fill and the hatch of each part: a layer has the colour of the first method that is named after it."""
    parts = dict.fromkeys(part for row in rows for part in row.flops_by_part)
    hatches, free = itertools.cycle(HATCHES), iter(colour for colour, _ in reversed(PALETTE))
    found = {}
    for part in parts:
        own = (looks[row.family].colour for row in rows if _is_layer(row, part))
        found[part] = PARTS.get(part) or (next(own, None) or next(free, QUIET), next(hatches))
    return found


def _is_layer(row: Row, part: str) -> bool:
    """Whether a part is the layer that a method is named after. Results of earlier versions don't name their layer."""
    return row.method.lower().startswith(part.lower()) if row.layer is None else row.layer == part


def models(rows: Sequence[Row]) -> list[Row]:
    """One row for each model that differs in its FLOPs. Models whose settings a sweep varied are left out, if there are
    others."""
    plain_rows = [row for row in rows if not row.varied] or list(rows)
    found = {}
    for row in sorted(plain_rows, key=lambda r: (r.series, r.flops_per_token)):
        found.setdefault((row.series, row.size, tuple(sorted(row.flops_by_part.items()))), row)
    return list(found.values())
