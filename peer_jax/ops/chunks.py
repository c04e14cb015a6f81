"""Working through the tokens in chunks, so that gathered rows never outgrow the cache (CPU) or a fixed budget."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Gathered bytes a chunk may hold. On a CPU they should stay in a core's cache: 16 tokens of 128 float32 rows of width
# 256 measured fastest there. Elsewhere a chunk is a kernel launch, so it should be large, yet small beside the device.
CPU_BUDGET = 2 * 2**20
ACCELERATOR_BUDGET = 256 * 2**20


def chunk_size(num_tokens: int, bytes_per_token: int) -> int:
    """Tokens a chunk, a power of two, for the backend's budget; all of them where they fit."""
    budget = CPU_BUDGET if jax.default_backend() == "cpu" else ACCELERATOR_BUDGET
    fitting = max(1, budget // max(1, bytes_per_token))
    return num_tokens if num_tokens <= fitting else 2 ** int(math.log2(fitting))


def _split(tree: Any, size: int) -> Any:
    """[tokens, ...] -> [chunks, size, ...], the last chunk filled up with zeros."""

    def split(a: jax.Array) -> jax.Array:
        padding = -a.shape[0] % size
        if padding:
            a = jnp.concatenate([a, jnp.zeros((padding, *a.shape[1:]), a.dtype)])
        return a.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(split, tree)


def scan_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tokens: Any, num_tokens: int, size: int
) -> tuple[Any, Any]:
    """``carry, out = body(carry, chunk)`` over chunks of ``size`` of the leading axis of every array in ``tokens``.

    Returns the last carry and the outputs, joined along their leading axis, [num_tokens, ...]. The last chunk is
    filled up with zeros; ``body`` must leave the carry alone for these (a zero gate does).
    """
    if size >= num_tokens:
        return body(carry, tokens)
    carry, out = jax.lax.scan(body, carry, _split(tokens, size))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_tokens], out)


def chosen_first(chosen: Bool[Array, " p"]) -> tuple[Int[Array, " p"], Int[Array, ""]]:
    """The places of the chosen, in their order, then the last place over and over; and how many are chosen."""
    p = chosen.size
    to = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, p)
    places = jnp.full(p, p - 1, jnp.int32).at[to].set(jnp.arange(p, dtype=jnp.int32), mode="drop")
    return places, jnp.sum(chosen, dtype=jnp.int32)


# XLA of earlier versions drops barriers before it fuses. Sums of rows and updates by rows, which are fast because of
# them, would be slower than plain ones there.
KEEPS_BARRIERS = jax.__version_info__ >= (0, 11, 1)

# Bytes of a table's rows that an update works on at a time, so that one pass finds in the cache what another wrote.
ROWS_BUDGET = 2**20


def update_by_rows(
    update: Callable[..., tuple[tuple[jax.Array, ...], jax.Array]], tables: tuple[jax.Array, ...], other: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """``tables, sums = update(*tables, other)``, where ``update`` is elementwise but for ``sums``, which add up.

    All arrays have N rows. On CPU, where XLA makes a pass over memory of nearly each operation, large
    tables are updated some rows at a time, and in place if the compiled function owns them.
    """
    n = other.shape[0] if other.ndim else 1
    rows = ROWS_BUDGET * n // max(1, other.nbytes)
    if jax.default_backend() != "cpu" or not KEEPS_BARRIERS or not 0 < rows < n:
        return update(*tables, other)

    def at(start: int | jax.Array, size: int, tables: tuple[jax.Array, ...]):
        # Cut out before any of them is written back: else XLA would copy a table, to read the old rows from.
        part = jax.lax.optimization_barrier([jax.lax.dynamic_slice_in_dim(a, start, size) for a in (*tables, other)])
        new, sums = jax.lax.optimization_barrier(update(*part))
        put = (jax.lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(tables, new, strict=True))
        return tuple(put), sums

    def body(index: jax.Array, carry):
        tables, sums = carry
        tables, more = at(index * rows, rows, tables)
        return tables, sums + more

    tables, sums = jax.lax.fori_loop(1, n // rows, body, at(0, rows, tables))
    if n % rows:
        tables, more = at(n - n % rows, n % rows, tables)
        sums = sums + more
    return tables, sums
