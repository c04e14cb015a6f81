"""Differences of loss between two methods, from runs that are paired by size and seed.

Paired runs have the same name of size and the same seed, and so the same order of data. What both have in common, such
as an easy last batch, cancels out in their difference, but not in two separate intervals.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
from scipy import stats

from peer_jax.analysis.columns import Interval, NoFit, check_confidence, percentiles
from peer_jax.analysis.parabola import Points, asymmetry, solve
from peer_jax.analysis.resampling import noise, scales

Cells = Mapping[tuple[str, int], tuple[float, float]]
"""The measure of size and the loss of each run, by the name of its size and its seed."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of losses, below 0 where the first method is better.

    Attributes:
        size: the size that it is at; empty if it is over several.
        value: the mean over seeds, or the difference of two minima.
        interval: None where there is no interval.
        seeds: the number of seeds that both methods have.
        fewest: the number of seeds at the size that has the fewest.
        sizes: the number of sizes that both methods have.
        left_out: the number of further sizes that both have, which lack one of the seeds.
    """

    size: str
    value: float
    interval: Interval | None
    seeds: int
    fewest: int
    sizes: int
    left_out: int = 0

    def reversed(self) -> "Difference":
        """The second method minus the first."""
        interval = self.interval and (-self.interval[1], -self.interval[0])
        return dataclasses.replace(self, value=-self.value, interval=interval)


def at_sizes(first: Cells, second: Cells, *, confidence: float = 0.95) -> list[Difference]:
    """The mean difference at each size that both methods have, in the order of ``first``, by Student's t over seeds."""
    found = defaultdict(list)
    for (size, seed), (_, loss) in first.items():
        if (size, seed) in second:
            found[size].append(loss - second[size, seed][1])
    return [Difference(size, *_mean(values, confidence), len(values), len(values), 1) for size, values in found.items()]


def over_sizes(first: Cells, second: Cells, *, confidence: float = 0.95) -> Difference | None:
    """The mean difference over sizes that both methods have with the same seeds.

    The seeds are those of one of the sizes, or those that all sizes have: several rather than one, and then those that
    most sizes have. None if no size and seed is in common.
    """
    common: dict[str, set[int]] = {}
    for size, seed in first.keys() & second.keys():
        common.setdefault(size, set()).add(seed)
    if not common:
        return None
    candidates = [*common.values(), set.intersection(*common.values())]
    seeds = max(
        (sorted(own) for own in candidates if own),
        key=lambda own: (len(own) > 1, sum(theirs.issuperset(own) for theirs in common.values()), len(own), own),
    )
    sizes = sorted(size for size, own in common.items() if own.issuperset(seeds))
    means = [float(np.mean([first[s, seed][1] - second[s, seed][1] for s in sizes])) for seed in seeds]
    size = sizes[0] if len(sizes) == 1 else ""
    return Difference(
        size, *_mean(means, confidence), len(seeds), len(seeds), len(sizes), left_out=len(common) - len(sizes)
    )


def _mean(values: list[float], confidence: float) -> tuple[float, Interval | None]:
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, None
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, (mean - reach, mean + reach)


def at_minima(
    first: Cells, second: Cells, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Difference:
    """The difference between the minima of two parabolas through the paired runs.

    Both parabolas are drawn again together: the same seeds, and the same points of their residuals. The interval is
    scaled and widened as those of ``fit_parabola``, where what both parabolas are off by cancels out. It is None if the
    curvature is within its noise, and it is from the sizes alone if there is one seed.

    Args:
        first, second: the runs of the methods, of which those count that both have.
        confidence: the probability that the interval contains the truth.
        resamples: the number of fits to resampled residuals; 0 for no interval.
        seed: the seed of the resamples.

    Raises:
        NoFit: if one of the parabolas has no minimum among the sizes.
        ValueError: if the confidence is out of range.
    """
    check_confidence(confidence)
    common = [cell for cell in first if cell in second]
    if not common:
        raise NoFit("no size and seed in common")
    seeds = [seed for _, seed in common]
    points = [Points.of(*map(list, zip(*map(own.get, common), strict=True)), seeds) for own in (first, second)]
    for own in points:
        own.check()
    fits = [solve([own]) for own in points]
    optima = [fit.minima(0, np.zeros((3, 1))) for fit in fits]
    for (position, _, _), own, fit in zip(optima, points, fits, strict=True):
        if not own.z.min() <= fit.middle + fit.scale * position[0] <= own.z.max():
            raise NoFit("a minimum outside the sizes that both have")
    value = float(optima[0][1][0] - optima[1][1][0])
    interval = None
    if resamples and fits[0].free > 0:
        draws = fits[0].layout.draw(resamples, seed)
        errors = [noise(fit.design, fit.residuals, fit.layout, draws) for fit in fits]
        gradients = [fit.gradients(0)[1] for fit in fits]
        parts = (
            np.var(gradients[0] @ getattr(errors[0], part) - gradients[1] @ getattr(errors[1], part))
            for part in ("points", "seeds")
        )
        of_points, of_seeds = scales(*parts, (fits[0].free, fits[0].layout.spare), confidence)
        (_, losses, convex), (_, others, is_convex) = (
            fit.minima(0, of_points * error.points + of_seeds * error.seeds)
            for fit, error in zip(fits, errors, strict=True)
        )
        both, shifts = convex & is_convex, [asymmetry([own], fit) for own, fit in zip(points, fits, strict=True)]
        if np.mean(~both) <= (1 - confidence) / 2 and None not in shifts:
            low, high = percentiles((losses - others)[both], confidence)
            off = 2 * (shifts[0][1] - shifts[1][1])
            interval = min(low, low + off), max(high, high + off)
    fewest = min(Counter(size for size, _ in common).values())
    return Difference("", value, interval, len(set(seeds)), fewest, points[0].sizes)
