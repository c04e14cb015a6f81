"""The runs of a series at a budget, and their loss as a parabola in the logarithm of each measure of size.

N active parameters, D tokens, C training FLOPs spent, L final validation loss in nats per token, or per image.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from peer_jax.analysis.columns import Interval, NoFit
from peer_jax.analysis.curvature import curvature, fit_shared
from peer_jax.analysis.parabola import Parabola, Points, fit_parabolas
from peer_jax.analysis.row import Row, unit
from peer_jax.storage import AnyPath

SIZES = ("params_active", "params_total", "tokens")
"""The measures in whose logarithm the loss of a budget is a parabola."""

MEASURES = (*SIZES, "seconds")


def mean_loss(rows: Sequence[Row]) -> float:
    """The mean loss over seeds."""
    return float(np.mean([row.loss for row in rows]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The runs of a series at a budget, and their loss as a parabola in the logarithm of each measure of size.

    Attributes:
        series: method and settings, with the text where the report has several.
        settings: what tells the series from others of its method.
        varied: those of the settings that a sweep varied.
        baselines: labels of the methods that the series may be compared with.
        compute: C, mean over the runs.
        rows: the runs with a finite loss.
        directories: the folders that hold the runs.
        diverged: number of runs without a finite loss.
        fits: parabolas by measure.
        reasons: why there is no parabola, by measure.
        curvature: the curvature in ln active parameters, with its interval, by the budget's own runs; None without 3
            sizes.
        shared: the p value of the F test, if the parabola has the curvature of several budgets; otherwise None.
    """

    series: str
    method: str
    is_causal: bool
    settings: dict[str, Any]
    varied: dict[str, Any]
    baselines: frozenset[str]
    text: str
    budget: float
    compute: float
    rows: tuple[Row, ...]
    directories: frozenset[AnyPath]
    diverged: int
    fits: dict[str, Parabola]
    reasons: dict[str, str]
    curvature: tuple[float, Interval | None] | None = None
    shared: float | None = None

    @property
    def fit(self) -> Parabola | None:
        """The parabola of loss against active parameters, which minima, laws and comparisons are taken from."""
        return self.fits.get("params_active")

    @property
    def unit(self) -> str:
        """What the losses are means over: a token, or an image."""
        return unit(self.rows)

    @property
    def has_minimum(self) -> bool:
        """Whether there is a fitted minimum among the sizes tried. A minimum outside them is an extrapolation."""
        return self.fit is not None and not self.fit.is_extrapolation

    @property
    def seeds(self) -> int:
        """The number of seeds at the size that has the fewest."""
        return min((len({row.seed for row in rows}) for _, rows in self.points("params_active")), default=0)

    def points(self, measure: str) -> list[tuple[float, list[Row]]]:
        """The measure and the runs of each size, by rising measure. The runs of a size differ in their seeds alone.

        The measure is the mean over the runs of a size. Runs of which it is not known are left out.
        """
        groups = defaultdict(list)
        for row in self.rows:
            if getattr(row, measure) is not None:
                groups[row.params_active, row.size].append(row)
        points = [(float(np.mean([getattr(row, measure) for row in rows])), rows) for rows in groups.values()]
        return sorted(points, key=lambda point: (point[0], point[1][0].size))

    def cells(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Active parameters and loss by the name of the size and the seed; the mean loss of a run that was repeated."""
        groups = defaultdict(list)
        for value, rows in self.points("params_active"):
            for row in rows:
                groups[row.size, row.seed].append((value, row.loss))
        return {cell: (found[0][0], float(np.mean([loss for _, loss in found]))) for cell, found in groups.items()}

    def as_points(self, measure: str = "params_active") -> Points:
        """The runs as points of a parabola in a measure."""
        points = [(value, row.loss, row.seed) for value, rows in self.points(measure) for row in rows]
        return Points.of(*map(list, zip(*points, strict=True))) if points else Points.of([], [], [])

    def best(self) -> tuple[list[Row], float] | None:
        """The runs of the size with the lowest measured mean loss, and that loss."""
        means = [(mean_loss(rows), rows) for _, rows in self.points("params_active")]
        loss, rows = min(means, key=lambda pair: pair[0], default=(math.nan, []))
        return (rows, loss) if rows else None

    @property
    def tokens_at_minimum(self) -> float | None:
        """D at the minimum in active parameters: ln D is interpolated linearly in ln N between the sizes tried.

        It is not the minimum of the parabola in tokens, so that N and D belong to one model. It is not C / 6N either,
        because attention, logits and routers make the FLOPs per token differ from 6N at small sizes.
        """
        if not self.has_minimum:
            return None
        sizes = self.points("params_active")
        log_tokens = [float(np.mean([math.log(row.tokens) for row in rows])) for _, rows in sizes]
        return math.exp(float(np.interp(math.log(self.fit.size), [math.log(size) for size, _ in sizes], log_tokens)))


def curves_of(rows: Sequence[Row], texts: dict[str, str], resamples: int) -> list[Curve]:
    """The curves of all series and budgets of the rows."""
    usual = frozenset(row.method for row in rows if row.is_baseline)
    groups, by_series, found = defaultdict(list), defaultdict(list), {}
    for row in rows:
        groups[row.budget, row.series].append(row)
    for (budget, series), runs in groups.items():
        by_series[series].append(_curve(budget, runs, texts, usual, resamples))
    for curves in by_series.values():
        found |= {(curve.budget, curve.series): curve for curve in _sharing(curves, resamples)}
    return [found[place] for place in groups]


def shown(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that belong into one picture: methods without varied settings, and settings tried at 3 sizes."""
    return [curve for curve in curves if curve.rows and (not curve.varied or len(curve.points("params_active")) >= 3)]


def _curve(budget: float, runs: Sequence[Row], texts: dict[str, str], usual: frozenset[str], resamples: int) -> Curve:
    finite = tuple(row for row in runs if math.isfinite(row.loss))
    curve = Curve(
        series=runs[0].series,
        method=runs[0].method,
        is_causal=all(row.is_causal for row in runs),
        settings=runs[0].settings,
        varied=runs[0].varied,
        baselines=frozenset(row.baseline for row in runs if row.baseline is not None) or usual,
        text=texts[runs[0].cache],
        budget=budget,
        compute=float(np.mean([row.training_flops for row in finite or runs])),
        rows=finite,
        directories=frozenset(folder for row in runs for folder in row.folders),
        diverged=len(runs) - len(finite),
        fits={},
        reasons={},
    )
    for measure in SIZES:
        points = curve.as_points(measure)
        try:
            points.check()
            (curve.fits[measure],) = fit_parabolas([points], resamples=resamples)
        except NoFit as reason:
            curve.reasons[measure] = str(reason)
    points = curve.as_points()
    return dataclasses.replace(curve, curvature=curvature(points) if points.sizes >= 3 else None)


def _sharing(curves: Sequence[Curve], resamples: int) -> list[Curve]:
    """The curves of a series, where those whose own curvature is within its noise share one with the other budgets.

    They do so if the F test allows it. The other curves keep their own curvature, which their runs show.
    """
    able = [curve for curve in curves if curve.curvature is not None]
    weak = [curve for curve in able if curve.curvature[1] is not None and curve.curvature[1][0] <= 0]
    if not weak or len(able) < 2:
        return list(curves)
    try:
        fits, p = fit_shared([curve.as_points() for curve in able], resamples=resamples)
    except NoFit:
        return list(curves)
    found = {curve.budget: fit for curve, fit in zip(able, fits, strict=True)}
    return [
        dataclasses.replace(curve, fits=curve.fits | {"params_active": found[curve.budget]}, shared=p)
        if curve in weak
        else curve
        for curve in curves
    ]
