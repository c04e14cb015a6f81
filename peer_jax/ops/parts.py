"""What a device computes on its own part of a split table, by XLA; `mosaic_gpu.parts` has the same as kernels.

g  tokens     r  rows per token     d  row width     M  rows of a device's part     e  columns of a device's part
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.pairs import Term, chosen_first
from peer_jax.ops.rows import cast_whole, dot_rows, sum_rows
from peer_jax.ops.table_gradients import table_gradients
from peer_jax.sharding import EXPERT, current

Activation = Callable[[Array], Array]


@runtime_checkable
class Parts(Protocol):
    """The computations of one device. Results are float32 unless a type is given.

    Where a table is split by columns, each row is here in part, and the first three compute a part of every product.
    Where it is split by rows, the indices count from this device's first row, and a pair whose index is out of range
    contributes nothing.
    """

    def dots(self, x: Float[Array, "g e"], table: Float[Array, "M e"], indices: Int[Array, "g r"]) -> Array:
        """``table[indices] . x``, [g, r]."""

    def sums(
        self, weights: Float[Array, "g r"], table: Float[Array, "M e"], indices: Int[Array, "g r"], dtype
    ) -> Array:
        """The sum over r of ``weights * table[indices]``, [g, e], in ``dtype``, the type that rows are cast to."""

    def gradients(self, indices: Int[Array, "g r"], num_rows: int, *terms: Term) -> tuple[Array, ...]:
        """For each term a table, [num_rows, e]; see ``peer_jax.ops.table_gradients``."""

    def mix(self, x, down, up, indices, gates, activation: Activation) -> tuple[Array, Array | None]:
        """This device's share of ``expert_mix``, [g, d], and what the backward pass wants of it, if anything."""

    def mix_backward(self, x, down, up, indices, gates, activation: Activation, kept, dy) -> tuple[Array, ...]:
        """This device's shares of the gradients of x, ``down``, ``up`` and the gates, [g, r]."""

    def bag(self, values: Float[Array, "M d"], indices: Int[Array, "g r"], gates: Float[Array, "g r"]) -> Array:
        """This device's share of ``value_bag``, [g, d]."""

    def bag_backward(self, values, indices, gates, dy: Float[Array, "g d"]) -> tuple[Array, Array]:
        """This device's shares of the gradients of ``values`` and the gates, [g, r]."""


@dataclasses.dataclass(frozen=True)
class Xla:
    """``Parts`` in chunks that XLA compiles."""

    gradients = staticmethod(table_gradients)

    def dots(self, x, table, indices):
        table = cast_whole(table, x.dtype, indices.size)

        def body(_: None, chunk: Any) -> tuple[None, Array]:
            x, indices = chunk
            return None, dot_rows(x, table, indices)

        return scan_chunks(body, None, (x, indices), *_chunks(x.shape[1], indices))[1]

    def sums(self, weights, table, indices, dtype):
        table = cast_whole(table, dtype, indices.size)

        def body(_: None, chunk: Any) -> tuple[None, Array]:
            weights, indices = chunk
            return None, sum_rows(weights, table, indices, dtype)

        return scan_chunks(body, None, (weights, indices), *_chunks(table.shape[1], indices))[1].astype(dtype)

    def mix(self, x, down, up, indices, gates, activation):
        pairs = OwnPairs(indices, gates, down)
        u_rows, v_rows = (cast_whole(table, x.dtype, pairs.expected) for table in (down, up))

        def body(y, token, row, gate, live, place):
            s = _dot(x[token], u_rows[row].astype(x.dtype))
            return y.at[token].add(_rows(gate * activation(s), v_rows[row].astype(x.dtype), live), **_IN_ORDER)

        return pairs.loop(body, jnp.zeros(x.shape, jnp.float32)), None

    def mix_backward(self, x, down, up, indices, gates, activation, kept, dy):
        dtype, pairs = x.dtype, OwnPairs(indices, gates, down)
        u_rows, v_rows = (cast_whole(table, dtype, pairs.expected) for table in (down, up))

        def body(carry, token, row, gate, live, place):
            dx, d_gates, d_down, d_up = carry
            u, v = u_rows[row].astype(dtype), v_rows[row].astype(dtype)
            own_x, own_dy = x[token], dy[token]
            s = _dot(own_x, u)
            a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
            q = _dot(own_dy, v)
            ds = q * gate * slope
            return (
                dx.at[token].add(_rows(ds, u, live), **_IN_ORDER),
                d_gates.at[place].add(jnp.where(live, q * a, 0), **_IN_ORDER),
                d_down.at[row].add(_rows(ds, own_x, live), mode="promise_in_bounds"),
                d_up.at[row].add(_rows(gate * a, own_dy, live), mode="promise_in_bounds"),
            )

        zeros = (x.shape, (indices.size,), down.shape, up.shape)
        dx, d_gates, d_down, d_up = pairs.loop(body, tuple(jnp.zeros(shape, jnp.float32) for shape in zeros))
        return dx, d_down, d_up, d_gates.reshape(indices.shape)

    def bag(self, values, indices, gates):
        pairs = OwnPairs(indices, gates, values)
        v = cast_whole(values, gates.dtype, pairs.expected)

        def body(y, token, row, gate, live, place):
            return y.at[token].add(_rows(gate, v[row].astype(gates.dtype), live), **_IN_ORDER)

        return pairs.loop(body, jnp.zeros((indices.shape[0], values.shape[1]), jnp.float32))

    def bag_backward(self, values, indices, gates, dy):
        pairs = OwnPairs(indices, gates, values)
        v = cast_whole(values, dy.dtype, pairs.expected)

        def body(carry, token, row, gate, live, place):
            d_gates, d_values = carry
            own_dy = dy[token]
            dg = _dot(own_dy, v[row].astype(dy.dtype))
            return (
                d_gates.at[place].add(jnp.where(live, dg, 0), **_IN_ORDER),
                d_values.at[row].add(_rows(gate, own_dy, live), mode="promise_in_bounds"),
            )

        zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in ((indices.size,), values.shape))
        d_gates, d_values = pairs.loop(body, zeros)
        return d_values, d_gates.reshape(indices.shape)


