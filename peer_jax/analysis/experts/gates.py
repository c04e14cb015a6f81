"""How much weight the most used experts get from tokens of each label, beside what they get from all tokens.

C  labels     m  experts     T  tokens     N  experts of the layer
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from peer_jax.analysis.experts.trace import UNKNOWN, Labels, Trace

EXPERTS = 64  # the most used ones
LABELS = 24  # those with the most tokens


@dataclasses.dataclass(frozen=True)
class GateMap:
    """Mean weights of experts over the tokens of each label, where a token that doesn't use an expert gives it zero.

    Attributes:
        block, kind: the block, and the kind of the labels.
        labels, tokens: the names of the labels, and how many tokens each has.
        experts: most used first.
        mean: of each expert's weight over all tokens that have a label.
        weights: over the tokens of each label.
    """

    block: int
    kind: str
    labels: tuple[str, ...]
    tokens: Int[np.ndarray, " C"]
    experts: Int[np.ndarray, " m"]
    mean: Float[np.ndarray, " m"]
    weights: Float[np.ndarray, "C m"]

    @property
    def times(self) -> Float[np.ndarray, "C m"]:
        """How many times its mean weight an expert gets."""
        return self.weights / self.mean


def gate_map(trace: Trace, labels: Labels) -> GateMap | None:
    """None if the tokens have fewer than two labels, or use no expert."""
    known = labels.of != UNKNOWN
    of, indices, gates = labels.of[known], trace.indices[known], trace.gates[known].astype(np.float64)
    sizes = np.bincount(of, minlength=len(labels.names))
    shown = np.sort(np.argsort(-sizes, kind="stable")[: min(LABELS, np.count_nonzero(sizes))])
    mass = np.bincount(indices.ravel(), gates.ravel(), minlength=trace.num_experts)
    experts = np.argsort(-mass, kind="stable")[: min(EXPERTS, np.count_nonzero(mass))]
    if len(shown) < 2 or not len(experts):
        return None
    column, row = np.full(trace.num_experts, -1), np.full(len(labels.names), -1)
    column[experts], row[shown] = np.arange(len(experts)), np.arange(len(shown))
    columns, rows = column[indices], np.broadcast_to(row[of][:, None, None], indices.shape)
    counted = (columns >= 0) & (rows >= 0)
    places = (rows * len(experts) + columns)[counted]
    sums = np.bincount(places, gates[counted], minlength=len(shown) * len(experts)).reshape(len(shown), -1)
    names, tokens = tuple(labels.names[place] for place in shown), sizes[shown]
    return GateMap(trace.block, labels.kind, names, tokens, experts, mass[experts] / len(of), sums / tokens[:, None])
