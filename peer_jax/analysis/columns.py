"""Columns of numbers that the fits take: what they must be, and what is left out of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

Column = Sequence[float] | Real[np.ndarray, " n"]
Values = float | Sequence[float] | Real[np.ndarray, "..."]
Interval = tuple[float, float]

# exp overflows float64 at 709. A fit whose optimum is beyond this limit counts as having none, and must not overflow.
LARGEST_LOG = 600.0


class NoFit(ValueError):  # noqa: N818, it is no error but says that a fit is missing
    """There is no such fit. The message is one short sentence with the reason."""


def percentiles(draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def columns_of(**columns: Column) -> list[np.ndarray]:
    """The columns as float64 vectors of one length."""
    vectors = [np.asarray(column, np.float64) for column in columns.values()]
    if any(vector.ndim != 1 for vector in vectors) or len({len(vector) for vector in vectors}) > 1:
        shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in zip(columns, vectors, strict=True))
        raise ValueError(f"the columns must be vectors of one length, but are {shapes}")
    return vectors


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")


def check_positive(**vectors: np.ndarray) -> None:
    for name, vector in vectors.items():
        bad = vector[~(np.isfinite(vector) & (vector > 0))]
        if bad.size:
            raise NoFit(f"{name} must be positive and finite, but hold {bad[0]:g}")


def finite(losses: np.ndarray, *others: np.ndarray) -> tuple:
    """The rows with a finite loss: the other columns, the losses, and a list of notes on what was left out."""
    finite = np.isfinite(losses)
    left_out = int(np.sum(~finite))
    notes = [f"{count(left_out, 'row')} without a finite loss left out"] if left_out else []
    return *(other[finite] for other in others), losses[finite], notes


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
