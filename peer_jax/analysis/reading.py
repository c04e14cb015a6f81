"""What an analysis shows, in sentences made from its numbers. They claim nothing that the evidence does not carry."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from peer_jax.analysis.curvature import F_TEST_LEVEL
from peer_jax.analysis.isoflop import Analysis
from peer_jax.analysis.pooling import SWEEP
from peer_jax.analysis.row import Row
from peer_jax.analysis.series import Curve
from peer_jax.training.flops import short

NOT_CAUSAL = "not causal"
_TOLD_BY = {SWEEP: "the configs of their sweeps"}


def si(number: float | None) -> str:
    """Writes a number to three digits with a suffix: 12.3k for 12345."""
    if number is None:
        return "-"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6 would be written 1e+03.
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def loss(value: float | None) -> str:
    """Writes a loss in nats to four decimals."""
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"


def interval(bounds: tuple[float, float] | None, write=si) -> str:
    """Writes both ends of an interval."""
    return "-" if bounds is None else f"{write(bounds[0])} to {write(bounds[1])}"


def budget(value: float) -> str:
    """Writes training FLOPs to three digits."""
    return short(float(f"{value:.3g}"))


def named(series: str, is_causal: bool) -> str:
    """The name of a series, which says so if the series is not causal."""
    return series if is_causal else f"{series}, {NOT_CAUSAL}"


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def joined(words: Sequence[str]) -> str:
    """Joins words in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


@dataclasses.dataclass(frozen=True)
class Finding:
    """Sentences under a heading."""

    title: str
    sentences: list[str]


def reading(analysis: Analysis) -> list[Finding]:
    """What is found at each budget, then what limits all findings."""
    found = [Finding(f"At {budget(value)} training FLOPs", _at_budget(analysis, value)) for value in analysis.budgets]
    return [*found, Finding("What limits this", cautions(analysis))]


def without(reasons: Iterable[tuple[str, bool, str]]) -> list[str]:
    """One sentence per reason, with the series that have no result for it.

    Args:
        reasons: series, whether it is causal, and the reason; the reason is empty where there is a result.
    """
    groups = defaultdict(list)
    for series, is_causal, reason in reasons:
        if reason:
            groups[reason].append(named(series, is_causal))
    return [f"{'; '.join(series)}: {reason}." for reason, series in groups.items()]


def _at_budget(analysis: Analysis, value: float) -> list[str]:
    curves = [curve for curve in analysis.shown() if curve.budget == value]
    sentences = []
    for text in analysis.texts:
        own = [curve for curve in curves if curve.text == text]
        causal = [curve for curve in own if curve.is_causal]
        with_minimum = [curve for curve in causal if curve.has_minimum]
        if with_minimum:
            sentences += _minima(sorted(with_minimum, key=lambda curve: curve.fit.loss), analysis)
        elif causal:
            sentences += _measured(causal, analysis)
        sentences += _left_out(own, by_fit=bool(with_minimum))
    return sentences or ["Only settings were compared here, at fewer than 3 sizes: see the ablations."]


def _minima(ranked: Sequence[Curve], analysis: Analysis) -> list[str]:
    """Which series has the lowest fitted minimum, and whether paired runs show that its lead is more than noise."""
    first = ranked[0]
    known = f" (95% interval {interval(first.fit.loss_interval, loss)})" if first.fit.loss_interval else ""
    sentences = [
        f"{first.series} has the lowest fitted minimum of the {_causal(first)}methods: {loss(first.fit.loss)} nats per "
        f"{first.unit}{known} at {si(first.fit.size)} active parameters."
    ]
    if len(ranked) == 1:
        return [
            f"{first.series} is the only {_causal(first)}method with a minimum among the sizes tried: "
            f"{loss(first.fit.loss)} nats per {first.unit}{known} at {si(first.fit.size)} active parameters."
        ]
    together, apart, against, unknown = [], [], [], []
    for other in ranked[1:]:
        found = analysis.difference(first.series, other.series, first.budget)
        if found is None or found.interval is None or found.seeds == 1:
            unknown.append(other)
        else:
            low, high = found.interval
            (apart if high < 0 else against if low > 0 else together).append(other)
    if together:
        sentences.append(
            f"The runs do not show an order between {first.series} and {_with_losses(together)}: the "
            f"{_intervals(together)} of the paired difference {'includes' if len(together) == 1 else 'include'} 0."
        )
    if apart:
        sentences.append(
            f"{_with_losses(apart)} {'is' if len(apart) == 1 else 'are'} higher, and the {_intervals(apart)} of the "
            f"paired difference {'excludes' if len(apart) == 1 else 'exclude'} 0."
        )
    if against:
        sentences.append(
            f"{_with_losses(against)} {'has' if len(against) == 1 else 'have'} no lower minimum, but lower losses on "
            f"average over the sizes that were paired with {first.series}: the {_intervals(against)} of that "
            f"difference {'excludes' if len(against) == 1 else 'exclude'} 0, so the order depends on the fit."
        )
    if unknown:
        sentences.append(
            f"There are no paired runs of several seeds to compare {first.series} with {_with_losses(unknown)}, so it "
            "is not known whether that order is more than noise."
        )
    return sentences


