"""The matrices of a sample of experts, read some experts at a time: those of large experts need not fit into memory.

m  experts of the sample     b, c  experts of a part     f  neurons of an expert     q  numbers of an expert or a neuron
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from peer_jax.layers import FeedForward

PART = 2**28  # bytes of the matrices of a part at most, unless one expert has more; two parts are held at a time
DOUBLE = 2**22  # numbers in double precision at a time


class Matrices:
    """The matrices of some experts of a layer.

    Attributes:
        num_neurons: f; 0 if the layer doesn't tell its experts' matrices.
    """

    def __init__(self, layer: FeedForward, experts: Int[np.ndarray, " m"]) -> None:
        self.layer, self.experts = layer, experts
        one = self._read(slice(1))
        self.num_neurons = next(iter(one.values())).shape[1] if one else 0
        size = sum(rows.nbytes for rows in one.values())
        step = max(1, PART // max(1, size))
        self.parts = [slice(start, start + step) for start in range(0, len(experts) if one else 0, step)]

    def _read(self, part: slice) -> dict[str, Float[np.ndarray, "b f _"]]:
        rows = self.layer.expert_matrices(jnp.asarray(self.experts[part], jnp.int32))
        return {name: np.asarray(jnp.asarray(one).astype(jnp.float32)) for name, one in rows.items()}

    def products(self) -> dict[str, Float[np.ndarray, "m m"]]:
        """Inner products of each pair of experts, by the name of the matrix, and of the means over several neurons, as
        "<name>, mean neuron".
        """
        m = len(self.experts)
        whole: dict[str, np.ndarray] = {}
        means: dict[str, list[np.ndarray]] = {}
        for place, first in enumerate(self.parts):
            rows = self._read(first)
            for name, one in rows.items():
                means.setdefault(name, []).append(one.mean(axis=1))
            for second in self.parts[place:]:
                for name, found in self._with(rows, None if second is first else second).items():
                    of = whole.setdefault(name, np.zeros((m, m)))
                    of[first, second], of[second, first] = found, found.T
        products = {}
        for name, of in whole.items():
            products[name] = of
            if self.num_neurons > 1:
                mean = np.concatenate(means[name])
                products[f"{name}, mean neuron"] = _products(mean, mean)
        return products

    def _with(
        self, rows: dict[str, Float[np.ndarray, "b f _"]], second: slice | None
    ) -> dict[str, Float[np.ndarray, "b c"]]:
        """The inner products of a part with another one, or with itself. The other one is let go of at the end."""
        others = rows if second is None else self._read(second)
        return {
            name: _products(one.reshape(len(one), -1), others[name].reshape(len(others[name]), -1))
            for name, one in rows.items()
        }

    def neurons(self, places: Int[np.ndarray, " p"], numbers: Int[np.ndarray, " p"]) -> Float[np.ndarray, "p q"]:
        """All weights of some neurons: those with these numbers of the experts at these places of the sample, which
        ascend.
        """
        found = []
        for part in self.parts:
            own = slice(*np.searchsorted(places, (part.start, part.stop)))
            if own.start < own.stop:
                at = places[own] - part.start, numbers[own]
                found.append(np.concatenate([rows[at] for rows in self._read(part).values()], axis=-1))
        return np.concatenate(found)


def _products(a: Float[np.ndarray, "b q"], b: Float[np.ndarray, "c q"]) -> Float[np.ndarray, "b c"]:
    """Inner products of rows in double precision, some columns at a time."""
    step = max(1, DOUBLE // (len(a) + len(b)))
    found = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], step):
        columns = slice(start, start + step)
        found += a[:, columns].astype(np.float64) @ b[:, columns].astype(np.float64).T
    return found
