"""Moving rows of a table: gather them for a chunk of tokens, add their gradients up expert by expert.

t  tokens     r  rows a token     d  row width     N  rows of the table     p  pairs, p = t * r
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks


def gather_rows(table: Float[Array, "N d"], indices: Int[Array, "t r"], dtype: jnp.dtype) -> Float[Array, "t r d"]:
    """Rows of the table, cast after the gather. The indices must be in range."""
    return table.at[indices].get(mode="promise_in_bounds").astype(dtype)


# Products and sums rather than `einsum`: XLA fuses these with the gather. On CPU it makes `expert_mix` twice as fast.


def dot_rows(x: Float[Array, "t d"], rows: Float[Array, "t r d"]) -> Float[Array, "t r"]:
    """``rows . x`` for every token, in float32."""
    return jnp.sum(x[:, None].astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)


def sum_rows(weights: Float[Array, "t r"], rows: Float[Array, "t r d"]) -> Float[Array, "t d"]:
    """Weighted sums of each token's rows, in float32."""
    return jnp.sum(weights[..., None].astype(jnp.float32) * rows.astype(jnp.float32), axis=1)


# A term of a table's gradient: weights [t, r] and cotangents [t, d]; row i sums weights[t, r] * cotangents[t] over the
# pairs (t, r) that retrieved it.
Term = tuple[Float[Array, "t r"], Float[Array, "t d"]]


# Bytes of all of the gradients, in float32, from which on sorting pays on a CPU (docs/log.md).
SORTED_FROM = 256 * 2**20


def table_gradients(
    indices: Int[Array, "t r"], num_rows: int, *terms: Term
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """A table for each term, in float32 and always added up in the same order.

    A scatter on CPU is one loop on one thread, in the order of the tokens, and unless the tables are far larger than
    the caches a sort costs more than it saves. On a GPU it would add with atomics, in any order.
    """
    size = sum(4 * num_rows * cotangents.shape[1] for _, cotangents in terms)
    on_cpu = _in_row_order if size > SORTED_FROM else _in_token_order
    return jax.lax.platform_dependent(
        indices,
        terms,
        cpu=lambda indices, terms: on_cpu(indices, num_rows, terms),
        default=lambda indices, terms: _in_row_order(indices, num_rows, terms),
    )


def _in_token_order(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Pair after pair, as the tokens have them."""
    t, r = indices.shape
    d = terms[0][1].shape[1]

    def body(tables, chunk):
        indices, terms = chunk
        return tuple(
            table.at[indices.reshape(-1)].add(
                (weights[..., None] * cotangents[:, None].astype(jnp.float32)).reshape(-1, d), mode="promise_in_bounds"
            )
            for table, (weights, cotangents) in zip(tables, terms, strict=True)
        ), None

    return scan_chunks(body, _zeros(num_rows, terms), (indices, terms), t, chunk_size(t, 4 * r * d))[0]


class SortedPairs(NamedTuple):
    """The (token, row) pairs of a batch in the order of the rows."""

    row: Int[Array, " p"]
    pair: Int[Array, " p"]


def sort_pairs(indices: Int[Array, "t r"]) -> SortedPairs:
    """Stable, so that the gradients of a row always add up in the order of the tokens."""
    flat = indices.reshape(-1)
    row, pair = jax.lax.sort_key_val(flat, jnp.arange(flat.size, dtype=flat.dtype), is_stable=True)
    return SortedPairs(row, pair)


def _in_row_order(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Sorted by row, a row's contributions are neighbours, so the tables are walked through once, front to back."""
    t, r = indices.shape
    pairs = sort_pairs(indices)

    def body(tables, chunk):
        row, token, weights = chunk
        return tuple(
            table.at[row].add(
                weight[:, None] * cotangents[token].astype(jnp.float32),
                mode="promise_in_bounds",
                indices_are_sorted=True,
            )
            for table, weight, (_, cotangents) in zip(tables, weights, terms, strict=True)
        ), None

    weights = tuple(weights.reshape(-1)[pairs.pair] for weights, _ in terms)
    size = chunk_size(t * r, 4 * terms[0][1].shape[1])
    return scan_chunks(body, _zeros(num_rows, terms), (pairs.row, pairs.pair // r, weights), t * r, size)[0]


def _zeros(num_rows: int, terms: tuple[Term, ...]) -> tuple[Float[Array, "{num_rows} d"], ...]:
    return tuple(jnp.zeros((num_rows, cotangents.shape[1]), jnp.float32) for _, cotangents in terms)
