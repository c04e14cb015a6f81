"""Parabolas in ln size through the losses of one compute budget, and the intervals of their minimum.

Letters: L loss, n the number of rows. Logarithms are natural.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

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
from peer_jax.analysis.resampling import Layout, Noise, noise

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
        budgets: the number of budgets that the curvature was fitted to.
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
    budgets: int = 1

    @property
    def curvature(self) -> float:
        """The factor of (ln size)^2."""
        return self.coefficients[0]

    def __call__(self, size: Values) -> float | Float[np.ndarray, "..."]:
        """The loss at one size or at many."""
        # The coefficients are not used: for ln size = 20 their terms are hundreds of times as large as their sum.
        return self.coefficients[0] * (np.log(np.asarray(size, np.float64)) - math.log(self.size)) ** 2 + self.loss


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of a parabola: logarithms of sizes, losses, seeds, and notes on what was left out."""

    z: Float[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]
    seeds: tuple[object, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, sizes: Column, losses: Column, seeds: Sequence[object] | None = None) -> "Points":
        """The points with a finite loss.

        Raises:
            NoFit: if a size is not positive.
            ValueError: if the lengths differ.
        """
        sizes, losses = columns_of(sizes=sizes, losses=losses)
        check_positive(sizes=sizes)
        seeds = ("",) * len(sizes) if seeds is None else tuple(seeds)
        kept = tuple(seed for seed, loss in zip(seeds, losses, strict=True) if math.isfinite(loss))
        sizes, losses, notes = finite(losses, sizes)
        return cls(np.log(sizes), losses, kept, tuple(notes))

    @property
    def sizes(self) -> int:
        """The number of distinct sizes."""
        return len(np.unique(self.z))

    def check(self) -> None:
        """Raises NoFit if there are fewer than 3 distinct sizes."""
        if self.sizes < 3:
            raise NoFit("; ".join([f"{count(self.sizes, 'size')}, and a parabola needs 3", *self.notes]))


