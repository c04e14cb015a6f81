"""What can be claimed of the methods, each with its number, its interval, and whether it holds."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from peer_jax.analysis.columns import Interval
from peer_jax.analysis.comparisons import Pair, Pairs
from peer_jax.analysis.series import Curve

Answer = Literal["holds", "fails", "open"]

ONE_SEED = "one seed, so there is no interval from seeds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement on one budget.

    Attributes:
        kind: what the number is: a difference of losses, the size of a minimum, or a curvature.
        statement: in words; it does not say the budget.
        answer: "holds" or "fails" if the whole interval is on one side of the limit; otherwise "open".
        value: the number; None if there is none.
        interval: the 95% interval of the number; None if there is none.
        note: what the number is from, and why a claim is open that has no interval.
    """

    kind: Literal["difference", "minimum", "curvature"]
    budget: float
    statement: str
    answer: Answer
    value: float | None
    interval: Interval | None
    note: str


def claims(curves: Sequence[Curve], pairs: Pairs) -> Iterator[Claim]:
    """The claims on each budget: methods below their baseline, methods below each other, minima and curvatures."""
    for budget in sorted({curve.budget for curve in curves}):
        own = [pair for (at, _, _), pair in pairs.items() if at == budget]
        for pair in sorted(own, key=lambda pair: not _is_baseline(pair)):
            yield _below(pair)
        for curve in curves:
            if curve.budget == budget and curve.curvature is not None:
                yield _inside(curve)
        for curve in curves:
            if curve.budget == budget and curve.curvature is not None:
                yield _curved(curve)


def _is_baseline(pair: Pair) -> bool:
    return pair.second.method in pair.first.baselines


def named(curve: Curve) -> str:
    """The name of the series, which says so if it is not causal."""
    return curve.series if curve.is_causal else f"{curve.series} (not causal)"


def _below(pair: Pair) -> Claim:
    label = f"{named(pair.second)}{', the baseline' if _is_baseline(pair) else ''}"
    found, notes, answer = pair.told, [], "open"
    if found is None:
        notes.append("no size and seed in common")
    else:
        if found is pair.at_minima:
            notes.append(f"at the minima, {found.sizes} sizes")
        else:
            notes.append(f"at size {found.size}" if found.size else f"mean over {found.sizes} sizes")
            notes += [f"without {found.left_out} that lack a seed"] if found.left_out else []
        if found.seeds == 1:
            notes.append(ONE_SEED + (", only one from sizes" if found.interval else ""))
        elif found.fewest == 1:
            notes.append(f"{found.seeds} seeds, but one at some sizes, whose noise the interval does not hold")
        else:
            notes.append(f"{found.seeds} seeds" + (f", at some sizes {found.fewest}" * (found.fewest < found.seeds)))
            answer = _side(found.interval, below=0.0)
        notes += [] if pair.same_order else ["other batches or another order of the data"]
    return Claim(
        kind="difference",
        budget=pair.first.budget,
        statement=f"{named(pair.first)} is below {label}",
        answer=answer,
        value=None if found is None else found.value,
        interval=None if found is None else found.interval,
        note=", ".join(notes),
    )


def _side(interval: Interval | None, *, below: float) -> Answer:
    """Whether an interval is below a limit ("holds"), above it ("fails"), or neither."""
    if interval is None or interval[0] <= below <= interval[1]:
        return "open"
    return "holds" if interval[1] < below else "fails"


def _inside(curve: Curve) -> Claim:
    sizes = [size for size, _ in curve.points("params_active")]
    interval, answer = curve.fit.size_interval if curve.fit else None, "open"
    if interval is not None and sizes[0] <= interval[0] and interval[1] <= sizes[-1]:
        answer = "holds"
    elif interval is not None and (interval[1] < sizes[0] or sizes[-1] < interval[0]):
        answer = "fails"
    return Claim(
        kind="minimum",
        budget=curve.budget,
        statement=f"The minimum of {named(curve)} lies inside the sizes",
        answer=answer,
        value=curve.fit.size if curve.fit else None,
        interval=interval,
        note=curve.fit.note if curve.fit else curve.reasons["params_active"],
    )


def _curved(curve: Curve) -> Claim:
    value, interval = curve.curvature
    return Claim(
        kind="curvature",
        budget=curve.budget,
        statement=f"The losses of {named(curve)} curve upwards",
        answer=_side(interval and (-interval[1], -interval[0]), below=0.0),
        value=value,
        interval=interval,
        note="" if interval else "the points fit exactly, so there is no interval",
    )
