"""Elementwise updates of whole tables, such that a CPU passes over memory once."""

from collections.abc import Callable
from typing import Any

import jax

from peer_jax.ops.cpu import KEEPS_BARRIERS
from peer_jax.ops.touched import put_rows, take_rows
from peer_jax.sharding import target

# Bytes of a table's rows that are updated at a time: few enough for one pass to find in the cache what another wrote.
ROWS_BUDGET = 2**20


def update_by_rows(
    update: Callable[..., tuple[tuple[Any, ...], jax.Array]], tables: tuple[Any, ...], other: jax.Array
) -> tuple[tuple[Any, ...], jax.Array]:
    """Computes ``tables, sums = update(*tables, other)``, on CPU some rows at a time where the tables are large.

    On CPU, XLA makes a pass over memory for nearly every operation, which large tables feel. They are updated in place
    if the compiled function owns them.

    Args:
        update: elementwise but for ``sums``, which are sums over all rows.
        tables: what is updated; all arrays have N rows. None stands for a table that isn't there.
        other: what else ``update`` reads, such as the gradient.
    """
    n = other.shape[0] if other.ndim else 1
    rows = ROWS_BUDGET * n // max(1, other.nbytes)
    if target().platform != "cpu" or not KEEPS_BARRIERS or not 0 < rows < n:
        return update(*tables, other)

    def at(start: int | jax.Array, size: int, tables: tuple[Any, ...]):
        # All rows are read before any is written back: otherwise XLA would copy a table to read the old rows from.
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), (*tables, other))
        new, sums = jax.lax.optimization_barrier(update(*jax.lax.optimization_barrier(part)))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), tables, new), sums

    def body(index: jax.Array, carry):
        tables, sums = carry
        tables, more = at(index * rows, rows, tables)
        return tables, sums + more

    tables, sums = jax.lax.fori_loop(1, n // rows, body, at(0, rows, tables))
    if n % rows:
        tables, more = at(n - n % rows, n % rows, tables)
        sums = sums + more
    return tables, sums


def update_touched_rows(
    update: Callable[..., tuple[tuple[Any, ...], jax.Array]],
    tables: tuple[Any, ...],
    others: tuple[Any, ...],
    rows: jax.Array,
    gradient: jax.Array,
) -> tuple[tuple[Any, ...], jax.Array]:
    """Computes ``new, sums = update(*tables, gradient)`` for some rows of the tables, in place.

    Args:
        update: as in ``update_by_rows``.
        tables: what is updated, with N rows each. None stands for a table that isn't there.
        others: the tables that the updated rows are written to, which have all other rows as they are to be.
        rows: numbers of the rows, as ``peer_jax.ops.touched`` has them.
        gradient: one row for each of these.
    """
    # All rows are read before any is written back: otherwise XLA would copy a table to read the old rows from.
    part = jax.lax.optimization_barrier(jax.tree.map(lambda a: take_rows(a, rows), tables))
    new, sums = update_by_rows(update, part, gradient)
    return jax.tree.map(lambda a, b: put_rows(a, rows, b), others, new), sums