def _intervals(curves: Sequence[Curve]) -> str:
    return "interval" if len(curves) == 1 else "intervals"


def _causal(curve: Curve) -> str:
    """The word that says which methods are ranked, where causality matters: no token of an image is predicted."""
    return "causal " if curve.unit == "token" else ""


def _with_losses(curves: Sequence[Curve]) -> str:
    return joined([f"{curve.series} ({loss(curve.fit.loss)})" for curve in curves])


def _measured(curves: Sequence[Curve], analysis: Analysis) -> list[str]:
    """Where no series has a minimum: the series with the lowest measured losses."""
    ranked = sorted((curve for curve in curves if curve.best()), key=lambda curve: curve.best()[1])
    if not ranked:
        return ["No run of a causal method ended with a finite loss."]
    if len(ranked) == 1:
        rows, value = ranked[0].best()
        return [
            f"There is one {_causal(ranked[0])}series, {ranked[0].series}, and its lowest loss is {loss(value)} nats "
            f"per {ranked[0].unit} (size {rows[0].size}, {count(len(rows), 'run')})."
        ]
    (rows, low), (others, next_low) = ranked[0].best(), ranked[1].best()
    sentences = [
        f"No {_causal(ranked[0])}method has a minimum among the sizes tried. The lowest loss measured is {loss(low)} "
        f"nats per {ranked[0].unit} by {ranked[0].series} (size {rows[0].size}, {count(len(rows), 'run')}), the next "
        f"lowest {loss(next_low)} by {ranked[1].series} (size {others[0].size}, {count(len(others), 'run')})."
    ]
    noise = next((noise for noise in analysis.noise if noise.budget == curves[0].budget), None)
    if noise is None:
        sentences.append("Each point has one seed, so it is not known whether that order is more than noise.")
    elif next_low - low < 2 * noise.deviation * math.sqrt(1 / len(rows) + 1 / len(others)):
        sentences.append(
            f"This difference is within the noise of seeds (standard deviation over seeds {noise.deviation:.4f})."
        )
    return sentences


def _left_out(curves: Sequence[Curve], *, by_fit: bool) -> list[str]:
    """Which series were not ranked, and why."""
    sentences = []
    for curve in (curve for curve in curves if not curve.is_causal and curve.best()):
        value = f"a fitted minimum of {loss(curve.fit.loss)}" if curve.has_minimum else f"{loss(curve.best()[1])}"
        sentences.append(
            f"{curve.series} reaches {value}, but is not causal: tokens see later tokens of their sequence, "
            "so its loss can't be compared with the losses of the causal methods."
        )
    outside = [curve.series for curve in curves if curve.fit and curve.fit.is_extrapolation]
    if outside:
        sentences.append(
            f"{_minimum_of(outside)} outside the sizes tried. This is an extrapolation and is not counted as a result."
        )
    reasons = defaultdict(list)
    for curve in curves if by_fit else ():
        if curve.fit is None:
            reasons[curve.reasons["params_active"]].append(curve.series)
    sentences += [
        f"{joined(series)} {'has' if len(series) == 1 else 'have'} no parabola: {reason}."
        for reason, series in reasons.items()
    ]
    return sentences


