"""Methods against each other at a budget: in pairs of runs of one size and seed, and against their baseline."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from peer_jax.analysis import differences
from peer_jax.analysis.columns import Interval, NoFit
from peer_jax.analysis.differences import Difference
from peer_jax.analysis.fit import Saving, compute_saved
from peer_jax.analysis.series import Curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two series at a budget on one text, by the runs that have the same size and seed in both.

    Attributes:
        first, second: the curves; a difference is the loss of the first minus that of the second.
        at_sizes: the difference at each common size.
        over_sizes: the mean difference over the common sizes; None without runs in common.
        at_minima: the difference of the minima; None if a series has no minimum among the sizes, or not by its own
            curvature, as ``reason`` says.
        same_order: whether all paired runs had the same batches in the same order.
    """

    first: Curve
    second: Curve
    at_sizes: tuple[Difference, ...]
    over_sizes: Difference | None
    at_minima: Difference | None
    reason: str
    same_order: bool

    @property
    def told(self) -> Difference | None:
        """What a claim is made from: the difference of the minima if it has an interval, or else that over sizes.

        Minima of which a size has one seed give way to sizes that have several.
        """
        minima, sizes = self.at_minima, self.over_sizes
        if minima is None or minima.interval is None:
            return sizes
        return sizes if sizes is not None and minima.fewest < 2 <= sizes.fewest else minima


Place = tuple[float, str, str]
"""A budget and the names of two series."""

Pairs = Mapping[Place, Pair]


def pairs(curves: Sequence[Curve], by_series: dict[str, list[Curve]], resamples: int) -> dict[Place, Pair]:
    """Each two of the series that no sweep varied, and each other series with its baseline, at each budget.

    A pair that has a baseline has it second. Otherwise the series are in the order of their names.
    """
    found: dict[Place, Pair] = {}
    baselines = {curve.series: baseline_of(curve, by_series)[0] for curve in curves}

    def add(first: Curve, second: Curve) -> None:
        if (place := (first.budget, first.series, second.series)) not in found:
            found[place] = _pair(first, second, resamples)

    for curve in curves:
        if curve.method not in curve.baselines:
            for own in baselines[curve.series]:
                if own.budget == curve.budget and own.rows:
                    add(curve, own)
    plain = [curve for curve in curves if not curve.varied] or curves
    for first, second in itertools.combinations(sorted(plain, key=lambda curve: curve.series), 2):
        names = (first.budget, second.series, first.series)
        if first.budget == second.budget and first.text == second.text and names not in found:
            if first.method in first.baselines and second.method not in second.baselines:
                first, second = second, first
            add(first, second)
    return found


def _pair(first: Curve, second: Curve, resamples: int) -> Pair:
    cells, reason, minima = (first.cells(), second.cells()), "", None
    weak = [curve.series for curve in (first, second) if curve.shared is not None]
    try:
        if weak:
            raise NoFit(f"the curvature of {' and of '.join(weak)} at this budget is within its noise")
        minima = differences.at_minima(*cells, resamples=resamples)
    except NoFit as none:
        reason = str(none)
    return Pair(
        first=first,
        second=second,
        at_sizes=tuple(differences.at_sizes(*cells)),
        over_sizes=differences.over_sizes(*cells),
        at_minima=minima,
        reason=reason,
        same_order=_same_order(first, second),
    )


def _same_order(first: Curve, second: Curve) -> bool:
    orders = [{(row.size, row.seed): row.order for row in curve.rows} for curve in (first, second)]
    return all(orders[0][cell] == orders[1][cell] for cell in orders[0].keys() & orders[1].keys())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A series against its baseline at a budget, each at its minimum.

    Attributes:
        baseline: the series that is the baseline; None if there is none, and ``reason`` says why.
        difference: loss minus the baseline's loss, below 0 where the series is better; None if one has no minimum.
        interval: the interval of the difference, from runs that are paired by size and seed; None if there is none.
        reason: why there is no difference, or no interval of it.
        saving: compute that the baseline needs for the same loss, in units of the series' compute.
        saving_reason: why there is no saving.
    """

    series: str
    baseline: str | None
    is_causal: bool
    budget: float
    difference: float | None
    interval: Interval | None
    reason: str
    saving: Saving | None
    saving_reason: str


def comparisons(by_series: dict[str, list[Curve]], pairs: Pairs) -> Iterator[Comparison]:
    """Each series that has a parabola against its baseline, at each budget."""
    fitted = {series: own for series, own in by_series.items() if any(curve.fit for curve in own)}
    for series, curves in fitted.items():
        if curves[0].method in curves[0].baselines:
            continue
        baseline, none = baseline_of(curves[0], by_series)
        for curve in curves:
            if curve.fit is None:
                continue
            difference, interval, reason = (None, None, none) if none else _difference(curve, baseline, pairs)
            saving, saving_reason = (None, none) if none else _saving(curve, baseline)
            yield Comparison(
                series=series,
                baseline=baseline[0].series if baseline else None,
                is_causal=curve.is_causal,
                budget=curve.budget,
                difference=difference,
                interval=interval,
                reason=reason,
                saving=saving,
                saving_reason=saving_reason,
            )


def baseline_of(curve: Curve, by_series: dict[str, list[Curve]]) -> tuple[list[Curve], str]:
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


def _difference(curve: Curve, baseline: Sequence[Curve], pairs: Pairs) -> tuple[float | None, Interval | None, str]:
    label = baseline[0].series
    own = next((c for c in baseline if c.budget == curve.budget), None)
    if own is None:
        return None, None, f"no run of {label} at this budget"
    for which, name in ((curve, curve.series), (own, label)):
        if which.fit is None:
            return None, None, f"the runs of {name} have no parabola: {which.reasons['params_active']}"
        if not which.has_minimum:
            return None, None, f"the minimum of {name} lies outside the sizes tried"
    pair = pairs.get((curve.budget, curve.series, label))
    if pair is None or pair.at_minima is None:
        return curve.fit.loss - own.fit.loss, None, f"no interval: {pair.reason}" if pair else ""
    return pair.at_minima.value, pair.at_minima.interval, ""


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
