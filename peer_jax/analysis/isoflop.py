"""IsoFLOP analysis (Hoffmann et al. 2022, approach 2): rows in, minima, laws and comparisons with dense out.

N active parameters, D tokens, C training FLOPs spent, L final validation loss in nats per token.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from peer_jax.analysis.fit import (
    LossSurface,
    NoFit,
    Parabola,
    PowerLaw,
    Saving,
    compute_saved,
    fit_loss_surface,
    fit_parabola,
    fit_power_law,
)
from peer_jax.analysis.results import Row

MEASURES = ("params_active", "params_total", "tokens")
BASELINE = "Dense"
# Runs end within half a step of their budget. Without a sweep's point.json that is all there is to know it by.
SAME_BUDGET = 0.02
# A resample of a surface takes some hundred times as long as one of a parabola.
SURFACE_SHARE = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A series at a budget: its runs, and loss as a parabola in the logarithm of each measure of size.

    Attributes:
        series: method and settings, with the text it was trained on where the report has several.
        compute: C, mean over the runs.
        rows: those with a finite loss.
        diverged: number of those without.
        fits: by measure; one that could not be made is in ``reasons``.
    """

    series: str
    method: str
    is_causal: bool
    settings: dict[str, Any]
    text: str
    budget: float
    compute: float
    rows: tuple[Row, ...]
    diverged: int
    fits: dict[str, Parabola]
    reasons: dict[str, str]

    @property
    def fit(self) -> Parabola | None:
        """Loss against active parameters, the one that counts."""
        return self.fits.get("params_active")

    @property
    def has_minimum(self) -> bool:
        """Whether there is a fitted minimum among the sizes tried. Outside them it is an extrapolation, no result."""
        return self.fit is not None and not self.fit.is_extrapolation

    @property
    def seeds(self) -> int:
        """Seeds at the size that has the fewest."""
        return min((len({row.seed for row in rows}) for _, rows in self.points("params_active")), default=0)

    def points(self, measure: str) -> list[tuple[float, list[Row]]]:
        """The runs at each size, by rising size."""
        groups = defaultdict(list)
        for row in self.rows:
            groups[float(getattr(row, measure))].append(row)
        return sorted(groups.items())

    def best(self) -> tuple[list[Row], float] | None:
        """The runs of the size with the lowest mean loss, and that loss, as measured."""
        means = [(mean_loss(rows), rows) for _, rows in self.points("params_active")]
        loss, rows = min(means, key=lambda pair: pair[0], default=(math.nan, []))
        return (rows, loss) if rows else None

    @property
    def tokens_at_minimum(self) -> float | None:
        """D at the minimum in active parameters: ln D between the neighbouring sizes' is linear in ln N.

        Interpolated, not the minimum of the parabola in tokens, so that N and D are of one model; and not C / 6N,
        because attention, logits and routers make FLOPs a token anything but 6N at small sizes.
        """
        if not self.has_minimum:
            return None
        sizes = self.points("params_active")
        log_tokens = [float(np.mean([math.log(row.tokens) for row in rows])) for _, rows in sizes]
        return math.exp(float(np.interp(math.log(self.fit.size), [math.log(size) for size, _ in sizes], log_tokens)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """N_opt and D_opt of a series as power laws of C, from the budgets whose minima are results."""

    series: str
    is_causal: bool
    budgets: int
    params: PowerLaw | None
    tokens: PowerLaw | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surface:
    """L(N, D) of a series over all its budgets."""

    series: str
    is_causal: bool
    surface: LossSurface | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A series against dense at a budget, each at its minimum.

    Attributes:
        difference: loss less dense's, below 0 where the series is better; None if one has no minimum.
        overlap: whether the two intervals of the minimum loss overlap; None if one is not known.
        reason: why there is no difference.
        saving: compute that dense needs for the same loss, in units of the series'.
        saving_reason: why there is none.
    """

    series: str
    baseline: str
    is_causal: bool
    budget: float
    difference: float | None
    overlap: bool | None
    reason: str
    saving: Saving | None
    saving_reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """How far seeds differ at a budget: the standard deviation pooled over ``groups`` of runs alike but for it."""

    budget: float
    deviation: float
    groups: int
    runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that is read out of the rows, whose budgets are ``same_budgets``'s here."""

    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    curves: tuple[Curve, ...]
    laws: tuple[Laws, ...]
    surfaces: tuple[Surface, ...]
    comparisons: tuple[Comparison, ...]
    noise: tuple[Noise, ...]

    @property
    def budgets(self) -> list[float]:
        """From the smallest."""
        return sorted({curve.budget for curve in self.curves})

    @property
    def diverged(self) -> int:
        """Runs without a finite loss."""
        return sum(curve.diverged for curve in self.curves)

    def shown(self) -> list[Curve]:
        """The curves that belong into one picture: the methods as they are, and settings tried at several sizes."""
        return [c for c in self.curves if c.rows and (not c.settings or len(c.points("params_active")) >= 3)]


def analyse(rows: Sequence[Row], *, resamples: int = 1000) -> Analysis:
    """Fits and compares. Losses are only compared on the same text.

    Args:
        rows: finished runs, of any sweeps.
        resamples: for the intervals of the parabolas; the surfaces get a twentieth; 0 for none.
    """
    texts, budgets = _texts(rows), same_budgets(rows)
    rows = [dataclasses.replace(row, budget=budgets[row.budget]) for row in rows]
    curves = tuple(_curves(rows, texts, resamples))
    by_series = defaultdict(list)
    for curve in curves:
        by_series[curve.series].append(curve)
    fitted = {series: own for series, own in by_series.items() if any(curve.fit for curve in own)}
    return Analysis(
        rows=tuple(rows),
        texts=tuple(sorted(set(texts.values()))),
        curves=curves,
        laws=tuple(_laws(series, own) for series, own in fitted.items()),
        surfaces=tuple(_surface(series, own, resamples // SURFACE_SHARE) for series, own in fitted.items()),
        comparisons=tuple(_comparisons(fitted, by_series)),
        noise=tuple(_noise(curves)),
    )


def mean_loss(rows: Sequence[Row]) -> float:
    """Over seeds."""
    return float(np.mean([row.loss for row in rows]))


def _texts(rows: Sequence[Row]) -> dict[str, str]:
    """A name for each cache: its corpus, and the cache where two share the corpus."""
    corpora = {row.cache: row.corpus for row in rows}
    shared = {corpus for corpus in corpora.values() if list(corpora.values()).count(corpus) > 1}
    return {cache: f"{corpus} ({cache})" if corpus in shared else corpus for cache, corpus in corpora.items()}


def same_budgets(rows: Sequence[Row]) -> dict[float, float]:
    """What each budget counts as: those nearer than 2% are one, by its roundest name."""
    groups: list[list[float]] = []
    for budget in sorted({row.budget for row in rows}):
        if groups and budget <= groups[-1][0] * (1 + SAME_BUDGET):
            groups[-1].append(budget)
        else:
            groups.append([budget])
    names = {}
    for group in groups:
        middle = math.exp(sum(map(math.log, group)) / len(group))
        rounded = next(
            r for digits in range(17) if math.isclose(r := float(f"{middle:.{digits}e}"), middle, rel_tol=0.01)
        )
        names |= {budget: group[0] if len(group) == 1 else rounded for budget in group}
    return names


def _curves(rows: Sequence[Row], texts: dict[str, str], resamples: int) -> Iterator[Curve]:
    groups = defaultdict(list)
    for row in rows:
        suffix = f", on {texts[row.cache]}" if len(texts) > 1 else ""
        groups[row.budget, row.series + suffix].append(row)
    for (budget, series), runs in groups.items():
        finite = tuple(row for row in runs if math.isfinite(row.loss))
        fits, reasons = {}, {}
        for measure in MEASURES:
            try:
                fits[measure] = fit_parabola(
                    [float(getattr(row, measure)) for row in finite], [row.loss for row in finite], resamples=resamples
                )
            except NoFit as reason:
                reasons[measure] = str(reason)
        yield Curve(
            series=series,
            method=runs[0].method,
            is_causal=all(row.is_causal for row in runs),
            settings=runs[0].settings,
            text=texts[runs[0].cache],
            budget=budget,
            compute=float(np.mean([row.training_flops for row in finite or runs])),
            rows=finite,
            diverged=len(runs) - len(finite),
            fits=fits,
            reasons=reasons,
        )


def _laws(series: str, curves: Sequence[Curve]) -> Laws:
    known = [curve for curve in curves if curve.has_minimum]
    computes, reason = [curve.compute for curve in known], ""
    try:
        params = fit_power_law(computes, [curve.fit.size for curve in known])
        tokens = fit_power_law(computes, [curve.tokens_at_minimum for curve in known])
    except NoFit:
        number = {0: "no budget has", 1: "only one budget has"}.get(len(known), "the budgets are too near for")
        reason = f"{number} a minimum among the sizes tried, and a power law needs 2"
        params = tokens = None
    is_causal = all(curve.is_causal for curve in curves)
    return Laws(series=series, is_causal=is_causal, budgets=len(known), params=params, tokens=tokens, reason=reason)


def _surface(series: str, curves: Sequence[Curve], resamples: int) -> Surface:
    rows = [row for curve in curves for row in curve.rows]
    columns = ([float(getattr(row, name)) for row in rows] for name in ("params_active", "tokens", "loss"))
    surface, reason = None, ""
    try:
        surface = fit_loss_surface(*columns, resamples=resamples)
    except NoFit as none:
        reason = str(none)
    is_causal = all(curve.is_causal for curve in curves)
    return Surface(series=series, is_causal=is_causal, surface=surface, reason=reason)


def _comparisons(fitted: dict[str, list[Curve]], by_series: dict[str, list[Curve]]) -> Iterator[Comparison]:
    for series, curves in fitted.items():
        if curves[0].method == BASELINE:
            continue
        dense = _baseline(curves[0], by_series)
        for curve in curves:
            if curve.fit is None:
                continue
            difference, overlap, reason = _difference(curve, dense)
            saving, saving_reason = _saving(curve, dense)
            yield Comparison(
                series=series,
                baseline=dense[0].series if dense else BASELINE,
                is_causal=curve.is_causal,
                budget=curve.budget,
                difference=difference,
                overlap=overlap,
                reason=reason,
                saving=saving,
                saving_reason=saving_reason,
            )


def _baseline(curve: Curve, by_series: dict[str, list[Curve]]) -> list[Curve]:
    """Dense on the same text: with the same settings, or with none, or the only one."""
    dense = [own for own in by_series.values() if own[0].method == BASELINE and own[0].text == curve.text]
    for settings in (curve.settings, {}):
        for own in dense:
            if own[0].settings == settings:
                return own
    return dense[0] if len(dense) == 1 else []


def _difference(curve: Curve, dense: Sequence[Curve]) -> tuple[float | None, bool | None, str]:
    own = next((d for d in dense if d.budget == curve.budget), None)
    if own is None:
        return None, None, "no dense run at this budget"
    for which, name in ((curve, "its"), (own, "dense's")):
        if which.fit is None:
            return None, None, f"{name} runs have no parabola: {which.reasons['params_active']}"
        if not which.has_minimum:
            return None, None, f"{name} minimum lies outside the sizes tried"
    overlap = None
    if curve.fit.loss_interval and own.fit.loss_interval:
        (low, high), (dense_low, dense_high) = curve.fit.loss_interval, own.fit.loss_interval
        overlap = low <= dense_high and dense_low <= high
    return curve.fit.loss - own.fit.loss, overlap, ""


def _saving(curve: Curve, dense: Sequence[Curve]) -> tuple[Saving | None, str]:
    if not curve.has_minimum:
        return None, "its minimum lies outside the sizes tried"
    known = [own for own in dense if own.has_minimum]
    if len(known) < 2:
        number = "no budget" if not known else "only one budget"
        return None, f"dense has a minimum among the sizes tried at {number}, and a comparison needs 2"
    try:
        baseline = [own.compute for own in known], [own.fit.loss for own in known]
        return compute_saved(curve.compute, curve.fit.loss, *baseline), ""
    except NoFit as reason:
        return None, str(reason)


def _noise(curves: Sequence[Curve]) -> Iterator[Noise]:
    by_budget = defaultdict(list)
    for curve in curves:
        for _, rows in curve.points("params_active"):
            by_seed = {row.seed: row.loss for row in rows}  # of copies of a run one counts
            if len(by_seed) > 1:
                by_budget[curve.budget].append(list(by_seed.values()))
    for budget, groups in sorted(by_budget.items()):
        squares = sum(len(losses) * float(np.var(losses)) for losses in groups)
        runs = sum(map(len, groups))
        deviation = math.sqrt(squares / (runs - len(groups)))
        yield Noise(budget=budget, deviation=deviation, groups=len(groups), runs=runs)
