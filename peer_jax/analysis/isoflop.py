"""IsoFLOP analysis (Hoffmann et al. 2022, approach 2): from rows to minima, power laws and comparisons with a baseline.

N active parameters, D tokens, C training FLOPs spent, L final validation loss in nats per token, or per image.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from peer_jax.analysis.columns import NoFit
from peer_jax.analysis.fit import LossSurface, PowerLaw, Saving, compute_saved, fit_loss_surface, fit_power_law
from peer_jax.analysis.parabola import Parabola, fit_parabola
from peer_jax.analysis.pooling import tell_apart
from peer_jax.analysis.results import Row, unit
from peer_jax.storage import AnyPath

MEASURES = ("params_active", "params_total", "tokens")
# Runs end within half a step of their budget. A run outside a sweep does not say its budget, only what it spent.
SAME_BUDGET = 0.02
# A resample of a surface takes about a hundred times as long as a resample of a parabola.
SURFACE_SHARE = 20  # so a surface gets this many times fewer


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
        """The measure and the runs of each size, by rising measure. The runs of a size differ in their seeds alone."""
        groups = defaultdict(list)
        for row in self.rows:
            groups[float(getattr(row, measure)), row.size].append(row)
        return [(value, rows) for (value, _), rows in sorted(groups.items(), key=lambda group: group[0])]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """N_opt and D_opt of a series as power laws of C, fitted to the budgets that have a minimum among the sizes."""

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
    """A series against its baseline at a budget, each at its minimum.

    Attributes:
        baseline: the series that is the baseline; None if there is none, and ``reason`` says why.
        difference: loss minus the baseline's loss, below 0 where the series is better; None if one has no minimum.
        overlap: whether the two intervals of the minimum loss overlap; None if one is not known.
        reason: why there is no difference.
        saving: compute that the baseline needs for the same loss, in units of the series' compute.
        saving_reason: why there is no saving.
    """

    series: str
    baseline: str | None
    is_causal: bool
    budget: float
    difference: float | None
    overlap: bool | None
    reason: str
    saving: Saving | None
    saving_reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """The standard deviation over seeds at a budget, pooled over ``groups`` of runs that differ in their seed alone."""

    budget: float
    deviation: float
    groups: int
    runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that is computed from the rows.

    Attributes:
        rows: the rows with the budgets of ``same_budgets`` and the settings of ``tell_apart``, so that rows of one
            series differ only in size, budget and seed.
        texts: names of the texts.
        baselines: labels of the methods that others are compared with.
    """

    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    baselines: tuple[str, ...]
    curves: tuple[Curve, ...]
    laws: tuple[Laws, ...]
    surfaces: tuple[Surface, ...]
    comparisons: tuple[Comparison, ...]
    noise: tuple[Noise, ...]

    @property
    def unit(self) -> str:
        """What the losses are means over: a token, an image, or "token or image"."""
        return unit(self.rows)

    @property
    def budgets(self) -> list[float]:
        """The budgets, from the smallest."""
        return sorted({curve.budget for curve in self.curves})

    @property
    def diverged(self) -> int:
        """The number of runs without a finite loss."""
        return sum(curve.diverged for curve in self.curves)

    def shown(self) -> list[Curve]:
        """The curves that belong into one picture: methods without varied settings, and settings tried at 3 sizes."""
        return [c for c in self.curves if c.rows and (not c.varied or len(c.points("params_active")) >= 3)]


