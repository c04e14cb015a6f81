"""Parabolas in ln size through the losses of one compute budget, and the intervals of their minimum.

Letters: L loss, n the number of rows. Logarithms are natural.
"""

import dataclasses
import math
import operator
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import stats

from peer_jax.analysis.columns import (
    LARGEST_LOG,
    Column,
    Interval,
    NoFit,
    Values,
    check_confidence,
    check_positive,
    columns_of,
    count,
    finite,
    percentiles,
)

# The share of the way from the middle of the sizes to an end, in ln size, beyond which an optimum is off-centre.
OFF_CENTRE = 0.5

# alpha + beta of L = E + A / N^alpha + B / D^beta, as published fits have it: 0.62 (Hoffmann et al. 2022) and 0.71
# (Besiroglu et al. 2024).
SUM_OF_EXPONENTS = 0.6


@dataclasses.dataclass(frozen=True)
class Parabola:
    """loss = curvature * (ln size - ln optimum)^2 + minimum, an isoFLOP curve (Hoffmann et al. 2022, approach 2).

    Attributes:
        coefficients: the factors of (ln size)^2, ln size and 1.
        size: the optimum.
        loss: the minimum.
        size_interval, loss_interval: bootstrap intervals; None if there is none or it has no bound, as ``note`` says.
        is_extrapolation: whether the optimum lies outside the sizes that the fit has seen.
        sizes: the number of distinct sizes.
        points: the number of rows that were fitted.
        note: what a reader should know about the fit; mostly empty.
    """

    coefficients: tuple[float, float, float]
    size: float
    loss: float
    size_interval: Interval | None
    loss_interval: Interval | None
    is_extrapolation: bool
    sizes: int
    points: int
    note: str

    def __call__(self, size: Values) -> float | Float[np.ndarray, "..."]:
        """The loss at one size or at many."""
        # The coefficients are not used: for ln size = 20 their terms are hundreds of times as large as their sum.
        return self.coefficients[0] * (np.log(np.asarray(size, np.float64)) - math.log(self.size)) ** 2 + self.loss