@dataclasses.dataclass(frozen=True)
class Solved:
    """Least squares of the parabolas of several budgets, which have one curvature.

    Attributes:
        middle, scale: u = (ln size - middle) / scale runs from -1 to 1, where the columns are far from parallel.
        design: [n, p] the columns u^2, and u and 1 of each budget.
        fitted: [p] their factors.
        residuals: [n].
        layout: the seeds and budgets of the points.
    """

    middle: float
    scale: float
    design: np.ndarray
    fitted: np.ndarray
    residuals: np.ndarray
    layout: Layout

    @property
    def free(self) -> int:
        """The degrees of freedom that the fit and the seeds leave."""
        return len(self.residuals) - len(self.fitted) - self.layout.spare

    def own(self, budget: int) -> list[int]:
        """The columns of a budget."""
        return [0, 1 + 2 * budget, 2 + 2 * budget]

    def gradients(self, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """The gradients [p] of the position of a budget's minimum in u, and of its loss."""
        a, b, _ = self.fitted[self.own(budget)]
        position = -b / (2 * a)
        of_position, of_loss = np.zeros((2, len(self.fitted)))
        of_position[self.own(budget)] = b / (2 * a**2), -1 / (2 * a), 0
        of_loss[self.own(budget)] = position**2, position, 1
        return of_position, of_loss

    def minima(self, budget: int, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in u and losses of the minima with these errors [p, r] of the factors, and which curve upwards."""
        a, b, c = self.fitted[self.own(budget), None] + errors[self.own(budget)]
        convex = a > self.least(b)
        a = np.where(convex, a, 1.0)
        return -b / (2 * a), c - b**2 / (4 * a), convex

    def least(self, b: np.ndarray | float) -> np.ndarray | float:
        """The curvature at and below which there is no minimum, by the factor of u."""
        # Rounding alone bends a straight line by about 1e-16 of its height. The second limit stands for a minimum that
        # no float can hold.
        flat = 1e-12 * float(np.abs(self.design @ self.fitted + self.residuals).max())
        return np.maximum(flat, self.scale * np.abs(b) / (2 * LARGEST_LOG))


def solve(curves: Sequence[Points]) -> Solved:
    """Fits the parabolas of several budgets, with one curvature.

    Raises:
        NoFit: if the sizes are too near each other, or one of the parabolas has no minimum.
    """
    z, losses = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("z", "losses"))
    budgets = np.repeat(np.arange(len(curves)), [len(curve.z) for curve in curves])
    middle, scale = float(z.min() + z.max()) / 2, float(np.ptp(z)) / 2
    u = (z - middle) / scale
    is_own = budgets[:, None] == np.arange(len(curves))
    pairs = np.stack([u[:, None] * is_own, is_own], axis=-1).reshape(len(u), -1)
    design = np.concatenate([u[:, None] ** 2, pairs], axis=1)
    fitted, _, rank, _ = np.linalg.lstsq(design, losses)
    if rank < design.shape[1]:
        raise NoFit("two of the sizes are too near each other for a parabola")
    layout = Layout.of([seed for curve in curves for seed in curve.seeds], budgets.tolist())
    solved = Solved(middle, scale, design, fitted, losses - design @ fitted, layout)
    if fitted[0] < -solved.least(0.0):
        raise NoFit("the losses curve downwards, so there is no minimum")
    if np.any(fitted[0] <= solved.least(fitted[1::2])):
        raise NoFit("the losses have next to no curvature, so there is no minimum")
    return solved


def fit_parabola(
    sizes: Column,
    losses: Column,
    *,
    seeds: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Parabola:
    """Fits loss in ln size by least squares. Rows without a finite loss are left out: diverged runs bend no parabola.

    The intervals are percentiles over fits to resampled residuals, because resampled rows would often leave fewer than
    3 sizes. The fit makes residuals too small by sqrt((n - 3) / n), which is undone. Percentiles do not include how
    uncertain this correction is, so residuals are also multiplied by Student's quantile over the normal quantile
    (compare Hesterberg 2015, The American Statistician 69:4). In 2,000 synthetic curves with 5 points, the interval
    contained the optimum in 95 per cent, and without Student's quantile in 80. Residuals contain the noise of seeds at
    one size and every deviation from a parabola. With ``seeds``, what the sizes of a seed share is drawn again over
    seeds, and the rest over points, as ``resampling`` says.

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
        seeds: [n] the seeds; None if no two points share one.
        confidence: the probability that an interval contains the truth.
        resamples: the number of fits to resampled residuals; 0 for no intervals.
        seed: the seed of the resamples.

    Raises:
        NoFit: if there are fewer than 3 distinct sizes with finite losses, a size is not positive, or the curve has no
            minimum.
        ValueError: if the lengths differ, or an option is out of range.
    """
    check_confidence(confidence)
    points = Points.of(sizes, losses, seeds)
    points.check()
    (fitted,) = fit_parabolas([points], confidence=confidence, resamples=resamples, seed=seed)
    return fitted


def fit_parabolas(
    curves: Sequence[Points], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[Parabola]:
    """Fits the parabolas of several budgets, with one curvature, as ``fit_parabola`` fits one.

    Raises:
        NoFit: if one of the parabolas has no minimum.
    """
    solved = solve(curves)
    errors = None
    if resamples and solved.free > 0:
        draws = solved.layout.draw(resamples, seed)
        errors = noise(solved.design, solved.residuals, solved.layout, draws)
    shift = asymmetry(curves, solved)
    return [
        _parabola(number, curve, solved, errors, shift, confidence, len(curves)) for number, curve in enumerate(curves)
    ]


def _parabola(
    number: int,
    points: Points,
    solved: Solved,
    errors: Noise | None,
    shift: tuple[float, float] | None,
    confidence: float,
    budgets: int,
) -> Parabola:
    a, b, c = map(float, solved.fitted[solved.own(number)])
    position, loss, z, notes = -b / (2 * a), c - b**2 / (4 * a), points.z, list(points.notes)
    optimum = solved.middle + solved.scale * position
    size_interval = loss_interval = None
    if solved.free <= 0:
        notes.append(f"{count(len(solved.residuals), 'point')} fit exactly, so there is no interval")
    elif errors is not None:
        of_position, of_loss = (errors.scaled(g, confidence) for g in solved.gradients(number))
        positions, _, convex = solved.minima(number, of_position)
        _, losses, is_loss = solved.minima(number, of_loss)
        # At a curvature of zero the optimum is at infinity. If more than a tail of the fits is there, no bound exists.
        if np.mean(~convex) > (1 - confidence) / 2:
            notes.append("the curvature is within its noise, so the intervals have no bounds")
        else:
            size_interval = percentiles(np.exp(solved.middle + solved.scale * positions[convex]), confidence)
            loss_interval = percentiles(losses[is_loss], confidence)
        low, high = float(z.min()), float(z.max())
        if abs(optimum - (low + high) / 2) > OFF_CENTRE * (high - low) / 2:
            end = "smallest" if optimum < (low + high) / 2 else "largest"
            notes.append(f"the grid is off-centre, since the minimum is near the {end} size: add sizes beyond it")
    if size_interval is not None and loss_interval is not None:
        if shift is None:
            reason = "3 sizes" if points.sizes == 3 else "losses that no sum of two power laws fits"
            notes.append(f"{reason} can't tell how far off a parabola is, so there is no interval")
            size_interval = loss_interval = None
        else:
            far = min(max(2 * shift[0], -LARGEST_LOG), LARGEST_LOG)
            size_interval = _widened(size_interval, math.exp(far), operator.mul)
            loss_interval = _widened(loss_interval, 2 * shift[1], operator.add)
    size = math.exp(optimum)
    a_z, b_z = a / solved.scale**2, b / solved.scale
    return Parabola(
        coefficients=(a_z, b_z - 2 * a_z * solved.middle, c - b_z * solved.middle + a_z * solved.middle**2),
        size=size,
        loss=loss,
        size_interval=size_interval,
        loss_interval=loss_interval,
        is_extrapolation=not bool(z.min() <= optimum <= z.max()),
        sizes=points.sizes,
        points=len(z),
        note="; ".join(notes),
        budgets=budgets,
    )


def asymmetry(curves: Sequence[Points], solved: Solved) -> tuple[float, float] | None:
    """How far the minimum of a sum of two power laws is from that of a parabola, in ln size and in loss.

    Both are fitted to all points, relative to the minima of the parabolas of their budgets. None if nothing is known.
    """
    z, losses = [], []
    for number, curve in enumerate(curves):
        (position,), (loss,), _ = solved.minima(number, np.zeros((len(solved.fitted), 1)))
        z.append(curve.z - solved.middle - solved.scale * position)
        losses.append(curve.losses - loss)
    return _asymmetric_minimum(np.concatenate(z), np.concatenate(losses))


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
