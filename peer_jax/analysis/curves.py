"""Training curves, read from the metrics of the runs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from peer_jax.analysis.row import Row
from peer_jax.analysis.series import Curve
from peer_jax.run_directory import RunDirectory

# The share of the first steps that are left out. They fall so far that the rest of the curve would look flat.
SKIPPED = 0.05
# A smoothed point is the mean over this share of the run.
WINDOW = 0.05


@dataclasses.dataclass(frozen=True)
class Training:
    """The smoothed training loss of a run against FLOPs.

    ``is_best`` marks the first seed of the best size of its series.
    """

    row: Row
    flops: Float[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]
    is_best: bool

    def at(self, share: float) -> float:
        """The loss when this share of the FLOPs was spent."""
        return float(np.interp(share * self.row.training_flops, self.flops, self.losses))


def read(curves: Sequence[Curve]) -> list[Training]:
    """Reads the training curves of all runs of ``curves`` that have metrics. Rows of tables have none."""
    found = []
    for curve in curves:
        best, _ = curve.best() or ([], 0.0)
        # One seed stands for all: they differ by noise.
        found += [_training(row, is_best=row in best[:1]) for row in curve.rows]
    return [training for training in found if training is not None]


def _training(row: Row, *, is_best: bool) -> Training | None:
    points = {} if row.table else dict(_losses(RunDirectory(row.directory)))
    if len(points) < 3:
        return None
    steps = np.array(sorted(points), np.float64)
    losses = _smooth(steps, np.array([points[step] for step in sorted(points)]), WINDOW * row.steps)
    kept = steps >= min(SKIPPED * row.steps, steps[-2])
    grown = row.grown or {"steps": 0, "training_flops": 0.0}
    spent = np.interp(steps[kept], [0, grown["steps"], row.steps], [0, grown["training_flops"], row.training_flops])
    return Training(row, spent, losses[kept], is_best)


def _losses(run: RunDirectory) -> Iterator[tuple[int, float]]:
    """The training losses by step. Lines of validation have no training loss and are left out."""
    for entry in run.read_metrics():
        step, loss = entry.get("step"), entry.get("loss")
        if isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss):
            yield step, loss


def _smooth(steps: np.ndarray, losses: np.ndarray, width: float) -> np.ndarray:
    """The means over the points within half a width on either side; at the ends there are fewer points."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    low = np.searchsorted(steps, steps - width / 2, side="left")
    high = np.searchsorted(steps, steps + width / 2, side="right")
    return (sums[high] - sums[low]) / (high - low)
