"""Top k of every column of a matrix by a tournament.

``jax.lax.top_k`` on CPU keeps a heap per row, and works on one row after the other on one thread. Here whole rows of
the matrix are compared with each other, so that every comparison is a vector instruction and all threads share the
work: 5 times as fast for the top 16 of 512 (docs/log.md).

n  elements per column     m  columns     K  k rounded up to a power of two
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int64

from peer_jax.ops.keys import key_of, place_of, value_of

# With fewer columns the tournament's vectors are mostly empty; a higher k was not measured (docs/log.md).
FEWEST_COLUMNS = 64
MOST = 128


def is_faster(k: int, m: int) -> bool:
    """Whether the tournament beats ``jax.lax.top_k`` for m columns."""
    return k <= MOST and m >= FEWEST_COLUMNS


def by_tournament(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """Neighbours are compared in pairs, the winners again in pairs, until K are left, which are sorted.

    Then the rounds are replayed backwards. The top K of a round must be among the top K of the next round (the winners)
    and the values that these winners beat: any other value lost to a winner that is itself below K others.
    """
    K = 1 << (k - 1).bit_length()
    size = K
    while size < x.shape[0]:
        size *= 2
    # The padding has the highest places, so it ranks behind all real elements, even behind those of -inf.
    x = _once(jnp.pad(x, ((0, size - x.shape[0]), (0, 0)), constant_values=-jnp.inf))
    with jax.enable_x64(True):
        rounds = [key_of(x, jnp.arange(size, dtype=jnp.int32)[:, None])]
        while rounds[-1].shape[0] > K:
            pairs = rounds[-1].reshape(-1, 2, x.shape[1])
            rounds.append(_once(jnp.maximum(pairs[:, 0], pairs[:, 1])))
        best = _sort(rounds.pop())
        while rounds:
            beaten = (place_of(best) >> len(rounds) - 1) ^ 1
            # The first round keeps values instead of keys, which are twice as large.
            losers = _take(rounds[-1], beaten) if len(rounds) > 1 else key_of(_take(x, beaten), beaten)
            rounds.pop()
            best = _merge(best, _sort(_once(losers)))
        return value_of(best[:k]), place_of(best[:k])


def _take(a: Array, place: Int[Array, "k m"]) -> Array:
    return jnp.take_along_axis(a, place, axis=0, mode="promise_in_bounds")


def _once(a: Array) -> Array:
    """Makes XLA store ``a`` instead of computing it again for each of its uses."""
    return jax.lax.optimization_barrier(a)


def _merge(a: Int64[Array, "p m"], b: Int64[Array, "p m"]) -> Int64[Array, "p m"]:
    """The first p of two sorted lists of p keys per column."""
    return _sort_bitonic(_once(jnp.maximum(a, b[::-1])), a.shape[0])  # the best p of both, in bitonic order


def _sort(a: Int64[Array, "p m"]) -> Int64[Array, "p m"]:
    """Batcher's bitonic sort of p keys per column, p a power of two: runs of 2, 4, ... p are merged from halves."""
    run = 2
    while run <= a.shape[0]:
        first, second = _halves(a, run)
        a = _sort_bitonic(_compare(first, second[:, ::-1]), run // 2)
        run *= 2
    return a


def _sort_bitonic(a: Int64[Array, "p m"], run: int) -> Int64[Array, "p m"]:
    """Sorts runs that are in bitonic order: compares keys that are half a run apart, then a quarter, and so on."""
    while run > 1:
        a = _compare(*_halves(a, run))
        run //= 2
    return a


def _halves(a: Int64[Array, "p m"], run: int) -> tuple[Array, Array]:
    runs = a.reshape(a.shape[0] // run, 2, run // 2, -1)
    return runs[:, 0], runs[:, 1]


def _compare(first: Array, second: Array) -> Int64[Array, "p m"]:
    """Puts the larger key of each pair first and the smaller one second."""
    both = jnp.stack([jnp.maximum(first, second), jnp.minimum(first, second)], axis=1)
    return _once(both.reshape(-1, both.shape[-1]))
