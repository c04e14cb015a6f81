"""Top k of every column of a matrix.

n  elements per column     m  columns
"""

import jax
from jaxtyping import Array, Float, Int

from peer_jax.ops.cpu import top_k as on_cpu


def top_k_columns(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """The k highest values of each column, highest first, and their places; equal values rank by lower place.

    1 <= k <= n. -0 ranks below 0. A column that has a NaN gives NaN values, at valid places.
    """
    cpu = on_cpu.by_tournament if on_cpu.is_faster(k, x.shape[1]) else plain
    return jax.lax.platform_dependent(x, cpu=lambda x: cpu(x, k), default=lambda x: plain(x, k))


def plain(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """``jax.lax.top_k``, which works on rows."""
    values, place = jax.lax.top_k(x.T, k)
    return values.T, place.T
