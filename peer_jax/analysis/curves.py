"""Training curves, read from the runs' own ``metrics.jsonl``."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from peer_jax.analysis.isoflop import Curve
from peer_jax.analysis.results import Row

METRICS = "metrics.jsonl"
# The first steps fall so far that the rest of the curve would be flat.
SKIPPED = 0.05
# Share of the run that one smoothed point is the mean of.
WINDOW = 0.05


@dataclasses.dataclass(frozen=True)
class Training:
    """The smoothed training loss of a run against FLOPs. ``is_best``: the first seed of its series' best size."""

    row: Row
    flops: Float[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]
    is_best: bool

    def at(self, share: float) -> float:
        """The loss when this share of the FLOPs was spent."""
        return float(np.interp(share * self.row.training_flops, self.flops, self.losses))


def read(curves: Sequence[Curve]) -> list[Training]:
    """Of all runs of the curves whose metrics are there."""
    found = []
    for curve in curves:
        best, _ = curve.best() or ([], 0.0)
        # Of several seeds one stands for all: they differ by noise.
        found += [_training(row, is_best=row in best[:1]) for row in curve.rows]
    return [training for training in found if training is not None]


def _training(row: Row, *, is_best: bool) -> Training | None:
    try:
        lines = (row.directory / METRICS).read_text(errors="replace").splitlines()
    except OSError:
        return None
    points = dict(_losses(lines))
    if len(points) < 3:
        return None
    steps = np.array(sorted(points), np.float64)
    losses = _smooth(steps, np.array([points[step] for step in sorted(points)]), WINDOW * row.steps)
    kept = steps >= min(SKIPPED * row.steps, steps[-2])
    return Training(row, steps[kept] / row.steps * row.training_flops, losses[kept], is_best)


def _losses(lines: Sequence[str]) -> Iterator[tuple[int, float]]:
    for line in lines:
        try:
            entry = json.loads(line)
            step, loss = entry["step"], entry["loss"]
        except (ValueError, TypeError, KeyError):  # validation has lines of its own, and a kill may cut the last
            continue
        if isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss):
            yield step, loss


def _smooth(steps: np.ndarray, losses: np.ndarray, width: float) -> np.ndarray:
    """Means over the points within half a width on either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    low = np.searchsorted(steps, steps - width / 2, side="left")
    high = np.searchsorted(steps, steps + width / 2, side="right")
    return (sums[high] - sums[low]) / (high - low)