def fit_parabola(
    sizes: Column, losses: Column, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Parabola:
    """Fits loss in ln size by least squares. Rows without a finite loss are left out: diverged runs bend no parabola.

    The intervals are percentiles over fits to resampled residuals, because resampled rows would often leave fewer than
    3 sizes. The fit makes residuals too small by sqrt((n - 3) / n), which is undone. Percentiles do not include how
    uncertain this correction is, so residuals are also multiplied by Student's quantile over the normal quantile
    (compare Hesterberg 2015, The American Statistician 69:4). In 2,000 synthetic curves with 5 points, the interval
    contained the optimum in 95 per cent, and without Student's quantile in 80. Residuals contain the noise of seeds at
    one size and every deviation from a parabola.

    An isoFLOP curve is no parabola. With u = ln size - ln optimum, L = E + A / N^alpha + B / D^beta is minimum +
    curvature * (u^2 + (beta - alpha) u^3 / 3 + ...). Over sizes of e^-w to e^w times the optimum, the cubic term moves
    the parabola's minimum by about (alpha - beta) w^2 / 10, which is 0.3 to 3 per cent for published exponents; over 1
    to 30 times the optimum, by 7 to 30 per cent. Each interval is therefore widened by
    twice the difference between the parabola and a curve of that form, towards the minimum of that curve. Without
    noise, the intervals then hold the optimum in 97 to 100 per cent of random curves, instead of 10 to 96, and with
    noise in 93 to 98, instead of 29 to 88. Of noisy true parabolas, intervals of 95 per cent hold 94 to 97 per cent,
    and those of 80 per cent hold 84 to 90. The note says if the optimum is in the outer quarters of the sizes.

    Args:
        sizes: [n] numbers of parameters, or another measure of size.
        losses: [n] losses of any sign and unit.
        confidence: the probability that an interval contains the truth.
        resamples: the number of fits to resampled residuals; 0 for no intervals.
        seed: the seed of the resamples.

    Raises:
        NoFit: if there are fewer than 3 distinct sizes with finite losses, a size is not positive, or the curve has no
            minimum.
        ValueError: if the lengths differ, or an option is out of range.
    """
    check_confidence(confidence)
    sizes, losses = columns_of(sizes=sizes, losses=losses)
    check_positive(sizes=sizes)
    sizes, losses, notes = finite(losses, sizes)
    points, distinct = len(sizes), len(np.unique(sizes))
    if distinct < 3:
        raise NoFit("; ".join([f"{count(distinct, 'size')}, and a parabola needs 3", *notes]))

    # In u = (ln size - middle) / scale, which runs from -1 to 1, the three columns are far from parallel.
    z = np.log(sizes)
    middle, scale = float(z.min() + z.max()) / 2, float(np.ptp(z)) / 2
    design = np.vander((z - middle) / scale, 3)
    fitted, _, rank, _ = np.linalg.lstsq(design, losses)
    if rank < 3:
        raise NoFit("two of the sizes are too near each other for a parabola")
    a, b, c = map(float, fitted)
    # Rounding alone bends a straight line by about 1e-16 of its height.
    flat = 1e-12 * float(np.abs(losses).max())
    if a < -flat:
        raise NoFit("the losses curve downwards, so there is no minimum")
    # The second limit stands for a minimum that no float can hold.
    if a <= max(flat, scale * abs(b) / (2 * LARGEST_LOG)):
        raise NoFit("the losses have next to no curvature, so there is no minimum")

    size_interval = loss_interval = None
    if points == 3:
        notes.append("3 points fit exactly, so there is no interval")
    elif resamples:
        tail = (1 - confidence) / 2
        student = stats.t.ppf(tail, points - 3) / stats.norm.ppf(tail)
        residuals = (losses - design @ fitted) * math.sqrt(points / (points - 3)) * student
        drawn = np.random.default_rng(seed).integers(points, size=(points, resamples))
        # Least squares is linear in the losses, so all fits are one product. einsum starts no BLAS threads.
        a_s, b_s, c_s = fitted[:, None] + np.einsum("kp,pr->kr", np.linalg.pinv(design), residuals[drawn])
        convex = a_s > np.maximum(flat, scale * np.abs(b_s) / (2 * LARGEST_LOG))
        a_s, b_s, c_s = a_s[convex], b_s[convex], c_s[convex]
        # At a curvature of zero the optimum is at infinity. If more than a tail of the fits is there, no bound exists.
        if np.mean(~convex) > tail:
            notes.append("the curvature is within its noise, so the intervals have no bounds")
        else:
            size_interval = percentiles(np.exp(middle - scale * b_s / (2 * a_s)), confidence)
            loss_interval = percentiles(c_s - b_s**2 / (4 * a_s), confidence)

    position, loss = -b / (2 * a), c - b**2 / (4 * a)  # the position is -1 at the smallest size, 1 at the largest
    if abs(position) > OFF_CENTRE and resamples and points > 3:
        end = "smallest" if position < 0 else "largest"
        notes.append(f"the grid is off-centre, since the minimum is near the {end} size: add sizes beyond it")
    if size_interval is not None and loss_interval is not None:
        if (other := _asymmetric_minimum(z, losses)) is None:
            reason = "3 sizes" if distinct == 3 else "losses that no sum of two power laws fits"
            notes.append(f"{reason} can't tell how far off a parabola is, so there is no interval")
            size_interval = loss_interval = None
        else:
            far = 2 * (other[0] - middle - scale * position)
            size_interval = _widened(size_interval, math.exp(min(max(far, -LARGEST_LOG), LARGEST_LOG)), operator.mul)
            loss_interval = _widened(loss_interval, 2 * (other[1] - loss), operator.add)

    size = math.exp(middle + scale * position)
    a_z, b_z = a / scale**2, b / scale
    return Parabola(
        coefficients=(a_z, b_z - 2 * a_z * middle, c - b_z * middle + a_z * middle**2),
        size=size,
        loss=loss,
        size_interval=size_interval,
        loss_interval=loss_interval,
        is_extrapolation=not bool(sizes.min() <= size <= sizes.max()),
        sizes=distinct,
        points=points,
        note="; ".join(notes),
    )


def _asymmetric_minimum(z: np.ndarray, losses: np.ndarray) -> tuple[float, float] | None:
    """The ln size of the minimum of E + A e^(-alpha z) + B e^(beta z), and the minimum; z are logarithms of sizes.

    alpha + beta is ``SUM_OF_EXPONENTS``, so that the fit has one parameter more than a parabola; for each alpha it is
    linear. None with 3 sizes, or if no fit has positive A and B.
    """
    if len(np.unique(z)) < 4:
        return None
    alpha = SUM_OF_EXPONENTS * np.linspace(0, 1, 43)[1:-1, None]
    beta, u = SUM_OF_EXPONENTS - alpha, z - z.mean()
    terms = np.stack([np.ones_like(alpha * u), np.exp(-alpha * u), np.exp(beta * u)], axis=-1)
    linear = np.einsum("fpn,n->fp", np.linalg.pinv(terms), losses)
    squares = np.sum((np.einsum("fnp,fp->fn", terms, linear) - losses) ** 2, axis=-1)
    best = int(np.argmin(np.where(np.all(linear[:, 1:] > 0, axis=-1), squares, np.inf)))
    (e, a, b), alpha, beta = map(float, linear[best]), float(alpha[best, 0]), float(beta[best, 0])
    if a <= 0 or b <= 0:
        return None
    lowest = math.log(alpha * a / (beta * b)) / SUM_OF_EXPONENTS
    return float(z.mean()) + lowest, e + a * math.exp(-alpha * lowest) + b * math.exp(beta * lowest)


def _widened(interval: Interval, by: float, move: Callable[[float, float], float]) -> Interval:
    """The interval, and both its ends moved by ``by``, in one."""
    ends = [*interval, *(move(end, by) for end in interval)]
    return min(ends), max(ends)
