"""Products with rows, and weighted sums of rows, such that a CPU fetches many rows at once.

The time on CPU is that of fetching rows. XLA fuses a gather with the sum that uses it, but a plain sum reads row after
row, and each element waits for the last. Written as a sum of a few terms, each with a gather of its own, LLVM
vectorises it, and one step of the innermost loop reads several rows (docs/log.md).

t  tokens     r  rows per token     d  row width     N  rows of the table
"""

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.cpu import KEEPS_BARRIERS

# Rows that one step of a loop reads: more are not faster.
ROWS_OF_A_SUM = 8
ROWS_OF_A_DOT = 16
# Parts of a row that a loop over columns reads in one step. With fewer than 16, LLVM no longer vectorises it.
PARTS_OF_A_DOT = 16
# Row width from which on a product is added up row by row: one step then reads enough of a row.
WIDE = 128


def can_dot(d: int) -> bool:
    """Whether ``dot_rows`` takes rows of this width and is faster than the plain form."""
    return KEEPS_BARRIERS and d % PARTS_OF_A_DOT == 0


def dot_rows(x: Float[Array, "t d"], table: Float[Array, "N d"], indices: Int[Array, "t r"]) -> Float[Array, "t r"]:
    """``table[indices] . x`` in float32, for rows whose width is a multiple of ``PARTS_OF_A_DOT``."""
    return (_dot_of_wide_rows if x.shape[1] >= WIDE else _dot_of_narrow_rows)(x, table, indices)


def sum_rows(
    weights: Float[Array, "t r"], table: Float[Array, "N d"], indices: Int[Array, "t r"], dtype: jnp.dtype
) -> Float[Array, "t d"]:
    """Weighted sums of each token's rows in float32, eight rows at a time."""
    t, r = indices.shape
    together = math.gcd(r, ROWS_OF_A_SUM)
    indices, weights = (a.reshape(t, r // together, together) for a in (indices, weights))

    def term(i: int) -> Array:
        rows = table.at[indices[..., i]].get(mode="promise_in_bounds").astype(dtype)
        return weights[..., i, None] * rows.astype(jnp.float32)

    return jnp.sum(_added(map(term, range(together))), axis=1)


def _added(terms: Iterable[Array]) -> Array:
    """The sum of the terms as one loop: the barrier keeps XLA from fusing it with the sum that follows."""
    return jax.lax.optimization_barrier(functools.reduce(operator.add, terms))


def _dot_of_wide_rows(x: Array, table: Array, indices: Array) -> Array:
    """One row at a time, all of its parts at once."""
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
