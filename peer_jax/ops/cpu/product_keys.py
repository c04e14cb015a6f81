"""The backward pass of product-key retrieval by rows: sub-keys are a small table, which stays in a CPU's cache.

t  tokens     h  heads     n  sub-keys per half     c  d_key / 2     k  keys retrieved per head     g  sets of sub-keys
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.rows import sum_rows
from peer_jax.ops.table_gradients import table_gradients


def backward_by_rows(
    queries: Float[Array, "t h d_key"],
    keys: Float[Array, "g 2 n c"],
    indices: Int[Array, "t h k"],
    d_scores: Float[Array, "t h k"],
) -> tuple[Float[Array, "t h d_key"], Float[Array, "g 2 n c"]]:
    """Gradients of the queries and of the sub-keys, given those of the retrieved scores."""
    t, h, d_key = queries.shape
    g, _, n, c = keys.shape
    d_scores, indices = d_scores.reshape(t * h, -1), indices.reshape(t * h, -1)
    first = jnp.tile(jnp.arange(h, dtype=jnp.int32) * (n if g > 1 else 0), t)[:, None]  # row of the head's set
    d_halves, d_half_keys = [], []
    for half, index in enumerate((indices // n, indices % n)):
        index, table = first + index, keys[:, half].reshape(g * n, c)

        def body(_: None, chunk: tuple[Array, Array], table: Array = table) -> tuple[None, Array]:
            d_scores, index = chunk
            return None, sum_rows(d_scores, table, index, table.dtype)

        size = chunk_size(t * h, 4 * d_scores.shape[1] * c)
        d_halves.append(scan_chunks(body, None, (d_scores, index), t * h, size)[1])
        query = queries[..., half * c : (half + 1) * c].reshape(t * h, c)
        d_half_keys.append(table_gradients(index, g * n, (d_scores, query))[0].reshape(g, n, c))
    return jnp.concatenate(d_halves, axis=-1).reshape(t, h, d_key), jnp.stack(d_half_keys, axis=1)
