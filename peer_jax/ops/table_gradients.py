"""Gradients of a table: row i sums weights[t, r] * cotangents[t] over the pairs (t, r) that retrieved it.

t  tokens     r  rows a token     d  row width     N  rows of the table     p  pairs, p = t * r
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peer_jax.ops.chunks import chosen_first, chunk_size, scan_chunks

# The weights of the pairs and what they weigh.
Term = tuple[Float[Array, "t r"], Float[Array, "t d"]]

# Bytes of all of the gradients, in float32, up to which a CPU does best without sorting (docs/log.md).
UNSORTED = 64 * 2**20
# Pairs of every row that one pass over a table adds; and the part of its rows that must have as many for another pass.
PASS = 4
WORTH_A_PASS = 8


def table_gradients(
    indices: Int[Array, "t r"], num_rows: int, *terms: Term
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """A table for each term, in float32; on CPU always added up in the same order.

    A scatter on CPU is one loop on one thread, in the order of the tokens; small tables are filled by it. For larger
    ones the pairs are sorted by row, and each row of a table is written once, with all that it sums, by all cores.
    Elsewhere the pairs are sorted, too, so that a scatter finds those of a row together; on a GPU it may still add some
    of them with atomics, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true.
    """
    size = sum(4 * num_rows * cotangents.shape[1] for _, cotangents in terms)
    if size <= UNSORTED:
        on_cpu = _in_token_order
    elif indices.size * WORTH_A_PASS < num_rows:
        on_cpu = _in_row_order
    else:
        on_cpu = _row_by_row
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
    sources = [_with_no_token(cotangents) for _, cotangents in terms]

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
    # The last chunk is filled up with pairs of the last row, so that rows stay sorted, with no token.
    fill = (0, -p % size)
    row = jnp.pad(pairs.row, fill, constant_values=num_rows - 1)
    token = jnp.pad(pairs.pair // r, fill, constant_values=t)
    weights = tuple(jnp.pad(weights.reshape(-1)[pairs.pair], fill) for weights, _ in terms)
    return scan_chunks(body, _zeros(num_rows, terms), (row, token, weights), row.size, size)[0]


def _row_by_row(
    indices: Int[Array, "t r"], num_rows: int, terms: tuple[Term, ...]
) -> tuple[Float[Array, "{num_rows} d"], ...]:
    """Sorted by row, every row of a table gathers what it sums: the first few pairs of all rows in one pass.

    Passes go on while enough rows have more; what a few rows have in excess is scattered.
    """
    t, r = indices.shape
    row, pair = sort_pairs(indices)
    count = jnp.zeros(num_rows, jnp.int32).at[row].add(1, mode="promise_in_bounds", indices_are_sorted=True)
    start = jnp.cumsum(count) - count
    weights = [weights.reshape(-1).astype(jnp.float32) for weights, _ in terms]
    sources = [_with_no_token(cotangents) for _, cotangents in terms]

    def one_pass(done: Int[Array, ""]) -> tuple[Float[Array, "N d"], ...]:
        """What each row sums over its pairs from number ``done`` on, ``PASS`` of them."""
        nth = done + jnp.arange(PASS, dtype=jnp.int32)[:, None]
        live = nth < count[None]
        at = pair[jnp.minimum(start[None] + nth, pair.size - 1)]
        # The barriers keep XLA from working this out again for each element of a row.
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
    """Adds the chosen pairs to the tables, in as many chunks as they fill."""
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


def _with_no_token(cotangents: Float[Array, "t d"]) -> Float[Array, "t+1 d"]:
    """Behind the tokens' a row of zeros, for pairs that are none: a weight of 0 would not undo a NaN."""
    return jnp.pad(cotangents, ((0, 1), (0, 0)))


def _zeros(num_rows: int, terms: tuple[Term, ...]) -> tuple[Float[Array, "{num_rows} d"], ...]:
    return tuple(jnp.zeros((num_rows, cotangents.shape[1]), jnp.float32) for _, cotangents in terms)
