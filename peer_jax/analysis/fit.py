"""Fits of scaling results: parabolas in ln size, power laws, loss surfaces, and the compute that a method saves.

Letters: N parameters, D tokens, C training FLOPs, L loss, n the number of rows. Logarithms are natural.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Real
from scipy import optimize, stats

Column = Sequence[float] | Real[np.ndarray, " n"]
Values = float | Sequence[float] | Real[np.ndarray, "..."]
Interval = tuple[float, float]

# exp overflows float64 at 709. A fit whose optimum is beyond this limit counts as having none, and must not overflow.
LARGEST_LOG = 600.0

# The share of the way from the middle of the sizes to an end, in ln size, beyond which an optimum is off-centre.
OFF_CENTRE = 0.5

# alpha + beta of L = E + A / N^alpha + B / D^beta, as published fits have it: 0.62 (Hoffmann et al. 2022) and 0.71
# (Besiroglu et al. 2024).
SUM_OF_EXPONENTS = 0.6


class NoFit(ValueError):  # noqa: N818, it is no error but says that a fit is missing
    """There is no such fit. The message is one short sentence with the reason."""


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
    noise in 93 to 98, instead of 29 to 88. Of noisy true parabolas, intervals of 95 per cent hold 95 to 97 per cent,
    and those of 80 per cent hold 86 to 90. The note says if the optimum is in the outer quarters of the sizes.

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
    _check_confidence(confidence)
    sizes, losses = _columns(sizes=sizes, losses=losses)
    _check_positive(sizes=sizes)
    sizes, losses, notes = _finite(losses, sizes)
    points, distinct = len(sizes), len(np.unique(sizes))
    if distinct < 3:
        raise NoFit("; ".join([f"{_count(distinct, 'size')}, and a parabola needs 3", *notes]))

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
            size_interval = _percentiles(np.exp(middle - scale * b_s / (2 * a_s)), confidence)
            loss_interval = _percentiles(c_s - b_s**2 / (4 * a_s), confidence)

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


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent, fitted to ``points`` rows. The interval is None where two points fit exactly."""

    coefficient: float
    exponent: float
    exponent_interval: Interval | None
    points: int

    def __call__(self, x: Values) -> float | Float[np.ndarray, "..."]:
        """y at one x or at many."""
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent


def fit_power_law(x: Column, y: Column, *, confidence: float = 0.95) -> PowerLaw:
    """Fits ln y in ln x by least squares. The interval of the exponent is Student's, with n - 2 degrees of freedom.

    Raises:
        NoFit: if there are fewer than 2 distinct x, or any number is not positive and finite.
        ValueError: if the lengths differ, or an option is out of range.
    """
    x, y = _columns(x=x, y=y)
    _check_positive(x=x, y=y)
    # Logarithms are counted, because neighbouring numbers can have the same logarithm.
    log_x = np.log(x)
    if (distinct := len(np.unique(log_x))) < 2:
        raise NoFit(f"{_count(distinct, 'distinct value')} of x, and a power law needs 2")
    line = stats.linregress(log_x, np.log(y))
    if abs(line.intercept) > LARGEST_LOG:
        raise NoFit("the power law's coefficient is beyond floating point")
    exponent, interval = float(line.slope), None
    if len(x) > 2:
        _check_confidence(confidence)
        reach = float(stats.t.ppf((1 + confidence) / 2, len(x) - 2) * line.stderr)
        interval = exponent - reach, exponent + reach
    return PowerLaw(math.exp(line.intercept), exponent, interval, len(x))


@dataclasses.dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, approach 3).

    Attributes:
        intervals: bootstrap intervals of "E", "alpha" and "beta"; None if there were no resamples.
        points: the number of rows that were fitted.
        objective: the sum of Huber losses at the optimum.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    intervals: dict[str, Interval] | None
    points: int
    objective: float

    def __call__(self, params: Values, tokens: Values) -> float | Float[np.ndarray, "..."]:
        """The loss of one model or of many."""
        params, tokens = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b; a + b = 1."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    def optimal(self, compute: float, flops_per_param_token: float = 6.0) -> tuple[float, float]:
        """(N, D) of the least loss where flops_per_param_token * N * D = compute (equation 4)."""
        a, b = self.exponents
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (compute / flops_per_param_token) ** a, (compute / flops_per_param_token) ** b / g


