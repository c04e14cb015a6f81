"""Top k of every column of a matrix.

On CPU, ``jax.lax.top_k`` keeps a heap a row, one row after the other on one thread. Here whole rows of the matrix are
compared with each other, so that every comparison is a vector instruction and all threads share it: 2 to 4 times as
fast for k from 16 to 128 (docs/log.md). Elsewhere it is ``jax.lax.top_k``.

n  elements a column     m  columns     K  k rounded up to a power of two
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Values and their places in the column; sorting is by value, highest first, then by place.
Ranked = tuple[Float[Array, "*p m"], Int[Array, "*p m"]]

# Where the tournament wins: with fewer columns its vectors are mostly empty; higher k were not measured (docs/log.md).
FEWEST_COLUMNS = 64
MOST = 128


def top_k_columns(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """The k highest values of each column, highest first, and their places; equal values rank by lower place.

    1 <= k <= n. A column that has a NaN gives NaN values, at valid places.
    """
    on_cpu = _by_tournament if k <= MOST and x.shape[1] >= FEWEST_COLUMNS else _by_rows
    return jax.lax.platform_dependent(x, cpu=lambda x: on_cpu(x, k), default=lambda x: _by_rows(x, k))


def _by_rows(x: Float[Array, "n m"], k: int) -> Ranked:
    values, place = jax.lax.top_k(x.T, k)
    return values.T, place.T


def _by_tournament(x: Float[Array, "n m"], k: int) -> Ranked:
    n, m = x.shape
    K = 1 << (k - 1).bit_length()
    size = K
    while size < n:
        size *= 2
    # Behind all others, whatever their values are, so never among the k.
    padded = jnp.pad(x, ((0, size - n), (0, 0)), constant_values=-jnp.inf)
    values, place, largest = _tournament(_once(padded), K)
    missing = jnp.isnan(largest)  # a maximum spreads NaN, the sorting below may lose it
    return jnp.where(missing, jnp.nan, values[:k]), jnp.where(missing, 0, place[:k])


def _tournament(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"], Float[Array, "1 m"]]:
    """``_top_k`` for a power of two k and n = k * 2**i; and a maximum of each column, NaN if it has one.

    Neighbours play in pairs. The top k among the winners, found in the same way, and the losers of their pairs are
    the only ones who can be in the top k: any other is beaten by k winners.
    """
    n, m = x.shape
    if n == k:
        place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], x.shape)
        return *_sort((x, place)), jnp.max(x, axis=0, keepdims=True)
    pairs = x.reshape(n // 2, 2, m)
    _, pair, largest = _tournament(_once(jnp.maximum(pairs[:, 0], pairs[:, 1])), k)
    first, second = _once((_take(x, 2 * pair), _take(x, 2 * pair + 1)))
    second_wins = (second > first).astype(jnp.int32)
    winners = jnp.maximum(first, second), 2 * pair + second_wins
    losers = jnp.minimum(first, second), 2 * pair + 1 - second_wins
    return *_merge(winners, _sort(losers)), largest


def _once(arrays):
    """Has XLA keep these, instead of computing them again for each of their uses."""
    return jax.lax.optimization_barrier(arrays)


def _take(x: Float[Array, "n m"], place: Int[Array, "k m"]) -> Float[Array, "k m"]:
    return jnp.take_along_axis(x, place, axis=0, mode="promise_in_bounds")


def _compare(a: Ranked, b: Ranked) -> tuple[Ranked, Ranked]:
    """Elementwise the one that ranks first, and the other."""
    first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
    return (
        (jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])),
        (jnp.where(first, b[0], a[0]), jnp.where(first, b[1], a[1])),
    )


def _merge(a: Ranked, b: Ranked) -> Ranked:
    """The first p of two sorted lists of p elements a column."""
    best, _ = _compare(a, (b[0][::-1], b[1][::-1]))  # the best p of both, in a bitonic order
    return _sort_bitonic(_once(best), a[0].shape[0])


def _sort(a: Ranked) -> Ranked:
    """Batcher's bitonic sort of p elements a column, p a power of two: runs of 2, 4, ... p are merged from halves."""
    p = a[0].shape[0]
    run = 2
    while run <= p:
        values, place = (x.reshape(p // run, 2, run // 2, -1) for x in a)
        low, high = (values[:, 0], place[:, 0]), (values[:, 1, ::-1], place[:, 1, ::-1])
        a = tuple(jnp.stack(both, 1).reshape(p, -1) for both in zip(*_compare(low, high), strict=True))
        a = _once(_sort_bitonic(a, run // 2))
        run *= 2
    return a


def _sort_bitonic(a: Ranked, run: int) -> Ranked:
    """Sorts every run of a column, each in a bitonic order: compares elements half a run apart, then a quarter, ..."""
    p = a[0].shape[0]
    while run > 1:
        values, place = (x.reshape(p // run, 2, run // 2, -1) for x in a)
        low, high = (values[:, 0], place[:, 0]), (values[:, 1], place[:, 1])
        a = tuple(jnp.stack(both, 1).reshape(p, -1) for both in zip(*_compare(low, high), strict=True))
        run //= 2
    return a
