"""Products with rows of a table that each token retrieves, ``rows . x``, and weighted sums of these rows.

t  tokens     r  rows per token     d  row width     N  rows of the table
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.cpu import KEEPS_BARRIERS
from peer_jax.ops.cpu import rows as on_cpu


def dot_rows(x: Float[Array, "t d"], table: Float[Array, "N d"], indices: Int[Array, "t r"]) -> Float[Array, "t r"]:
    """``table[indices] . x`` for every token, in float32. Rows are cast to the type of x; indices must be in range."""
    cpu = on_cpu.dot_rows if on_cpu.can_dot(x.shape[1]) else _dot
    return jax.lax.platform_dependent(x, table, indices, cpu=cpu, default=_dot)


def sum_rows(
    weights: Float[Array, "t r"], table: Float[Array, "N d"], indices: Int[Array, "t r"], dtype: jnp.dtype
) -> Float[Array, "t d"]:
    """Weighted sums of each token's rows, in float32. Rows are cast to ``dtype``; indices must be in range."""
    plain = functools.partial(_sum, dtype=dtype)
    cpu = functools.partial(on_cpu.sum_rows, dtype=dtype) if KEEPS_BARRIERS else plain
    return jax.lax.platform_dependent(weights.astype(jnp.float32), table, indices, cpu=cpu, default=plain)


def _rows(table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    """[*indices, d] in float32, rounded to ``dtype`` first."""
    return table.at[indices].get(mode="promise_in_bounds").astype(dtype).astype(jnp.float32)


# Products and sums rather than `einsum`: XLA fuses them with the gather.


def _dot(x: Array, table: Array, indices: Array) -> Array:
    return jnp.sum(x[:, None].astype(jnp.float32) * _rows(table, indices, x.dtype), axis=-1)


def _sum(weights: Array, table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    return jnp.sum(weights[..., None] * _rows(table, indices, dtype), axis=1)
