"""The bytes that the kernels ask of memory, whether a cache serves them or not: what a block copies, for all blocks.

Scalars that the kernels load (starts of rows, numbers of tokens) are not counted.

t  tokens     r  rows per token     d  row width     N  rows of a table     s  starts of rows or pieces
"""

import numpy as np
from jaxtyping import Array, Int

from peer_jax.ops.mosaic_gpu import tables, tokens

FLOAT = 4  # bytes of an index, a gate, a dot product, and an element of a piece's sum
WEIGHTS = 16  # bytes of a pair's weights in ``tables``


def mix_tokens(t: int, r: int, d: int, *, read: int = 0, write: int = 0, x: int = 0, y: int = 0) -> tuple[int, int]:
    """Bytes that ``tokens.mix_tokens`` reads and writes.

    Args:
        read: bytes of an element of this table, or 0 if there is none; likewise ``write``, ``x`` and ``y``.
    """
    padded = r + -r % tokens.WARPS
    reads = FLOAT * padded * (2 if y else 1) + d * x + padded * d * (read + write)
    return t * reads, t * ((FLOAT * padded if x else 0) + d * y)


def sum_pairs(
    indices: Int[Array, "t r"], num_rows: int, d: int, cotangents: list[int], sums: list[int]
) -> dict[str, tuple[int, int]]:
    """Bytes that the kernels of ``tables.sum_pairs`` read and write, by the kernels' names.

    Args:
        cotangents: bytes of an element of each of the cotangents; likewise ``sums`` of the tables that are made.
    """
    pairs = tables.sort_by_row(indices, num_rows)
    per_pair = WEIGHTS + d * sum(cotangents)
    rows = per_pair * _fetched(np.asarray(pairs.starts))
    written = num_rows * d * sum(sums)
    if pairs.pieces is None:
        return {"sum_rows": (rows, written)}
    pieces = np.asarray(pairs.pieces)
    of_piece = d * FLOAT * len(sums)
    added = int(pairs.row_pieces[-1] - pairs.row_pieces[0])
    return {
        "sum_pieces": (per_pair * _fetched(pieces), of_piece * (len(pieces) - 1)),
        "sum_rows": (rows + of_piece * added, written),
    }


def _fetched(starts: Int[np.ndarray, " s"]) -> int:
    """Pairs that all blocks fetch; each fetches whole stages of its ring."""
    owned = tables.rows_of_block(len(starts) - 1)
    of_blocks = np.diff(starts[np.minimum(np.arange(0, len(starts) - 1 + owned, owned), len(starts) - 1)])
    return int(np.sum(of_blocks + -of_blocks % tables.PAIRS, dtype=np.int64))
