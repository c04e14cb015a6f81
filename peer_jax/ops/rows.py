"""Products with rows of a table that each token retrieves, ``rows . x``, and weighted sums of these rows.

t  tokens     r  rows per token     d  row width     N  rows of the table
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.cpu import KEEPS_BARRIERS
from peer_jax.ops.cpu import rows as on_cpu
from peer_jax.ops.tpu import rows as on_tpu
from peer_jax.sharding import target

# Pairs per row of a table from which a TPU casts the table at once, instead of each row after it is looked up. The
# matrix units then get rows as they are; and in a loop the compiler would cast the table anyway (docs/performance.md).
CAST_FROM = 1


def dot_rows(x: Float[Array, "t d"], table: Float[Array, "N d"], indices: Int[Array, "t r"]) -> Float[Array, "t r"]:
    """``table[indices] . x`` for every token, in float32. Rows are cast to the type of x; indices must be in range."""
    cpu = on_cpu.dot_rows if on_cpu.can_dot(x.shape[1]) else _dot
    default = on_tpu.dot_rows if _is_for_tpu() and on_tpu.can_multiply(table, x.dtype, len(x)) else _dot
    return jax.lax.platform_dependent(x, table, indices, cpu=cpu, default=default)


def sum_rows(
    weights: Float[Array, "t r"], table: Float[Array, "N d"], indices: Int[Array, "t r"], dtype: jnp.dtype
) -> Float[Array, "t d"]:
    """Weighted sums of each token's rows, in float32. Rows are cast to ``dtype``; indices must be in range."""
    plain = functools.partial(_sum, dtype=dtype)
    cpu = functools.partial(on_cpu.sum_rows, dtype=dtype) if KEEPS_BARRIERS else plain
    default = on_tpu.sum_rows if _is_for_tpu() and on_tpu.can_multiply(table, dtype, len(weights)) else plain
    return jax.lax.platform_dependent(weights.astype(jnp.float32), table, indices, cpu=cpu, default=default)


def cast_whole(table: Float[Array, "N d"], dtype: jnp.dtype, pairs: int) -> Float[Array, "N d"]:
    """The table from which ``pairs`` rows are looked up: in ``dtype`` on a TPU, if there are enough; else as it is."""
    return table.astype(dtype) if _is_for_tpu() and pairs >= CAST_FROM * len(table) else table


def _is_for_tpu() -> bool:
    return target().platform == "tpu"


def _rows(table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    """[*indices, d] in float32, rounded to ``dtype`` first."""
    return table.at[indices].get(mode="promise_in_bounds").astype(dtype).astype(jnp.float32)


# Products and sums rather than `einsum`: XLA fuses them with the gather.


def _dot(x: Array, table: Array, indices: Array) -> Array:
    return jnp.sum(x[:, None].astype(jnp.float32) * _rows(table, indices, x.dtype), axis=-1)


def _sum(weights: Array, table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    return jnp.sum(weights[..., None] * _rows(table, indices, dtype), axis=1)
