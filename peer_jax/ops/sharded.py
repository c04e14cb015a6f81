"""The ops on many devices: tokens are split over all of them, tables over the ``expert`` axis by rows or by columns.

In the "xla" form no row of a table leaves its device. If tables are split by rows, the devices along ``expert``
exchange their tokens, each adds up what its own experts contribute, and the sums, [tokens, d], go back. If they are
split by columns, each device takes its columns of all tokens, and the devices exchange sums of their partial products,
[tokens, r]. ``docs/sharding.md`` counts the bytes.

t  tokens per device     g  tokens of all devices along ``expert``, g = E t     r  rows per token     d  row width
N  rows of a table     E  devices along ``expert``     p  pairs of a token and a row, p = g r
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.pairs import chosen_first
from peer_jax.ops.rows import dot_rows, sum_rows
from peer_jax.ops.table_gradients import table_gradients
from peer_jax.sharding import AXES, DATA, EXPERT, FSDP, constrain, current, on_each_device

TOKENS = P(AXES)
Activation = Callable[[Array], Array]


def by_tokens(f: Callable[..., Any], whole: tuple[Array, ...], split: tuple[Array, ...]) -> Any:
    """``f(*whole, *split)``, where each device has its own tokens of the arrays in ``split`` and all of the others."""
    specs = (P(),) * len(whole) + (TOKENS,) * len(split)
    return on_each_device(f, specs, TOKENS)(*whole, *split)


def by_partitioner(f: Callable[..., Array], tables: tuple[Array, ...], tokens: tuple[Array, ...]) -> Array:
    """``f(*tables, *tokens)`` with tables and tokens split; XLA decides what the devices exchange."""
    tables = tuple(constrain(table, "rows", "columns") for table in tables)
    return constrain(f(*tables, *(constrain(a, "batch") for a in tokens)), "batch")


def splits_experts() -> bool:
    """Whether expert tables, and the experts of an MoE, are split over devices."""
    return current() is not None and current().size(EXPERT) > 1


def expert_mix(
    x: Float[Array, "t d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"],
    activation: Activation,
) -> Float[Array, "t d"]:
    """``peer_jax.ops.expert_mix`` with its tables split, as "xla"."""
    return _mix(activation, x, down, up, indices, gates)


def value_bag(
    values: Float[Array, "N d"], indices: Int[Array, "t r"], gates: Float[Array, "t r"]
) -> Float[Array, "t d"]:
    """``peer_jax.ops.value_bag`` with its table split, as "xla"."""
    return _bag(values, indices, gates)


def _table() -> P:
    """How the placement in use splits tables."""
    return current().spec(("rows", "columns"))


def _by_rows() -> bool:
    return current().tables == "rows"


# Exchanges along the ``expert`` axis.

gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT, tiled=True)  # t -> g tokens
scatter_sum = functools.partial(jax.lax.psum_scatter, axis_name=EXPERT, tiled=True)  # g -> t tokens, summed
_sum = functools.partial(jax.lax.psum, axis_name=EXPERT)


def _to_columns(x: Float[Array, "t d"]) -> Float[Array, "g e"]:
    """This device's columns of the tokens of all devices along ``expert``."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=1, concat_axis=0, tiled=True)


