"""Fits of scaling results over budgets: power laws, loss surfaces, and the compute that a method saves.

Letters: N parameters, D tokens, C training FLOPs, L loss, n the number of rows. Logarithms are natural.
"""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

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
    check_confidence(confidence)
    x, y = columns_of(x=x, y=y)
    check_positive(x=x, y=y)
    # Logarithms are counted, because neighbouring numbers can have the same logarithm.
    log_x = np.log(x)
    if (distinct := len(np.unique(log_x))) < 2:
        raise NoFit(f"{count(distinct, 'distinct value')} of x, and a power law needs 2")
    line = stats.linregress(log_x, np.log(y))
    if abs(line.intercept) > LARGEST_LOG:
        raise NoFit("the power law's coefficient is beyond floating point")
    exponent, interval = float(line.slope), None
    if len(x) > 2:
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
    check_confidence(confidence)
    params, tokens, losses = columns_of(params=params, tokens=tokens, losses=losses)
    params, tokens, losses, notes = finite(losses, params, tokens)
    check_positive(params=params, tokens=tokens, losses=losses)
    if len(losses) < 8:
        raise NoFit("; ".join([f"{count(len(losses), 'row')}, too few for 5 parameters: it takes 8", *notes]))
    for name, column in {"params": params, "tokens": tokens}.items():
        if (distinct := len(np.unique(column))) < 3:
            raise NoFit(f"{count(distinct, 'distinct value')} of {name}, and a loss surface needs 3")

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
        intervals = {name: percentiles(values, confidence) for name, values in drawn.items()}
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
        ValueError: if the lengths differ.
    """
    baseline_compute, baseline_losses = columns_of(baseline_compute=baseline_compute, baseline_losses=baseline_losses)
    check_positive(
        compute=np.array([compute], np.float64),
        loss=np.array([loss], np.float64),
        baseline_compute=baseline_compute,
        baseline_losses=baseline_losses,
    )
    if (distinct := len(np.unique(baseline_compute))) < 2:
        raise NoFit(f"{count(distinct, 'budget')} of the baseline, and a comparison needs 2")
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