def _minimum_of(series: Sequence[str]) -> str:
    return f"The minimum of {series[0]} lies" if len(series) == 1 else f"The minima of {joined(series)} lie"


def cautions(analysis: Analysis) -> list[str]:
    """What limits all findings."""
    shown, found = analysis.shown(), []
    if len(analysis.texts) > 1:
        found.append(
            f"The runs are on {len(analysis.texts)} different texts ({joined(analysis.texts)}): "
            "losses are compared only on the same text."
        )
    single = sorted({curve.budget for curve in shown if curve.seeds == 1})
    if single:
        where = "every budget" if single == analysis.budgets else f"{joined([budget(b) for b in single])} FLOPs"
        found.append(
            f"At {where} some or all sizes have one seed. There the intervals show how far the points lie from a "
            "parabola, which is not how far seeds differ."
        )
    if any(curve.fit and curve.fit.loss_interval for curve in shown):
        found.append(
            "The intervals are 95% bootstrap intervals over seeds and points. They do not include how well the "
            "learning rates of each method were tuned."
        )
    if analysis.claims:
        found.append(
            f"Each claim has a 95% interval of its own. There are {count(len(analysis.claims), 'claim')}, so some may "
            "be wrong by chance."
        )
    if shared := [curve for curve in shown if curve.shared is not None]:
        found.append(
            f"{count(len(shared), 'parabola has', 'parabolas have')} the curvature of all budgets of the series, "
            "because the budget's own is within its noise, and an F test does not reject at the level of "
            f"{F_TEST_LEVEL:.0%} that the budgets have one curvature: see the table of minima."
        )
    if told := sorted({_TOLD_BY.get(name, name) for row in analysis.rows for name in row.found}):
        found.append(
            f"Some runs of one method differ in {joined(told)}, not only in their seed. They are series of their own, "
            "because a point is a mean over seeds alone."
        )
    if analysis.noise:
        found.append(
            "The standard deviation over seeds is "
            + joined(
                [
                    f"{n.deviation:.4f} nats at {budget(n.budget)} FLOPs ({count(n.groups, 'group')} of runs)"
                    for n in analysis.noise
                ]
            )
            + "."
        )
    if analysis.diverged:
        are = "is" if analysis.diverged == 1 else "are"
        found.append(f"{count(analysis.diverged, 'run')} ended without a finite loss and {are} left out of the fits.")
    off = [row for row in analysis.rows if abs(row.training_flops / row.budget - 1) > 0.02]
    if off:
        found.append(f"{count(len(off), 'run')} missed the budget by more than 2%: see the table of runs.")
    if repeated := [row for row in analysis.rows if (row.epochs or 0) > 1]:
        most = max(row.epochs for row in repeated)
        found.append(f"{count(len(repeated), 'run')} went over the corpus more than once, at most {most:.2g} times.")
    places = [(row.cache, row.series, row.size, row.budget, row.seed) for row in analysis.rows]
    if copies := len(places) - len(set(places)):
        found.append(
            f"{count(copies, 'run')} {'has' if copies == 1 else 'have'} the method, size, budget, settings and seed of "
            "another run. Each counts in the fits."
        )
    return found


def seconds(rows: Sequence[Row]) -> list[str]:
    """What the seconds of the runs are, on which machines, and why they may not be comparable."""
    known = [row for row in rows if row.seconds is not None]
    machines = sorted({row.machine or f"{row.device} (not described further)" for row in known})
    found = []
    if known:
        found.append(
            f"Seconds are the time of the training steps, without compilation and evaluation, on {joined(machines)}."
        )
    if len(machines) > 1:
        found.append("The runs come from several kinds of machine, so their seconds are not comparable as they are.")
    if beside := [row for row in known if row.side_by_side]:
        found.append(
            f"{count(len(beside), 'run')} had only some of the cores of the machine. Others that ran at the same time "
            "on the other cores may have made them slower."
        )
    if silent := [row for row in known if row.side_by_side is None]:
        found.append(
            f"{count(len(silent), 'result')} {'does' if len(silent) == 1 else 'do'} not say whether other runs went on "
            "beside, on the same cores or accelerator."
        )
    if missing := len(rows) - len(known):
        found.append(f"{count(missing, 'run')} without a known time {'is' if missing == 1 else 'are'} left out here.")
    return found