def fit_loss_surface(
    params: Column,
    tokens: Column,
    losses: Column,
    *,
    delta: float = 1e-3,
    resamples: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> LossSurface:
    """Minimises the sum of Huber losses of the residuals of ln L. Rows without a finite loss are left out.

    BFGS starts from the best points of a grid. Hoffmann et al. averaged Huber losses, which made them so small that the
    optimiser stopped too early (Besiroglu et al. 2024, arXiv:2404.10102). Here they are summed and scaled up. A fit
    takes about 30 ms, a resample 12 ms. Intervals are percentiles over resampled rows.

    Args:
        params, tokens, losses: [n] each.
        delta: the residual of ln L beyond which the pull of a row no longer grows. A delta far above all residuals
            makes this least squares.
        resamples: the number of fits to resampled rows; 0 for no intervals.
        confidence: the probability that an interval contains the truth.
        seed: the seed of the resamples.

    Raises:
        NoFit: if there are fewer than 8 rows with finite losses, fewer than 3 distinct N or D, a number is not
            positive, or the losses don't fall with N or D.
        ValueError: if the lengths differ, or an option is out of range.
    """
    _check_confidence(confidence)
    params, tokens, losses = _columns(params=params, tokens=tokens, losses=losses)
    params, tokens, losses, notes = _finite(losses, params, tokens)
    _check_positive(params=params, tokens=tokens, losses=losses)
    if len(losses) < 8:
        raise NoFit("; ".join([f"{_count(len(losses), 'row')}, too few for 5 parameters: it takes 8", *notes]))
    for name, column in {"params": params, "tokens": tokens}.items():
        if (distinct := len(np.unique(column))) < 3:
            raise NoFit(f"{_count(distinct, 'distinct value')} of {name}, and a loss surface needs 3")

    # N and D are relative to their geometric means, which makes A nearly independent of alpha, and B of beta.
    mean_n, mean_d = float(np.log(params).mean()), float(np.log(tokens).mean())
    rows = (np.log(params) - mean_n, np.log(tokens) - mean_d, np.log(losses))
    # The optimiser stops at a small gradient, so residuals of this size must count as 1.
    unit = np.full(len(losses), 1 / min(delta, 1e-3) ** 2)
    starts = _starts(*rows, unit, delta)
    best = min((_minimise(start, *rows, unit, delta) for start in starts), key=lambda found: found.fun)
    log_a, log_b, log_e, alpha, beta = map(float, best.x)
    log_a_raw, log_b_raw = log_a + alpha * mean_n, log_b + beta * mean_d
    for name, log_term, raw, exponent, column in (
        ("params", log_a, log_a_raw, alpha, rows[0]),
        ("tokens", log_b, log_b_raw, beta, rows[1]),
    ):
        fall = math.exp(log_term - exponent * column.min()) - math.exp(log_term - exponent * column.max())
        if fall < 1e-6 * losses.mean() or raw > LARGEST_LOG:
            raise NoFit(f"the losses don't fall with {name} as a power law does")

    draws, rng = [], np.random.default_rng(seed)
    while len(draws) < resamples:
        counts = np.bincount(rng.integers(len(losses), size=len(losses)), minlength=len(losses))
        kept = counts > 0
        # A draw with fewer than 5 rows, or fewer than 3 distinct N or D, can't be fitted and is drawn again.
        if kept.sum() < 5 or len(np.unique(params[kept])) < 3 or len(np.unique(tokens[kept])) < 3:
            continue
        found = (_minimise(start, *rows, counts * unit, delta) for start in (best.x, starts[0]))
        draws.append(min(found, key=lambda found: found.fun).x)
    intervals = None
    if draws:
        _, _, log_es, alphas, betas = np.stack(draws, axis=1)
        drawn = {"E": np.exp(log_es), "alpha": alphas, "beta": betas}
        intervals = {name: _percentiles(values, confidence) for name, values in drawn.items()}
    return LossSurface(
        E=math.exp(log_e),
        A=math.exp(log_a_raw),
        B=math.exp(log_b_raw),
        alpha=alpha,
        beta=beta,
        intervals=intervals,
        points=len(losses),
        objective=float(best.fun / unit[0]),
    )


def huber_objective(theta, log_n, log_d, log_loss, weights, delta):
    """Weighted sum of Huber losses of logsumexp(a - alpha ln N, b - beta ln D, e) - ln L, and its gradient, [5].

    ``theta`` is (a, b, e, alpha, beta), with a = ln A, b = ln B, e = ln E (Hoffmann et al. 2022, equation 3). The rows
    and ``weights`` are [n]. The arguments have no annotations, because tests would check them at each of thousands of
    calls.
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    largest = terms.max(axis=0)
    predicted = largest + np.log(np.exp(terms - largest).sum(axis=0))
    residuals = predicted - log_loss
    slope = np.clip(residuals, -delta, delta)
    # slope * (residual - slope / 2) is r^2 / 2 within delta and delta (|r| - delta / 2) beyond it.
    value = float(weights @ (slope * (residuals - slope / 2)))
    pull_a, pull_b, pull_e = weights * slope * np.exp(terms - predicted)
    return value, np.array([pull_a.sum(), pull_b.sum(), pull_e.sum(), -pull_a @ log_n, -pull_b @ log_d])


def _starts(log_n, log_d, log_loss, weights, delta) -> list[np.ndarray]:
    """The best 4 of a grid of exponents. For given exponents, L is linear in A, B and E, which are solved for."""
    loss = np.exp(log_loss)
    grid = []
    for alpha, beta in itertools.product(np.geomspace(0.05, 1.6, 6), repeat=2):
        terms = np.stack([np.exp(-alpha * log_n), np.exp(-beta * log_d), np.ones_like(loss)], axis=1)
        linear, _ = optimize.nnls(terms / loss[:, None], np.ones_like(loss))
        # A term of exactly zero has no logarithm, and a tiny term has no gradient to grow by.
        grid.append(np.array([*np.log(np.maximum(linear, 0.01 * loss.mean())), alpha, beta]))
    return sorted(grid, key=lambda theta: huber_objective(theta, log_n, log_d, log_loss, weights, delta)[0])[:4]


def _minimise(start, log_n, log_d, log_loss, weights, delta) -> optimize.OptimizeResult:
    # L-BFGS-B would call LAPACK, which starts BLAS threads for matrices of a few numbers: on a busy machine a fit then
    # takes seconds.
    rows = (log_n, log_d, log_loss, weights, delta)
    return optimize.minimize(huber_objective, start, args=rows, jac=True, method="BFGS", options={"gtol": 1e-5})


@dataclasses.dataclass(frozen=True)
class Saving:
    """The compute that the baseline needs for a method's loss, in units of the method's compute.

    A ``factor`` above 1 means that the method saves compute. ``is_extrapolation`` is True if the method's loss lies
    outside the losses of the baseline's budgets.
    """

    factor: float
    is_extrapolation: bool


def compute_saved(compute: float, loss: float, baseline_compute: Column, baseline_losses: Column) -> Saving:
    """The baseline's compute at ``loss``, divided by ``compute``.

    The baseline follows power laws from budget to budget: ln C is linear in ln L between neighbouring budgets. Outside
    its budgets, the line through the two nearest budgets goes on.

    Args:
        compute, loss: the compute and loss of a method at its compute-optimal size.
        baseline_compute, baseline_losses: [n] compute and losses of the baseline at its compute-optimal sizes.

    Raises:
        NoFit: if the baseline has fewer than 2 budgets, its losses don't fall with every step of compute, or a number
            is not positive and finite.
        ValueError: if the lengths differ, or an option is out of range.
    """
    baseline_compute, baseline_losses = _columns(baseline_compute=baseline_compute, baseline_losses=baseline_losses)
    _check_positive(
        compute=np.array([compute], np.float64),
        loss=np.array([loss], np.float64),
        baseline_compute=baseline_compute,
        baseline_losses=baseline_losses,
    )
    if (distinct := len(np.unique(baseline_compute))) < 2:
        raise NoFit(f"{_count(distinct, 'budget')} of the baseline, and a comparison needs 2")
    # In this order, compute falls and loss rises.
    order = np.argsort(-baseline_compute)
    log_c, log_l = np.log(baseline_compute[order]), np.log(baseline_losses[order])
    if np.any(np.diff(log_l) <= 0) or np.any(np.diff(log_c) >= 0):
        raise NoFit("the baseline's losses don't fall with compute")
    target = math.log(loss)
    left = int(np.clip(np.searchsorted(log_l, target) - 1, 0, len(log_l) - 2))
    slope = (log_c[left + 1] - log_c[left]) / (log_l[left + 1] - log_l[left])
    log_factor = float(log_c[left] + slope * (target - log_l[left])) - math.log(compute)
    if abs(log_factor) > LARGEST_LOG:
        raise NoFit("the baseline hardly falls with compute, so its compute at that loss is out of reach")
    return Saving(math.exp(log_factor), not bool(log_l[0] <= target <= log_l[-1]))


def _percentiles(draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _columns(**columns: Column) -> list[np.ndarray]:
    """The columns as float64 vectors of one length."""
    vectors = [np.asarray(column, np.float64) for column in columns.values()]
    if any(vector.ndim != 1 for vector in vectors) or len({len(vector) for vector in vectors}) > 1:
        shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in zip(columns, vectors, strict=True))
        raise ValueError(f"the columns must be vectors of one length, but are {shapes}")
    return vectors


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")


def _check_positive(**vectors: np.ndarray) -> None:
    for name, vector in vectors.items():
        bad = vector[~(np.isfinite(vector) & (vector > 0))]
        if bad.size:
            raise NoFit(f"{name} must be positive and finite, but hold {bad[0]:g}")


def _finite(losses: np.ndarray, *others: np.ndarray) -> tuple:
    """The rows with a finite loss: the other columns, the losses, and a list of notes on what was left out."""
    finite = np.isfinite(losses)
    left_out = int(np.sum(~finite))
    notes = [f"{_count(left_out, 'row')} without a finite loss left out"] if left_out else []
    return *(other[finite] for other in others), losses[finite], notes


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
