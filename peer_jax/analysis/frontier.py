"""The lowest loss that a series reaches with a limited amount of something: seconds, or parameters in all."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from peer_jax.analysis.row import Row
from peer_jax.analysis.series import Curve, mean_loss


@dataclasses.dataclass(frozen=True)
class Step:
    """The runs, alike but for their seeds, that have the lowest mean loss with up to this value of the measure."""

    value: float
    loss: float
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lowest mean loss of a series within each value of a measure, as steps that fall.

    Attributes:
        measure: the field of the rows, ``seconds`` or ``params_total``.
        budget: the training FLOPs that all runs had; None if the runs are of all budgets.
        steps: from the smallest value.
        last: the largest value that any run had.
    """

    series: str
    is_causal: bool
    measure: str
    budget: float | None
    steps: tuple[Step, ...]
    last: float

    def within(self, value: float) -> Step | None:
        """The best runs with at most this value; None if all had more."""
        return max((step for step in self.steps if step.value <= value), key=lambda step: step.value, default=None)


def frontiers(curves: Sequence[Curve]) -> list[Frontier]:
    """The frontier of each series in seconds over all its budgets, and in total parameters at each budget."""
    by_series = defaultdict(list)
    for curve in curves:
        by_series[curve.series].append(curve)
    found = [_frontier(own, "seconds", None) for own in by_series.values()]
    found += [_frontier([curve], "params_total", curve.budget) for curve in curves]
    return [frontier for frontier in found if frontier.steps]


def _frontier(curves: Sequence[Curve], measure: str, budget: float | None) -> Frontier:
    points = [(value, mean_loss(rows), tuple(rows)) for curve in curves for value, rows in curve.points(measure)]
    steps: list[Step] = []
    for value, loss, rows in sorted(points, key=lambda point: point[:2]):
        if not steps or loss < steps[-1].loss:
            steps.append(Step(value, loss, rows))
    is_causal = all(curve.is_causal for curve in curves)
    last = max((value for value, _, _ in points), default=math.nan)
    return Frontier(curves[0].series, is_causal, measure, budget, tuple(steps), last)


def round_values(own: Sequence[Frontier], most: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) at which at least two frontiers have an answer."""
    if not own:
        return []
    needed = min(2, len(own))
    ends = sorted(frontier.steps[0].value for frontier in own)[needed - 1], max(frontier.last for frontier in own)
    decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    numbers = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    # The first value above all runs is the answer without a limit.
    inside = [value for value in numbers if ends[0] <= value <= ends[1]]
    inside += [value for value in numbers if value > ends[1]][:1]
    kept = np.linspace(0, len(inside) - 1, min(most, len(inside))).round().astype(int)
    return [inside[place] for place in kept]


def ranked(own: Sequence[Frontier], most: int = 6) -> Iterator[tuple[float, Frontier, Step]]:
    """The best runs of each frontier within each of ``round_values``, from the lowest loss."""
    for value in round_values(own, most):
        reached = [(frontier, step) for frontier in own if (step := frontier.within(value)) is not None]
        for frontier, step in sorted(reached, key=lambda pair: pair[1].loss):
            yield value, frontier, step
