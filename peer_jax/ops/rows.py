"""Products with rows of a table that each token retrieves: ``rows . x``, and weighted sums of rows.

On CPU the time is that of fetching rows, so loops have to ask for many at once. XLA fuses a gather with what uses it,
but its plain sums read row after row, each element waiting for the last. Written out as sums of a few terms, each a
gather of its own, LLVM vectorises them, and one step of the innermost loop reads several rows (docs/log.md).

t  tokens     r  rows a token     d  row width     N  rows of the table
"""

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.chunks import KEEPS_BARRIERS

# Rows that one step of a loop reads: more are not faster.
ROWS_OF_A_SUM = 8
ROWS_OF_A_DOT = 16
# Parts of a row that a loop over columns reads in one step. With fewer than 16, LLVM no longer vectorises it.
PARTS_OF_A_DOT = 16
# Width of a row from which on a product is added up row by row: a step then reads enough of it.
WIDE = 128


def dot_rows(x: Float[Array, "t d"], table: Float[Array, "N d"], indices: Int[Array, "t r"]) -> Float[Array, "t r"]:
    """``table[indices] . x`` for every token, in float32. Rows are cast to the type of x; indices must be in range."""
    return jax.lax.platform_dependent(x, table, indices, cpu=_dot_on_cpu, default=_dot)


def sum_rows(
    weights: Float[Array, "t r"], table: Float[Array, "N d"], indices: Int[Array, "t r"], dtype: jnp.dtype
) -> Float[Array, "t d"]:
    """Weighted sums of each token's rows, in float32. Rows are cast to ``dtype``; indices must be in range."""

    def on_cpu(*arrays: Array) -> Array:
        return _sum_on_cpu(*arrays, dtype)

    def default(*arrays: Array) -> Array:
        return _sum(*arrays, dtype)

    return jax.lax.platform_dependent(weights.astype(jnp.float32), table, indices, cpu=on_cpu, default=default)


def _rows(table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    """[*indices, d] in float32, by way of ``dtype``."""
    return table.at[indices].get(mode="promise_in_bounds").astype(dtype).astype(jnp.float32)


# Products and sums rather than `einsum`: XLA fuses these with the gather.


def _dot(x: Array, table: Array, indices: Array) -> Array:
    return jnp.sum(x[:, None].astype(jnp.float32) * _rows(table, indices, x.dtype), axis=-1)


def _sum(weights: Array, table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    return jnp.sum(weights[..., None] * _rows(table, indices, dtype), axis=1)


def _added(terms: Iterable[Array]) -> Array:
    """Their sum as one loop, which the barrier keeps XLA from fusing with what adds up the rest."""
    return jax.lax.optimization_barrier(functools.reduce(operator.add, terms))


def _sum_on_cpu(weights: Array, table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    """Eight rows at a time."""
    if not KEEPS_BARRIERS:
        return _sum(weights, table, indices, dtype)
    t, r = indices.shape
    together = math.gcd(r, ROWS_OF_A_SUM)
    indices, weights = (a.reshape(t, r // together, together) for a in (indices, weights))
    parts = _added(weights[..., i, None] * _rows(table, indices[..., i], dtype) for i in range(together))
    return jnp.sum(parts, axis=1)


def _dot_on_cpu(x: Array, table: Array, indices: Array) -> Array:
    d, parts = x.shape[1], PARTS_OF_A_DOT
    if d % parts or not KEEPS_BARRIERS:
        return _dot(x, table, indices)
    return (_dot_of_wide_rows if d >= WIDE else _dot_of_narrow_rows)(x, table, indices)


def _dot_of_wide_rows(x: Array, table: Array, indices: Array) -> Array:
    """A row at a time, all of its parts at once."""
    width = x.shape[1] // PARTS_OF_A_DOT
    take = jax.lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1))

    def term(start: int) -> Array:
        corner = jnp.stack([indices, jnp.full_like(indices, start)], axis=-1)
        part = jax.lax.gather(table, corner, take, (1, width), mode="promise_in_bounds").astype(x.dtype)
        return x[:, None, start : start + width].astype(jnp.float32) * part.astype(jnp.float32)

    return jnp.sum(_added(map(term, range(0, x.shape[1], width))), axis=-1)


def _dot_of_narrow_rows(x: Array, table: Array, indices: Array) -> Array:
    """Sixteen rows at a time, column by column."""
    (t, r), d = indices.shape, x.shape[1]
    together = math.gcd(r, ROWS_OF_A_DOT)
    indices = indices.reshape(t, r // together, 1, together)
    width = PARTS_OF_A_DOT

    def term(start: int) -> Array:
        columns = start + jnp.arange(width, dtype=indices.dtype)[:, None]
        part = table.at[indices, columns].get(mode="promise_in_bounds").astype(x.dtype)
        return x[:, None, start : start + width, None].astype(jnp.float32) * part.astype(jnp.float32)

    return jnp.sum(_added(map(term, range(0, d, width))), axis=2).reshape(t, r)
