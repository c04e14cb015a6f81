"""The curvature of parabolas in ln size: whether it is above its noise, and whether budgets can share one."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from peer_jax.analysis.columns import Interval, NoFit
from peer_jax.analysis.parabola import Parabola, Points, fit_parabolas
from peer_jax.analysis.resampling import Layout

F_TEST_LEVEL = 0.05
"""Budgets share no curvature if the F test would reject that they do at this level."""


def curvature(points: Points, *, confidence: float = 0.95) -> tuple[float, Interval | None]:
    """The factor of (ln size)^2 by least squares, with Student's interval; each seed has a level of its own.

    The interval is None where the points fit exactly.

    Raises:
        NoFit: if there are fewer than 3 sizes.
    """
    points.check()
    z = points.z - points.z.mean()
    design = np.stack([z**2, z, *_seed_columns([points])], axis=1)
    fitted, squares, free = _least_squares(design, points.losses)
    value, interval = float(fitted[0]), None
    if free > 0:
        inverse = np.linalg.pinv(design)
        reach = stats.t.ppf((1 + confidence) / 2, free) * np.sqrt(squares / free * np.sum(inverse[0] ** 2))
        interval = value - float(reach), value + float(reach)
    return value, interval


def shared_curvature_test(curves: Sequence[Points]) -> float:
    """The p value of the F test that parabolas of several budgets have one curvature; each seed has its own level.

    The test takes the noise of all budgets to be the same.

    Raises:
        NoFit: if the points of the budgets fit exactly, or there is one budget.
    """
    z, losses = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("z", "losses"))
    u = (z - z.mean()) / np.ptp(z)
    is_own = np.repeat(np.eye(len(curves)), [len(curve.z) for curve in curves], axis=0)
    free = np.concatenate([u[:, None] * is_own, np.stack(_seed_columns(curves), axis=1)], axis=1)
    together = np.concatenate([u[:, None] ** 2, free], axis=1)
    apart = np.concatenate([u[:, None] ** 2 * is_own, free], axis=1)
    (_, more, more_free), (_, less, less_free) = _least_squares(together, losses), _least_squares(apart, losses)
    if less_free <= 0 or more_free == less_free:
        raise NoFit("the points of the budgets fit exactly, so nothing says whether they share a curvature")
    rounding = (1e-12 * np.abs(losses).max()) ** 2 * len(losses)
    if more <= rounding:
        return 1.0
    ratio = (more - less) / (more_free - less_free) / (max(less, rounding) / less_free)
    return float(stats.f.sf(ratio, more_free - less_free, less_free))


def fit_shared(
    curves: Sequence[Points], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[list[Parabola], float]:
    """Fits parabolas of several budgets with one curvature, and returns them with the p value of the F test.

    Raises:
        NoFit: if the test rejects that they share a curvature at ``F_TEST_LEVEL``, a budget has fewer than 3 sizes, or
            a parabola has no minimum.
    """
    for curve in curves:
        curve.check()
    if (p := shared_curvature_test(curves)) < F_TEST_LEVEL:
        raise NoFit(f"the budgets have different curvatures (F test, p = {p:.2g})")
    return fit_parabolas(curves, confidence=confidence, resamples=resamples, seed=seed), p


def _seed_columns(curves: Sequence[Points]) -> list[np.ndarray]:
    """A column for each seed of each budget, 1 at its points."""
    budgets = [number for number, curve in enumerate(curves) for _ in curve.z]
    blocks = Layout.of([seed for curve in curves for seed in curve.seeds], budgets).blocks
    return [(blocks == block).astype(float) for block in range(blocks.max() + 1)]


def _least_squares(design: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, float, int]:
    """The factors, the sum of squared residuals, and their degrees of freedom."""
    fitted, _, rank, _ = np.linalg.lstsq(design, losses)
    return fitted, float(np.sum((losses - design @ fitted) ** 2)), len(losses) - int(rank)
