"""Top k of every column of a matrix, and what goes with the places of the chosen.

n  elements per column     m  columns
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from peer_jax.ops.cpu import top_k as on_cpu
from peer_jax.ops.keys import key_of, place_of, value_of
from peer_jax.ops.tpu import columns as on_tpu
from peer_jax.sharding import may_run_kernels, target

# The most elements per column that a GPU is given to sort at once; and the highest k for which groups were checked on
# one. Their time was measured as a part of a training step (docs/performance.md).
SORTED = 64
MOST = 32


def top_k_columns(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """The k highest values of each column, highest first, and their places; equal values rank by lower place.

    1 <= k <= n. -0 ranks below 0. A column that has a NaN gives NaN values, at valid places.
    """
    ways = {}
    if is_for_tpu(x.shape[0], k) and x.size:
        ways["tpu"] = functools.partial(on_tpu.top_k_columns, k=k)
    cpu = on_cpu.by_tournament if on_cpu.is_faster(k, x.shape[1]) else plain
    cuda = by_groups if k <= MOST and x.shape[0] > SORTED else plain
    return jax.lax.platform_dependent(
        x, cpu=lambda x: cpu(x, k), cuda=lambda x: cuda(x, k), default=lambda x: plain(x, k), **ways
    )


def take_columns(x: Shaped[Array, "n m"], place: Int[Array, "k m"]) -> Shaped[Array, "k m"]:
    """``x[place[i, j], j]``; places must be in range. TPUs gather single elements slowly, so they compare all n."""
    if is_for_tpu(len(x), len(place)):
        return functools.reduce(lambda taken, i: jnp.where(place == i, x[i], taken), range(1, len(x)), x[:1])
    return jnp.take_along_axis(x, place, axis=0, mode="promise_in_bounds")


def spread_columns(x: Float[Array, "k m"], place: Int[Array, "k m"], n: int) -> Float[Array, "{n} m"]:
    """Adds ``x[i, j]`` at ``[place[i, j], j]``; places must be in range."""

    def scattered(x: Array, place: Array) -> Array:
        column = jnp.arange(x.shape[1])[:, None]
        return jnp.zeros((x.shape[1], n), x.dtype).at[column, place.T].add(x.T, mode="promise_in_bounds").T

    if not (is_for_tpu(n, len(x)) and x.size):
        return scattered(x, place)
    tpu = functools.partial(on_tpu.spread_columns, n=n)
    return jax.lax.platform_dependent(x, place, tpu=tpu, default=scattered)


def is_for_tpu(n: int, k: int) -> bool:
    """Whether the kernels of ``peer_jax.ops.tpu.columns`` are used for columns of n elements."""
    return target().platform == "tpu" and may_run_kernels() and on_tpu.is_faster(n, k)


def plain(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """``jax.lax.top_k``, which works on rows."""
    values, place = jax.lax.top_k(x.T, k)
    return values.T, place.T


def by_groups(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """Sorts the best elements of groups of neighbours, and goes on with the k best groups until few elements are left.

    Every one of the k best elements is in one of the k best groups: the best element of any other group, and so all of
    its elements, are behind the best of k groups. No more than ``SORTED`` elements, or 2 k, are sorted at once.
    """
    sorted_at_once = max(SORTED, 2 * k)
    with jax.enable_x64(True):
        keys = key_of(x.T, jnp.arange(x.shape[0], dtype=jnp.int32)[None])
        while keys.shape[1] > sorted_at_once:
            size = -(-keys.shape[1] // sorted_at_once)
            padding = (0, 0), (0, -keys.shape[1] % size)
            groups = jnp.pad(keys, padding, constant_values=jnp.iinfo(jnp.int64).min).reshape(len(keys), -1, size)
            number = jnp.broadcast_to(jnp.arange(groups.shape[1], dtype=jnp.int32), groups.shape[:2])
            _, best = jax.lax.sort((~groups.max(axis=2), number), dimension=1, is_stable=False, num_keys=1)
            chosen = jnp.take_along_axis(groups, best[:, :k, None], axis=1, mode="promise_in_bounds")
            keys = chosen.reshape(len(keys), -1)
        best = ~jax.lax.sort(~keys, dimension=1, is_stable=False)[:, :k].T
        return value_of(best), place_of(best)
