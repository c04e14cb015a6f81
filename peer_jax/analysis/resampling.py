"""What the residuals of least squares say of the noise of its coefficients: a bootstrap over seeds and points jointly.

A point is one run: a size with a seed. A block is the points of one seed at one budget. A residual is the mean of its
block, which all sizes of a seed may share, and the rest. The means are drawn again over the blocks of a budget, and the
rests over its points.

Letters: n points, p coefficients, r resamples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Draws:
    """The numbers of the points and blocks that each resample takes instead of each point and of each block's mean."""

    points: Int[np.ndarray, "n r"]
    blocks: Int[np.ndarray, "blocks r"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which points share a block, and which blocks a budget.

    Attributes:
        blocks: the block of each point.
        budgets: the budget of each point.
    """

    blocks: Int[np.ndarray, " n"]
    budgets: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, seeds: Sequence[object], budgets: Sequence[object]) -> "Layout":
        """The layout of points with these seeds and budgets."""
        found: dict[object, int] = {}
        blocks = np.array([found.setdefault(pair, len(found)) for pair in zip(budgets, seeds, strict=True)], int)
        return cls(blocks, np.unique(np.array(budgets), return_inverse=True)[1])

    @property
    def spare(self) -> int:
        """The degrees of freedom between the blocks of a budget: their number, less one per budget."""
        return len(np.unique(self.blocks)) - len(np.unique(self.budgets))

    def draw(self, resamples: int, seed: int) -> Draws:
        """Draws points and blocks, each from its own budget."""
        rng = np.random.default_rng(seed)
        points = self._draw(self.budgets, resamples, rng)
        owner = np.zeros(self.blocks.max() + 1, int)
        owner[self.blocks] = self.budgets
        return Draws(points, self._draw(owner, resamples, rng))

    @staticmethod
    def _draw(groups: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
        drawn = np.zeros((len(groups), resamples), int)
        for group in np.unique(groups):
            own = np.flatnonzero(groups == group)
            drawn[own] = own[rng.integers(len(own), size=(len(own), resamples))]
        return drawn

    def means(self, values: Float[np.ndarray, "n *r"]) -> Float[np.ndarray, "blocks *r"]:
        """The mean of each block."""
        sums = np.zeros((self.blocks.max() + 1, *values.shape[1:]))
        np.add.at(sums, self.blocks, values)
        counts = np.bincount(self.blocks).reshape(-1, *[1] * (values.ndim - 1))
        return sums / counts


@dataclasses.dataclass(frozen=True)
class Noise:
    """Resampled errors of the coefficients of one fit, as the sum of two parts.

    Attributes:
        points: from the points, each at its own size.
        seeds: from what the sizes of a seed share; zeros where a budget has one seed.
        free: the degrees of freedom of the residuals within blocks.
        spare: the degrees of freedom between blocks.
    """

    points: Float[np.ndarray, "p r"]
    seeds: Float[np.ndarray, "p r"]
    free: int
    spare: int

    def scaled(self, gradient: Float[np.ndarray, " p"], confidence: float) -> Float[np.ndarray, "p r"]:
        """The sum, scaled so that percentiles of what has this gradient allow for how uncertain the noise is."""
        parts = np.var(gradient @ self.points), np.var(gradient @ self.seeds)
        of_points, of_seeds = scales(*parts, (self.free, self.spare), confidence)
        return of_points * self.points + of_seeds * self.seeds


def noise(design: np.ndarray, residuals: np.ndarray, layout: Layout, draws: Draws) -> Noise:
    """The errors of the coefficients when the residuals are drawn again.

    Least squares makes residuals too small. Both parts are scaled so that their variances are right on average. The
    blocks' means of what is drawn for the points are taken off, because the other part has them.

    Args:
        design: [n, p].
        residuals: [n].
    """
    n, p, spare = *design.shape, layout.spare
    free = n - p - spare
    inverse = np.linalg.pinv(design)
    if not spare:
        rest = np.sqrt(n / free) * residuals[draws.points]
        # Least squares is linear in the losses, so all fits are one product. einsum starts no BLAS threads.
        fits = np.einsum("pn,nr->pr", inverse, rest)
        return Noise(fits, np.zeros_like(fits), free, spare)
    means = layout.means(residuals)
    rest = np.sqrt(n / free) * (residuals - means[layout.blocks])[draws.points]
    rest -= layout.means(rest)[layout.blocks]
    blocks = spare + len(np.unique(layout.budgets))
    shared = np.sqrt(blocks / spare) * means[draws.blocks][layout.blocks]
    return Noise(*(np.einsum("pn,nr->pr", inverse, part) for part in (rest, shared)), free, spare)


def scales(points: float, seeds: float, degrees: tuple[int, int], confidence: float) -> tuple[float, float]:
    """Factors of both parts, by which the spread of their sum is that of Student's quantile for the sum.

    The points get the factor of their own degrees of freedom, and the seeds the rest. What the sizes of a seed share
    hardly bends a curve. So a curve whose seeds differ much, and are few, does not seem to have no minimum.

    Args:
        points, seeds: the variances of both parts in what the interval is of.
        degrees: the degrees of freedom of both.
    """
    of_points = student((points,), degrees[:1], confidence)
    if not seeds > 0:
        return of_points, 0.0
    whole = student((points, seeds), degrees, confidence) ** 2 * (points + seeds)
    return of_points, float(np.sqrt(max(whole - of_points**2 * points, 0.0) / seeds))


def student(variances: Sequence[float], degrees: Sequence[int], confidence: float) -> float:
    """Student's quantile over the normal quantile, for a sum of parts whose variances were estimated.

    The degrees of freedom of the sum are Satterthwaite's (1946, Biometrics Bulletin 2:110).
    """
    known = [(float(v), d) for v, d in zip(variances, degrees, strict=True) if d and v > 0]
    if not known:
        return 1.0
    total = sum(v for v, _ in known)
    degree = total**2 / sum(v**2 / d for v, d in known)
    tail = (1 - confidence) / 2
    return float(stats.t.ppf(tail, degree) / stats.norm.ppf(tail))