def _chunks(width: int, indices: Int[Array, "g r"]) -> tuple[int, int]:
    tokens, r = indices.shape
    return tokens, chunk_size(tokens, 4 * r * width)


# Rows: only the pairs of this device's own rows, in the order of the tokens.

_IN_ORDER = {"mode": "promise_in_bounds", "indices_are_sorted": True}


def _dot(a: Float[Array, "c d"], b: Float[Array, "c d"]) -> Float[Array, " c"]:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _rows(weight: Float[Array, " c"], rows: Float[Array, "c d"], live: Bool[Array, " c"]) -> Float[Array, "c d"]:
    """Weighted rows in float32, zero for pairs that only pad a chunk."""
    return jnp.where(live[:, None], weight[:, None] * rows.astype(jnp.float32), 0)


class OwnPairs:
    """The pairs, among those of all g tokens, whose row this device holds."""

    def __init__(self, indices: Int[Array, "g r"], gates: Float[Array, "g r"], table: Float[Array, "M d"]) -> None:
        self._r = indices.shape[1]
        self._num_rows, self._width = table.shape
        self._gates, self._row = gates.reshape(-1), indices.reshape(-1)
        self._pair, self._count = chosen_first((self._row >= 0) & (self._row < self._num_rows))
        # How many there are if the rows of all devices are equally popular.
        self.expected = indices.size // (1 if current() is None else current().size(EXPERT))

    def loop(self, body: Callable[..., Any], carry: Any) -> Any:
        """``carry = body(carry, token, row, gate, live, place)`` over chunks of this device's pairs.

        A chunk has the token, the row (counted from the first of this device), the gate and the place in [g * r] of
        each of its pairs. In the last chunk, pairs that are not ``live`` are padding, with a gate of zero.
        """
        p = self._pair.size
        size = min(p, chunk_size(p, 4 * self._width))

        def step(index: Array, carry: Any) -> Any:
            at = index * size + jnp.arange(size, dtype=jnp.int32)
            live = at < self._count
            pair = self._pair[jnp.minimum(at, p - 1)]
            row = jnp.clip(self._row[pair], 0, self._num_rows - 1)
            gate = jnp.where(live, self._gates[pair].astype(jnp.float32), 0)
            return body(carry, pair // self._r, row, gate, live, pair)

        # The scope tells `peer_jax.planning.hlo` how often the loop is expected to turn, which the data decide.
        with jax.named_scope(f"about_{-(-self.expected // size)}_turns"):
            return jax.lax.fori_loop(0, (self._count + size - 1) // size, step, carry)
