"""Elementwise updates of tables, of all rows or of some, such that a CPU passes over memory once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peer_jax.ops.cpu import KEEPS_BARRIERS
from peer_jax.ops.touched import put_rows, take_rows
from peer_jax.sharding import target

# Bytes of a table's rows that are updated at a time: few enough for one pass to find in the cache what another wrote.
ROWS_BUDGET = 2**20

Tables = tuple[Any, ...]


def update_by_rows(
    update: Callable[..., tuple[Tables, jax.Array]],
    tables: Tables,
    other: jax.Array,
    *,
    rows: jax.Array | None = None,
    onto: Tables | None = None,
) -> tuple[Tables, jax.Array]:
    """Computes ``tables, sums = update(*tables, other)``, on CPU some rows at a time where there are many.

    On CPU, XLA makes a pass over memory for nearly every operation, which large tables feel. They are updated in place
    if the compiled function owns them.

    Args:
        update: elementwise but for ``sums``, which are sums over all rows.
        tables: what is updated; all arrays have N rows. None stands for a table that isn't there.
        other: what else ``update`` reads, such as the gradient; it has N rows, or one for each of ``rows``.
        rows: numbers of the rows to update, as ``peer_jax.ops.touched`` has them; None: all. Their padding must add
            nothing to the sums. On CPU, time follows the number of rows without the padding.
        onto: with ``rows``, the tables that updated rows are written to, if they are not those that are read.
    """
    onto = tables if onto is None else onto
    n = other.shape[0] if other.ndim else 1
    size = ROWS_BUDGET * n // max(1, other.nbytes)
    if target().platform != "cpu" or not KEEPS_BARRIERS or not 0 < size < n:
        size = n
    if rows is None and size == n:
        return update(*tables, other)

    def at(start: int | jax.Array, size: int, new: Tables) -> tuple[Tables, jax.Array]:
        def part(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, start, size)

        numbers = None if rows is None else part(rows)
        now = tuple(c if a is b else a for a, b, c in zip(tables, onto, new, strict=True))
        # All rows are read before any is written back: otherwise XLA would copy a table to read the old rows from.
        old = jax.tree.map(part if rows is None else lambda a: take_rows(a, numbers), now)
        old, given = jax.lax.optimization_barrier((old, part(other)))
        after, sums = jax.lax.optimization_barrier(update(*old, given))
        if rows is None:
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), new, after), sums
        return jax.tree.map(lambda a, b: put_rows(a, numbers, b), new, after), sums

    def body(index: jax.Array, carry: tuple[Tables, jax.Array]) -> tuple[Tables, jax.Array]:
        new, sums = carry
        new, more = at(index * size, size, new)
        return new, sums + more

    turns = n // size
    if rows is not None:
        touched = jnp.sum(rows < jax.tree.leaves(tables)[0].shape[0])
        turns = jnp.minimum(turns, (touched + size - 1) // size)
    new, sums = at(0, size, onto)
    if size < n:
        new, sums = jax.lax.fori_loop(1, turns, body, (new, sums))
    if n % size:
        new, more = at(n - n % size, n % size, new)
        sums = sums + more
    return new, sums
