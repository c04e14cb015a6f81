"""Gradients of a table: row i sums weights[t, r] * cotangents[t] over the pairs (t, r) that retrieved it.

t  tokens     r  rows per token     d  row width     N  rows of the table     p  pairs, p = t * r
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.cpu import table_gradients as on_cpu
from peer_jax.ops.pairs import Term, sort_pairs, with_zero_token


def table_gradients(
    indices: Int[Array, "t r"], num_rows: int, *terms: Term
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """One table for each term, in float32; on CPU the terms of a row always add up in the same order.

    A GPU may add some of the pairs of a row with atomics, in any order, unless XLA_FLAGS has
    --xla_gpu_deterministic_ops=true.
    """
    cpu = on_cpu.pick(indices.size, num_rows, terms) or in_row_order
    return jax.lax.platform_dependent(
        indices,
        terms,
        cpu=lambda indices, terms: cpu(indices, num_rows, terms),
        default=lambda indices, terms: in_row_order(indices, num_rows, terms),
    )


def in_row_order(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Sorts the pairs by row: the contributions to a row are then neighbours, and a table is written front to back."""
    t, r = indices.shape
    pairs = sort_pairs(indices)
    sources = [with_zero_token(cotangents) for _, cotangents in terms]

    def body(tables, chunk):
        row, token, weights = chunk
        return tuple(
            table.at[row].add(
                weight[:, None] * source[token].astype(jnp.float32),
                mode="promise_in_bounds",
                indices_are_sorted=True,
            )
            for table, weight, source in zip(tables, weights, sources, strict=True)
        ), None

    p = t * r
    size = min(p, chunk_size(p, 4 * terms[0][1].shape[1]))
    # The last chunk is padded with pairs of the last row and the token of zeros: rows stay sorted and nothing is added.
    fill = (0, -p % size)
    row = jnp.pad(pairs.row, fill, constant_values=num_rows - 1)
    token = jnp.pad(pairs.pair // r, fill, constant_values=t)
    weights = tuple(jnp.pad(weights.reshape(-1)[pairs.pair], fill) for weights, _ in terms)
    zeros = tuple(jnp.zeros((num_rows, cotangents.shape[1]), jnp.float32) for _, cotangents in terms)
    return scan_chunks(body, zeros, (row, token, weights), row.size, size)[0]