def analyse(rows: Sequence[Row], *, resamples: int = 1000) -> Analysis:
    """Fits and compares. Losses are only compared on the same text, and a point is a mean over seeds alone.

    Args:
        rows: finished runs of any sweeps.
        resamples: number of resamples for the intervals of a parabola; a surface gets a twentieth; 0 for no intervals.
    """
    texts, budgets = _texts(rows), same_budgets(rows)
    several = len(texts) > 1
    rows = tell_apart(
        [dataclasses.replace(row, budget=budgets[row.budget], text=texts[row.cache] if several else "") for row in rows]
    )
    curves = tuple(_curves(rows, texts, resamples))
    by_series = defaultdict(list)
    for curve in curves:
        by_series[curve.series].append(curve)
    fitted = {series: own for series, own in by_series.items() if any(curve.fit for curve in own)}
    methods = {row.method for row in rows}
    return Analysis(
        rows=tuple(rows),
        texts=tuple(sorted(set(texts.values()))),
        baselines=tuple(sorted({label for curve in curves for label in curve.baselines} & methods)),
        curves=curves,
        laws=tuple(_laws(series, own) for series, own in fitted.items()),
        surfaces=tuple(_surface(series, own, resamples // SURFACE_SHARE) for series, own in fitted.items()),
        comparisons=tuple(_comparisons(fitted, by_series)),
        noise=tuple(_noise(curves)),
    )


def mean_loss(rows: Sequence[Row]) -> float:
    """The mean loss over seeds."""
    return float(np.mean([row.loss for row in rows]))


def _texts(rows: Sequence[Row]) -> dict[str, str]:
    """A name for each cache: its corpus, and the cache as well where two caches share the corpus."""
    corpora = {row.cache: row.corpus for row in rows}
    shared = {corpus for corpus in corpora.values() if list(corpora.values()).count(corpus) > 1}
    return {cache: f"{corpus} ({cache})" if corpus in shared else corpus for cache, corpus in corpora.items()}


def same_budgets(rows: Sequence[Row]) -> dict[float, float]:
    """The budget that each budget counts as: budgets within 2% count as one, named by the roundest number near them."""
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
    usual = frozenset(row.method for row in rows if row.is_baseline)
    groups = defaultdict(list)
    for row in rows:
        groups[row.budget, row.series].append(row)
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
            varied=runs[0].varied,
            baselines=frozenset(row.baseline for row in runs if row.baseline is not None) or usual,
            text=texts[runs[0].cache],
            budget=budget,
            compute=float(np.mean([row.training_flops for row in finite or runs])),
            rows=finite,
            directories=frozenset(row.directory.parent for row in runs),
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
        if curves[0].method in curves[0].baselines:
            continue
        baseline, none = _baseline(curves[0], by_series)
        for curve in curves:
            if curve.fit is None:
                continue
            difference, overlap, reason = (None, None, none) if none else _difference(curve, baseline)
            saving, saving_reason = (None, none) if none else _saving(curve, baseline)
            yield Comparison(
                series=series,
                baseline=baseline[0].series if baseline else None,
                is_causal=curve.is_causal,
                budget=curve.budget,
                difference=difference,
                overlap=overlap,
                reason=reason,
                saving=saving,
                saving_reason=saving_reason,
            )


def _baseline(curve: Curve, by_series: dict[str, list[Curve]]) -> tuple[list[Curve], str]:
    """The curves of the baseline on the same text, or none and the reason.

    If there are several candidates, the first of these that fits one of them decides: the same settings; the same
    settings except for those that a sweep varied; no settings; no settings that a sweep varied. If it fits several,
    those that share a directory with the curve are preferred.
    """
    candidates = [own for own in by_series.values() if own[0].method in curve.baselines and own[0].text == curve.text]
    if not candidates:
        labels = " or ".join(sorted(curve.baselines))
        return [], f"no run of {labels} on this text" if labels else "no method is a baseline"
    told_apart = {name: value for name, value in curve.settings.items() if name not in curve.varied}
    for settings in (curve.settings, told_apart, {}):
        same = [own for own in candidates if own[0].settings == settings]
        if len(same) > 1:
            same = [own for own in same if any(c.directories & curve.directories for c in own)]
        if len(same) == 1:
            return same[0], ""
    plain = [own for own in candidates if not own[0].varied] or candidates
    if len(plain) > 1:
        plain = [own for own in plain if any(c.directories & curve.directories for c in own)] or plain
    if len(plain) == 1:
        return plain[0], ""
    return [], f"several series could be the baseline: {'; '.join(own[0].series for own in plain)}"


def _difference(curve: Curve, baseline: Sequence[Curve]) -> tuple[float | None, bool | None, str]:
    label = baseline[0].series
    own = next((c for c in baseline if c.budget == curve.budget), None)
    if own is None:
        return None, None, f"no run of {label} at this budget"
    for which, name in ((curve, curve.series), (own, label)):
        if which.fit is None:
            return None, None, f"the runs of {name} have no parabola: {which.reasons['params_active']}"
        if not which.has_minimum:
            return None, None, f"the minimum of {name} lies outside the sizes tried"
    overlap = None
    if curve.fit.loss_interval and own.fit.loss_interval:
        (low, high), (own_low, own_high) = curve.fit.loss_interval, own.fit.loss_interval
        overlap = low <= own_high and own_low <= high
    return curve.fit.loss - own.fit.loss, overlap, ""


def _saving(curve: Curve, baseline: Sequence[Curve]) -> tuple[Saving | None, str]:
    if not curve.has_minimum:
        return None, f"the minimum of {curve.series} lies outside the sizes tried"
    known = [own for own in baseline if own.has_minimum]
    if len(known) < 2:
        number = "no budget" if not known else "only one budget"
        return None, f"{baseline[0].series} has a minimum among the sizes tried at {number}, and a comparison needs 2"
    try:
        points = [own.compute for own in known], [own.fit.loss for own in known]
        return compute_saved(curve.compute, curve.fit.loss, *points), ""
    except NoFit as reason:
        return None, str(reason)


def _noise(curves: Sequence[Curve]) -> Iterator[Noise]:
    by_budget = defaultdict(list)
    for curve in curves:
        for _, rows in curve.points("params_active"):
            by_seed = {row.seed: row.loss for row in rows}  # copies of a run count once
            if len(by_seed) > 1:
                by_budget[curve.budget].append(list(by_seed.values()))
    for budget, groups in sorted(by_budget.items()):
        squares = sum(len(losses) * float(np.var(losses)) for losses in groups)
        runs = sum(map(len, groups))
        deviation = math.sqrt(squares / (runs - len(groups)))
        yield Noise(budget=budget, deviation=deviation, groups=len(groups), runs=runs)