def _to_tokens(x: Float[Array, "g e"]) -> Float[Array, "t d"]:
    """All columns of this device's own tokens: the inverse of ``_to_columns``."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=1, tiled=True)


def _sum_of_copies(table: Float[Array, "M e"]) -> Float[Array, "M e"]:
    """The gradient of a part of a table, summed over the devices that hold the same part."""
    copies = current().size(DATA) * current().size(FSDP)
    return jax.lax.psum(table, (DATA, FSDP)) if copies > 1 else table


# expert_mix.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(activation, x, down, up, indices, gates):
    return _mix_forward(activation, x, down, up, indices, gates)[0]


def _mix_forward(activation, x, down, up, indices, gates):
    table = _table()
    arguments = x, down, up, indices, gates
    in_specs = TOKENS, table, table, TOKENS, TOKENS
    if _by_rows():
        y = on_each_device(functools.partial(_mix_rows, activation), in_specs, TOKENS)(*arguments)
        return y, (*arguments, None)
    forward = functools.partial(_mix_columns, activation)
    y, s = on_each_device(forward, in_specs, (TOKENS, TOKENS))(*arguments)
    return y, (*arguments, s)


def _mix_backward(activation, residuals, dy):
    *arguments, s = residuals
    x, down, up, indices, gates = arguments
    table = _table()
    in_specs = (TOKENS, table, table, TOKENS, TOKENS)
    if _by_rows():
        backward, in_specs = functools.partial(_mix_rows_backward, activation), (*in_specs, TOKENS)
        arguments = (*arguments, dy)
    else:
        backward, in_specs = functools.partial(_mix_columns_backward, activation), (*in_specs, TOKENS, TOKENS)
        arguments = (*arguments, s, dy)
    dx, d_down, d_up, d_gates = on_each_device(backward, in_specs, (TOKENS, table, table, TOKENS))(*arguments)
    return dx, d_down, d_up, None, d_gates


_mix.defvjp(_mix_forward, _mix_backward)


def _mix_rows(activation, x, down, up, indices, gates):
    x, pairs = gather(x), OwnPairs(gather(indices), gather(gates), down)

    def body(y, token, row, gate, live, place):
        s = _dot(x[token], down[row].astype(x.dtype))
        return y.at[token].add(_rows(gate * activation(s), up[row].astype(x.dtype), live), **_IN_ORDER)

    y = pairs.loop(body, jnp.zeros(x.shape, jnp.float32))
    return scatter_sum(y).astype(x.dtype)


def _mix_rows_backward(activation, x, down, up, indices, gates, dy):
    dtype = x.dtype
    x, dy, pairs = gather(x), gather(dy), OwnPairs(gather(indices), gather(gates), down)

    def body(carry, token, row, gate, live, place):
        dx, d_gates, d_down, d_up = carry
        u, v, own_x, own_dy = down[row].astype(dtype), up[row].astype(dtype), x[token], dy[token]
        s = _dot(own_x, u)
        a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
        r = _dot(own_dy, v)
        ds = r * gate * slope
        return (
            dx.at[token].add(_rows(ds, u, live), **_IN_ORDER),
            d_gates.at[place].add(jnp.where(live, r * a, 0), mode="promise_in_bounds"),
            d_down.at[row].add(_rows(ds, own_x, live), mode="promise_in_bounds"),
            d_up.at[row].add(_rows(gate * a, own_dy, live), mode="promise_in_bounds"),
        )

    zeros = (x.shape, (indices.shape[1] * x.shape[0],), down.shape, up.shape)
    dx, d_gates, d_down, d_up = pairs.loop(body, tuple(jnp.zeros(shape, jnp.float32) for shape in zeros))
    d_gates = scatter_sum(d_gates.reshape(x.shape[0], -1)).astype(gates.dtype)
    d_down, d_up = _sum_of_copies(d_down), _sum_of_copies(d_up)
    return scatter_sum(dx).astype(dtype), d_down.astype(down.dtype), d_up.astype(up.dtype), d_gates


def _mix_columns(activation, x, down, up, indices, gates):
    columns, indices, all_gates = _to_columns(x), gather(indices), gather(gates)
    s = _sum(_dots(columns, down, indices))
    y = _sums(all_gates.astype(jnp.float32) * activation(s), up, indices, x.dtype)
    return _to_tokens(y.astype(x.dtype)), _own_tokens(s, x.shape[0])


def _mix_columns_backward(activation, x, down, up, indices, gates, s, dy):
    t, dtype, gates_dtype = x.shape[0], x.dtype, gates.dtype
    x, dy, indices = _to_columns(x), _to_columns(dy), gather(indices)
    g, s = gather(gates).astype(jnp.float32), gather(s)
    a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
    r = _sum(_dots(dy, up, indices))
    ds = r * g * slope
    dx = _to_tokens(_sums(ds, down, indices, dtype).astype(dtype))
    d_down, d_up = (_sum_of_copies(table) for table in table_gradients(indices, down.shape[0], (ds, x), (g * a, dy)))
    return dx, d_down.astype(down.dtype), d_up.astype(up.dtype), _own_tokens(r * a, t).astype(gates_dtype)


# value_bag.


@jax.custom_vjp
def _bag(values, indices, gates):
    return _bag_forward(values, indices, gates)[0]


def _bag_forward(values, indices, gates):
    forward = _bag_rows if _by_rows() else _bag_columns
    y = on_each_device(forward, (_table(), TOKENS, TOKENS), TOKENS)(values, indices, gates)
    return y, (values, indices, gates)


def _bag_backward(residuals, dy):
    values, indices, gates = residuals
    table = _table()
    backward = _bag_rows_backward if _by_rows() else _bag_columns_backward
    in_specs = table, TOKENS, TOKENS, TOKENS
    d_values, d_gates = on_each_device(backward, in_specs, (table, TOKENS))(values, indices, gates, dy)
    return d_values, None, d_gates


_bag.defvjp(_bag_forward, _bag_backward)


def _bag_rows(values, indices, gates):
    pairs = OwnPairs(gather(indices), gather(gates), values)

    def body(y, token, row, gate, live, place):
        return y.at[token].add(_rows(gate, values[row].astype(gates.dtype), live), **_IN_ORDER)

    y = pairs.loop(body, jnp.zeros((pairs.tokens, values.shape[1]), jnp.float32))
    return scatter_sum(y).astype(gates.dtype)


def _bag_rows_backward(values, indices, gates, dy):
    dy, pairs = gather(dy), OwnPairs(gather(indices), gather(gates), values)

    def body(carry, token, row, gate, live, place):
        d_gates, d_values = carry
        own_dy = dy[token]
        dg = _dot(own_dy, values[row].astype(dy.dtype))
        return (
            d_gates.at[place].add(jnp.where(live, dg, 0), mode="promise_in_bounds"),
            d_values.at[row].add(_rows(gate, own_dy, live), mode="promise_in_bounds"),
        )

    zeros = (pairs.tokens * indices.shape[1],), values.shape
    d_gates, d_values = pairs.loop(body, tuple(jnp.zeros(shape, jnp.float32) for shape in zeros))
    d_gates = scatter_sum(d_gates.reshape(pairs.tokens, -1))
    return _sum_of_copies(d_values).astype(values.dtype), d_gates.astype(gates.dtype)


def _bag_columns(values, indices, gates):
    return _to_tokens(_sums(gather(gates), values, gather(indices), gates.dtype).astype(gates.dtype))


def _bag_columns_backward(values, indices, gates, dy):
    dy, indices, all_gates = _to_columns(dy), gather(indices), gather(gates)
    d_gates = scatter_sum(_dots(dy, values, indices))
    (d_values,) = table_gradients(indices, values.shape[0], (all_gates.astype(jnp.float32), dy))
    return _sum_of_copies(d_values).astype(values.dtype), d_gates.astype(gates.dtype)


# Columns: all pairs, by chunks of tokens.


def _own_tokens(a: Float[Array, "g r"], t: int) -> Float[Array, "t r"]:
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(EXPERT) * t, t)


def _dots(x: Float[Array, "g e"], table: Float[Array, "N e"], indices: Int[Array, "g r"]) -> Float[Array, "g r"]:
    """This device's part of every ``table[indices] . x``."""

    def body(_: None, chunk: Any) -> tuple[None, Array]:
        x, indices = chunk
        return None, dot_rows(x, table, indices)

    return scan_chunks(body, None, (x, indices), *_chunks(x.shape[1], indices))[1]


def _sums(
    weights: Float[Array, "g r"], table: Float[Array, "N e"], indices: Int[Array, "g r"], dtype: jnp.dtype
) -> Float[Array, "g e"]:
    """This device's columns of every weighted sum of rows."""

    def body(_: None, chunk: Any) -> tuple[None, Array]:
        weights, indices = chunk
        return None, sum_rows(weights, table, indices, dtype)

    return scan_chunks(body, None, (weights, indices), *_chunks(table.shape[1], indices))[1]


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
        self.tokens, self._r = indices.shape
        self._num_rows, self._width = num_rows, _ = table.shape
        self._gates = gates.reshape(-1)
        self._row = indices.reshape(-1) - jax.lax.axis_index(EXPERT) * num_rows
        own = (self._row >= 0) & (self._row < num_rows)
        self._pair, self._count = chosen_first(own)

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

        return jax.lax.fori_loop(0, (self._count + size - 1) // size, step, carry)
