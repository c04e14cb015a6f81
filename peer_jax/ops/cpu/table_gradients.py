"""Gradients of a table such that all cores of a CPU share the work.

A scatter on CPU is one loop on one thread. Small tables are filled by it, in the order of the tokens. For larger ones
the pairs are sorted by row, and every row of a table is written once, with the sum of all its pairs, by all cores.

t  tokens     r  rows per token     d  row width     N  rows of the table     p  pairs, p = t * r
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.pairs import Term, chosen_first, sort_pairs, with_zero_token

# Bytes of all of the gradients, in float32, up to which a CPU does best without sorting (docs/log.md).
UNSORTED = 64 * 2**20
# Pairs of every row that one pass over a table adds.
PASS = 4
# Another pass is worth it while at least one row in so many has pairs left.
WORTH_A_PASS = 8


def pick(num_pairs: int, num_rows: int, terms: tuple[Term, ...]) -> Callable[..., tuple[Array, ...]] | None:
    """The fastest form for these sizes; None where it is the plain one, as in a table with few pairs per row."""
    if sum(4 * num_rows * cotangents.shape[1] for _, cotangents in terms) <= UNSORTED:
        return in_token_order
    return None if num_pairs * WORTH_A_PASS < num_rows else row_by_row


def in_token_order(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Adds pair after pair, in the order of the tokens."""
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

    zeros = tuple(jnp.zeros((num_rows, cotangents.shape[1]), jnp.float32) for _, cotangents in terms)
    return scan_chunks(body, zeros, (indices, terms), t, chunk_size(t, 4 * r * d))[0]


def row_by_row(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Sorts the pairs by row; then every row gathers what it sums, the first few pairs of all rows in one pass.

    Passes go on while enough rows have pairs left. The pairs that a few rows have in excess are scattered.
    """
    t, r = indices.shape
    row, pair = sort_pairs(indices)
    count = jnp.zeros(num_rows, jnp.int32).at[row].add(1, mode="promise_in_bounds", indices_are_sorted=True)
    start = jnp.cumsum(count) - count
    weights = [weights.reshape(-1).astype(jnp.float32) for weights, _ in terms]
    sources = [with_zero_token(cotangents) for _, cotangents in terms]

    def one_pass(done: Int[Array, ""]) -> tuple[Float[Array, "N d"], ...]:
        """For each row, the sum over ``PASS`` of its pairs from number ``done`` on."""
        nth = done + jnp.arange(PASS, dtype=jnp.int32)[:, None]
        live = nth < count[None]
        at = pair[jnp.minimum(start[None] + nth, pair.size - 1)]
        # The barriers keep XLA from computing tokens and weights again for each element of a row.
        token = jax.lax.optimization_barrier(jnp.where(live, at // r, t))
        tables = []
        for weight, source in zip(weights, sources, strict=True):
            weight = jax.lax.optimization_barrier(jnp.where(live, weight[at], 0))
            rows = (source.at[token[i]].get(mode="promise_in_bounds").astype(jnp.float32) for i in range(PASS))
            tables.append(functools.reduce(operator.add, (w[:, None] * a for w, a in zip(weight, rows, strict=True))))
        return tuple(tables)

    def enough(carry):
        done, _ = carry
        return jnp.sum(count > done) * WORTH_A_PASS > num_rows

    def another_pass(carry):
        done, tables = carry
        return done + PASS, tuple(a + b for a, b in zip(tables, one_pass(done), strict=True))

    none, first = jnp.int32(0), jnp.int32(PASS)
    done, tables = jax.lax.while_loop(enough, another_pass, (first, one_pass(none)))

    excess = jnp.arange(pair.size, dtype=jnp.int32) - start[row] >= done
    return _scatter_some(excess, row, pair // r, [weight[pair] for weight in weights], terms, tables)


def _scatter_some(
    chosen: Bool[Array, " p"],
    row: Int[Array, " p"],
    token: Int[Array, " p"],
    weights: list[Float[Array, " p"]],
    terms: tuple[Term, ...],
    tables: tuple[Float[Array, "N d"], ...],
) -> tuple[Float[Array, "N d"], ...]:
    """Adds the chosen pairs to the tables, in as many chunks as these pairs fill."""
    p = chosen.size
    size = min(p, chunk_size(p, 4 * tables[0].shape[1]))
    order, total = chosen_first(chosen)

    def step(index, tables):
        at = index * size + jnp.arange(size, dtype=jnp.int32)
        pair = order[jnp.minimum(at, p - 1)]
        live = at < total
        return tuple(
            table.at[row[pair]].add(
                jnp.where(live, weight[pair], 0)[:, None] * cotangents[token[pair]].astype(jnp.float32),
                mode="promise_in_bounds",
                indices_are_sorted=True,
            )
            for table, weight, (_, cotangents) in zip(tables, weights, terms, strict=True)
        )

    return jax.lax.fori_loop(0, (total + size - 1) // size, step, tables)
