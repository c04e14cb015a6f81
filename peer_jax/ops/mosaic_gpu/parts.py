"""What a device computes on its own part of a split table, by the kernels; see ``peer_jax.ops.parts``.

g  tokens     r  rows per token     d  row width     M  rows of a device's part
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.mosaic_gpu.tables import sum_pairs
from peer_jax.ops.mosaic_gpu.tokens import mix_tokens


@dataclasses.dataclass(frozen=True)
class KernelParts:
    """``peer_jax.ops.parts.Parts`` as kernels; ``interpret`` is that of ``mosaic_gpu.expert_mix``."""

    interpret: Any = False

    def dots(self, x, table, indices):
        return mix_tokens(x, table, None, indices, None, None, x.dtype, self.interpret)[1]

    def sums(self, weights, table, indices, dtype):
        return mix_tokens(None, None, table, indices, weights, None, dtype, self.interpret)[0]

    def gradients(self, indices, num_rows, *terms):
        terms = [(weights, cotangents, jnp.float32) for weights, cotangents in terms]
        return tuple(sum_pairs(indices, num_rows, terms, self.interpret))

    def mix(self, x, down, up, indices, gates, activation):
        own = own_first(indices, gates, down.shape[0])
        return self._sums(own, x, down, up, own.gates, activation)

    def mix_backward(self, x, down, up, indices, gates, activation, s, dy):
        """As the backward pass of ``mosaic_gpu.expert_mix``; the pairs stay in the order of ``own_first``."""
        own = own_first(indices, gates, down.shape[0])
        a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
        dx, q = self._sums(own, dy, up, down, own.gates * slope, lambda q: q)
        terms = (q * own.gates * slope, x), (own.gates * a, dy)
        d_down, d_up = self.gradients(own.rows, down.shape[0], *terms)
        return dx, d_down, d_up, own.put_back(q * a)

    def bag(self, values, indices, gates):
        own = own_first(indices, gates, values.shape[0])
        arguments = None, None, values, own.near, own.gates, None, gates.dtype, self.interpret
        return mix_tokens(*arguments, counts=own.counts, y_dtype=jnp.float32)[0]

    def bag_backward(self, values, indices, gates, dy):
        own = own_first(indices, gates, values.shape[0])
        _, d_gates = mix_tokens(dy, values, None, own.near, None, None, dy.dtype, self.interpret, counts=own.counts)
        (d_values,) = self.gradients(own.rows, values.shape[0], (own.gates, dy))
        return d_values, own.put_back(own.only(d_gates))

    def _sums(self, own, x, read, write, gates, activation):
        arguments = x, read, write, own.near, gates, activation, x.dtype, self.interpret
        y, s = mix_tokens(*arguments, counts=own.counts, y_dtype=jnp.float32)
        return y, own.only(s)


class Own(NamedTuple):
    """The pairs of each token with this device's own ones first.

    Attributes:
        counts: how many are its own.
        rows: their rows, and behind them M, which is no row.
        near: their rows, and behind them the last of these, or any row if there is none.
        gates: their gates in float32, and behind them zeros.
        order: where they were.
    """

    counts: Int[Array, " g"]
    rows: Int[Array, "g r"]
    near: Int[Array, "g r"]
    gates: Float[Array, "g r"]
    order: Int[Array, "g r"]

    def only(self, values: Float[Array, "g r"]) -> Float[Array, "g r"]:
        """The values of its own pairs, and zeros."""
        return jnp.where(jnp.arange(values.shape[1])[None] < self.counts[:, None], values, 0)

    def put_back(self, values: Float[Array, "g r"]) -> Float[Array, "g r"]:
        """The values in the order that the pairs had."""
        return jnp.take_along_axis(values, jnp.argsort(self.order, axis=1), axis=1)


def own_first(indices: Int[Array, "g r"], gates: Float[Array, "g r"], num_rows: int) -> Own:
    """Finds the pairs whose index is in range, and moves them to the front in their order."""
    own = (indices >= 0) & (indices < num_rows)
    counts = jnp.sum(own, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~own, axis=1, stable=True).astype(jnp.int32)
    place = jnp.arange(indices.shape[1], dtype=jnp.int32)[None]
    live = place < counts[:, None]
    rows = jnp.take_along_axis(indices, order, axis=1)
    last = jnp.take_along_axis(rows, jnp.maximum(counts - 1, 0)[:, None], axis=1)
    return Own(
        counts=counts,
        rows=jnp.where(live, rows, num_rows),
        near=jnp.clip(jnp.where(live, rows, last), 0, num_rows - 1),
        gates=jnp.where(live, jnp.take_along_axis(gates.astype(jnp.float32), order, axis=1), 0),
        order=order,
    )
