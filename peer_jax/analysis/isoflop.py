"""IsoFLOP analysis (Hoffmann et al. 2022, approach 2): from rows to minima, power laws and comparisons with a baseline.

N active parameters, D tokens, C training FLOPs spent, L final validation loss in nats per token, or per image.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from peer_jax.analysis.claims import Claim, claims
from peer_jax.analysis.columns import NoFit
from peer_jax.analysis.comparisons import Comparison, Pair, comparisons, pairs
from peer_jax.analysis.differences import Difference
from peer_jax.analysis.fit import LossSurface, PowerLaw, fit_loss_surface, fit_power_law
from peer_jax.analysis.frontier import Frontier, frontiers
from peer_jax.analysis.pooling import tell_apart
from peer_jax.analysis.row import Row, in_order, unit
from peer_jax.analysis.series import Curve, curves_of, shown

# Runs end within half a step of their budget. A run outside a sweep does not say its budget, only what it spent.
SAME_BUDGET = 0.02
# A resample of a surface takes about a hundred times as long as a resample of a parabola.
SURFACE_SHARE = 20  # so a surface gets this many times fewer


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
        pairs: series against each other, by the runs that both have of a size and a seed.
        claims: what a reader wants to know, and whether it holds; pairs first.
        frontiers: the lowest losses within seconds, and within total parameters.
    """

    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    baselines: tuple[str, ...]
    curves: tuple[Curve, ...]
    laws: tuple[Laws, ...]
    surfaces: tuple[Surface, ...]
    comparisons: tuple[Comparison, ...]
    noise: tuple[Noise, ...]
    pairs: tuple[Pair, ...]
    claims: tuple[Claim, ...]
    frontiers: tuple[Frontier, ...]

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
        """The curves that belong into one picture, see ``series.shown``."""
        return shown(self.curves)

    def difference(self, first: str, second: str, budget: float) -> Difference | None:
        """The loss of one series minus that of another, which the claim on them is made from; None if there is none."""
        for pair in self.pairs:
            if pair.first.budget == budget and {pair.first.series, pair.second.series} == {first, second}:
                return pair.told if pair.first.series == first or pair.told is None else pair.told.reversed()
        return None


def analyse(rows: Sequence[Row], *, resamples: int = 1000) -> Analysis:
    """Fits and compares. Losses are only compared on the same text, and a point is a mean over seeds alone.

    Args:
        rows: finished runs of any sweeps.
        resamples: number of resamples for the intervals of a parabola; a surface gets a twentieth; 0 for no intervals.
    """
    texts, budgets = _texts(rows), same_budgets(rows)
    several = len(texts) > 1
    named = [
        dataclasses.replace(row, budget=budgets[row.budget], text=texts[row.cache] if several else "") for row in rows
    ]
    rows = tell_apart(in_order(named))
    curves = tuple(curves_of(rows, texts, resamples))
    by_series = defaultdict(list)
    for curve in curves:
        by_series[curve.series].append(curve)
    fitted = {series: own for series, own in by_series.items() if any(curve.fit for curve in own)}
    paired = pairs(shown(curves), by_series, resamples)
    methods = {row.method for row in rows}
    return Analysis(
        rows=tuple(rows),
        texts=tuple(sorted(set(texts.values()))),
        baselines=tuple(sorted({label for curve in curves for label in curve.baselines} & methods)),
        curves=curves,
        laws=tuple(_laws(series, own) for series, own in fitted.items()),
        surfaces=tuple(_surface(series, own, resamples // SURFACE_SHARE) for series, own in fitted.items()),
        comparisons=tuple(comparisons(by_series, paired)),
        noise=tuple(_noise(curves)),
        pairs=tuple(paired.values()),
        claims=tuple(claims(shown(curves), paired)),
        frontiers=tuple(frontiers(shown(curves))),
    )


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
