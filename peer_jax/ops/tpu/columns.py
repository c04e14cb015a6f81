"""Pallas kernels for TPUs: top k of every column of a matrix, and its columns from a few of their elements.

Without them, the compiler of TPUs sorts whole columns for ``jax.lax.top_k``, and all indices of a scatter.

n  elements per column     m  columns
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.keys import nan_alone, of_rank, rank_of

# Columns that a kernel holds at a time, the lanes of a TPU; rows that it compares at a time, and how often before its
# loop turns; the longest column that fits its fast memory; and the highest k for which k passes are taken to be faster
# than a sort.
LANES, SLICE, UNROLLED, LONGEST, MOST = 128, 32, 32, 8192, 64
SPREAD = 128  # rows that are spread at a time
_LOWEST = -(2**31)  # below the rank of any number


def is_faster(n: int, k: int) -> bool:
    """Whether the kernels can run, and are taken to be faster than a sort."""
    return n <= LONGEST and k <= MOST


def top_k_columns(
    x: Float[Array, "n m"], k: int, *, interpret: bool = False
) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """Takes the highest element of all columns k times; ``interpret`` simulates the kernel on CPU.

    NaN ranks first, and a column whose highest value is NaN has NaN alone; -0 ranks below 0; equal values rank by
    lower place.
    """
    # Imported here, because Pallas takes a second to import and other devices need none of it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    n, m = x.shape
    width, size = min(m, LANES), min(-(-n // 8) * 8, SLICE)
    slices = pl.cdiv(n, size)

    def kernel(x_ref, values_ref, places_ref, ranks_ref):
        row = jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
        if slices * size > n:
            ranks_ref[pl.ds((slices - 1) * size, size), :] = jnp.full((size, width), _LOWEST)
        ranks_ref[:n, :] = rank_of(x_ref[...])

        def take(rank, taken):
            """Removes what was taken last, in row i of the slice ``taken[i]``, or nothing where that is -1; and takes
            the highest of what is left.
            """

            def compare(number, best):
                highest, slice_of = best
                here = pl.ds(pl.multiple_of(number * size, size), size)
                ranks = jnp.where(taken == number, _LOWEST, ranks_ref[here, :])
                ranks_ref[here, :] = ranks
                better = ranks > highest
                return jnp.where(better, ranks, highest), jnp.where(better, number, slice_of)

            start = jnp.full((size, width), _LOWEST), jnp.zeros((size, width), jnp.int32)
            highest, slice_of = jax.lax.fori_loop(0, slices, compare, start, unroll=min(slices, UNROLLED))
            highest_rank = jnp.max(highest, axis=0, keepdims=True)
            places = slice_of * size + row
            place = jnp.min(jnp.where(highest == highest_rank, places, n), axis=0, keepdims=True)
            values_ref[pl.ds(rank, 1), :] = of_rank(highest_rank)
            places_ref[pl.ds(rank, 1), :] = place
            return jnp.where(places == place, slice_of, -1)

        jax.lax.fori_loop(0, k, take, jnp.full((size, width), -1))

    found = pl.BlockSpec((k, width), lambda column: (0, column))
    values, places = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, width),),
        in_specs=[pl.BlockSpec((n, width), lambda column: (0, column))],
        out_specs=[found, found],
        out_shape=[jax.ShapeDtypeStruct((k, m), jnp.float32), jax.ShapeDtypeStruct((k, m), jnp.int32)],
        scratch_shapes=[pltpu.VMEM((slices * size, width), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="top_k_columns",
    )(x)
    return nan_alone(values), places


def spread_columns(
    x: Float[Array, "k m"], place: Int[Array, "k m"], n: int, *, interpret: bool = False
) -> Float[Array, "{n} m"]:
    """Adds ``x[i, j]`` at ``[place[i, j], j]``: every place is compared with all rows of its column."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    k, m = x.shape
    width, size = min(m, LANES), math.gcd(n, SPREAD)
    size = n if size % 8 else size  # rows of a TPU's registers are eight

    def kernel(x_ref, place_ref, spread_ref):
        row = jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
        at = [slice(i, i + 1) for i in range(k)]

        def spread(number, _):
            first = pl.multiple_of(number * size, size)
            rows = (jnp.where(place_ref[i, :] - first == row, x_ref[i, :], 0) for i in at)
            spread_ref[pl.ds(first, size), :] = sum(rows)

        jax.lax.fori_loop(0, n // size, spread, None)

    given = pl.BlockSpec((k, width), lambda column: (0, column))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, width),),
        in_specs=[given, given],
        out_specs=pl.BlockSpec((n, width), lambda column: (0, column)),
        out_shape=jax.ShapeDtypeStruct((n, m), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="spread_columns",
    )(x, place)
