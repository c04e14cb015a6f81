"""The kernel that works expert by expert: gradients of tables, where a row sums over the pairs that retrieved it.

t  tokens     r  rows per token     d  row width     N  rows of a table     p  pairs, p = t * r
s  starts of the rows, and the end of the last one, s = N + 1     e  starts of the pieces
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.mosaic_gpu.inline import interpreter
from peer_jax.ops.mosaic_gpu.ring import count_stages, pick
from peer_jax.ops.pairs import sort_pairs

PAIRS = 4  # per stage of the ring; each of four warps fetches one
OWNED = 16  # rows of a table per block: they have enough pairs to fill the ring several times ...
BLOCKS = 4096  # ... unless fewer blocks than this were left, which is several times what a GPU runs at once
PIECE = 1024  # the fewest pairs that are summed apart


def sum_pairs(
    indices: Int[Array, "t r"],
    num_rows: int,
    terms: list[tuple[Float[Array, "t r"], Float[Array, "t d"], Any]],
    interpret: Any,
) -> list[Float[Array, "{num_rows} d"]]:
    """One table for each term (weights, cotangents, dtype): row i sums weights[t, r] * cotangents[t] over its pairs.

    A pair whose index is ``num_rows`` belongs to no row.

    The pairs are sorted by row. A block owns consecutive rows of the tables, and hence consecutive pairs: the
    cotangents of their tokens come through one ring, whatever row they belong to. A sum stays in float32 registers,
    adds up in the order of the tokens and is written once; it is zero for a row that was not retrieved.

    If a row has many pairs, most of them are summed before, in pieces with a block each (``sort_by_row``). The block
    that owns the row then adds fewer than two pieces' pairs, and the sums of the other pieces. For large p, a piece has
    one to two times sqrt(p) pairs, so that no block adds up more than some 5 sqrt(p) vectors, even if all pairs have
    one row.

    Without atomics, and with an order of additions that depends on the indices alone, the result is deterministic.
    """
    pairs = sort_by_row(indices, num_rows)
    # The weights of a pair are next to each other, padded to 16 bytes, the least that a bulk copy takes.
    weights = jnp.stack([weights.reshape(-1)[pairs.pair] for weights, _, _ in terms], axis=-1)
    weights = jnp.pad(weights, ((0, 0), (0, 4 - len(terms))))
    tokens, cotangents = pairs.pair // indices.shape[1], [cotangents for _, cotangents, _ in terms]
    sums = functools.partial(_sums, tokens, weights, cotangents, interpret=interpret)
    apart = []
    if pairs.pieces is not None:
        apart = [pairs.row_pieces, *sums("sum_pieces", pairs.pieces, [], [jnp.float32] * len(terms))]
    return sums("sum_rows", pairs.starts, apart, [dtype for _, _, dtype in terms])


class Sorted(NamedTuple):
    """The pairs sorted by row and cut into pieces; the pieces that are summed apart have been moved to the end.

    These are the pieces in which all pairs have the same row, so that a row has fewer than two pieces' other pairs.

    Attributes:
        pair: the pairs in this order.
        starts: where the pairs of each row start that are not summed apart.
        pieces: where the pairs of each piece start; the pieces that are not summed apart are empty. None if there are
            too few pairs to be cut.
        row_pieces: the first piece of each row.
    """

    pair: Int[Array, " p"]
    starts: Int[Array, " s"]
    pieces: Int[Array, " e"] | None = None
    row_pieces: Int[Array, " s"] | None = None


def sort_by_row(indices: Int[Array, "t r"], num_rows: int) -> Sorted:
    """Sorts the pairs, and finds the pieces that are summed apart."""
    pairs = sort_pairs(indices)
    rows = jnp.arange(num_rows + 1, dtype=pairs.row.dtype)
    starts = jnp.searchsorted(pairs.row, rows, method="scan_unrolled").astype(jnp.int32)  # as one kernel
    size = max(PIECE, 2 ** ((indices.size.bit_length() + 1) // 2))
    if indices.size <= size:
        return Sorted(pairs.pair, starts)
    padding = (0, -indices.size % size)
    row = jnp.pad(pairs.row, padding, constant_values=num_rows).reshape(-1, size)
    apart = (row[:, 0] == row[:, -1]) & (row[:, 0] < num_rows)
    before = jnp.pad(jnp.cumsum(apart, dtype=jnp.int32), (1, 0))
    first = len(apart) - before[-1]
    pair = jnp.pad(pairs.pair, padding).reshape(-1, size)[jnp.argsort(apart, stable=True)].reshape(-1)
    earlier = before[starts // size]  # a piece within which a row starts is not among them
    pieces = size * jnp.maximum(jnp.arange(len(apart) + 1, dtype=jnp.int32), first)
    return Sorted(pair, starts - size * earlier, pieces, first + earlier)


def rows_of_block(num_rows: int) -> int:
    """How many consecutive rows a block owns."""
    return max(1, min(OWNED, num_rows // BLOCKS))


def _sums(
    tokens: Int[Array, " p"],
    weights: Float[Array, "p 4"],
    cotangents: list[Float[Array, "t d"]],
    name: str,
    starts: Int[Array, " s"],
    apart: list[Array],
    dtypes: list[Any],
    *,
    interpret: Any,
) -> list[Float[Array, "N d"]]:
    """For each of the cotangents, the weighted sum over the pairs of each row, ``starts[i]`` to ``starts[i + 1]``.

    ``apart`` is empty, or holds the first piece of each row, and for each of the cotangents the sums of the pieces,
    which are added.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, number, d = starts.size - 1, len(cotangents), cotangents[0].shape[1]
    owned = rows_of_block(num_rows)
    stages = count_stages(PAIRS * (16 + d * sum(c.dtype.itemsize for c in cotangents)), -(-tokens.size // PAIRS))
    # The warps split a row such that each lane has at least two neighbouring elements. If the row is too narrow for
    # that, several warps compute the same elements.
    vector = 4 if d % 512 == 0 else 2
    splitting = 4 if d % 256 == 0 else 2 if d % 128 == 0 else 1
    tiling = plgpu.Tiling(tuple((n,) for n in (splitting * 32 * vector, 32 * vector, vector)[splitting == 1 :]))
    warps = {1: (plgpu.Replicated(4),), 2: (plgpu.Replicated(2), -3), 4: (-3,)}[splitting]
    layout = plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=(-2,), vector_dim=-1)
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def kernel(*refs):
        refs = iter(refs)
        starts, tokens, weights, *cotangents = itertools.islice(refs, 3 + number)
        row_pieces, *pieces = itertools.islice(refs, 1 + number) if apart else [None]
        tables = list(itertools.islice(refs, number))
        *rings, weights_ring, full = refs
        first = jax.lax.axis_index("block") * owned
        last = jnp.minimum(first + owned, num_rows)
        begin, end = starts[first], starts[last]

        def fetch(first_pair, stage):
            @pl.when(first_pair < end)
            def _():
                # The barrier waits for all copies, so where there are no more pairs the last one is copied again.
                four = [jnp.minimum(first_pair + warp, end - 1) for warp in range(PAIRS)]
                four_tokens = [tokens[pair] for pair in four]

                @plgpu.warp_map
                def _(warp):
                    pair, token = pick(four, warp), pick(four_tokens, warp)
                    copy(weights.at[pair], weights_ring.at[stage, warp], full.at[stage])
                    for cotangent, ring in zip(cotangents, rings, strict=True):
                        copy(cotangent.at[token], ring.at[stage, warp], full.at[stage])

        for stage in range(stages):
            fetch(begin + stage * PAIRS, stage)

        def add_pair(pair, sums):
            place = jax.lax.rem(pair - begin, stages * PAIRS)
            stage, i = jax.lax.div(place, PAIRS), jax.lax.rem(place, PAIRS)

            @pl.when(i == 0)
            def _():
                plgpu.barrier_wait(full.at[stage])

            sums = tuple(
                total
                + jax.lax.broadcast_in_dim(weights_ring[stage, i, term], (d,), ())
                * plgpu.load(ring.at[stage, i], layout=layout).astype(jnp.float32)
                for term, (total, ring) in enumerate(zip(sums, rings, strict=True))
            )

            @pl.when(i == PAIRS - 1)
            def _():
                plgpu.commit_smem()  # every warp has read its part
                fetch(pair + 1 + (stages - 1) * PAIRS, stage)

            return sums

        def add_piece(i, sums):
            return tuple(
                total + plgpu.load(piece.at[i], layout=layout, optimized=False)
                for total, piece in zip(sums, pieces, strict=True)
            )

        def add_row(row, _):
            zero = plgpu.layout_cast(jnp.zeros((d,), jnp.float32), layout)
            sums = jax.lax.fori_loop(starts[row], starts[row + 1], add_pair, (zero,) * number)
            if apart:
                sums = jax.lax.fori_loop(row_pieces[row], row_pieces[row + 1], add_piece, sums)
            for table, total in zip(tables, sums, strict=True):
                table[row] = total.astype(table.dtype)

        jax.lax.fori_loop(first, last, add_row, None)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((num_rows, d), dtype) for dtype in dtypes],
        scratch_types=[
            *(plgpu.SMEM((stages, PAIRS, d), c.dtype) for c in cotangents),
            plgpu.SMEM((stages, PAIRS, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=PAIRS * (1 + number), num_barriers=stages),
        ],
        grid=(pl.cdiv(num_rows, owned),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
        interpret=interpreter(interpret),
    )(starts, tokens, weights, *cotangents, *apart)
