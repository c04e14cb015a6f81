"""The rows of a table that a batch retrieves, and the place of each retrieved row among them.

On many devices, a table that is split by rows has such rows in each of its parts, E of them, and U is the most that a
batch can touch in one part. They are numbered within the part. Any other table is one part, which every device has, or
has some columns of; E is then 1.

t  tokens     r  rows per token     N  rows of a part     U  the most rows of a part that the batch can touch
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from peer_jax.ops.sharded import TOKENS, gather, scatter_sum
from peer_jax.sharding import AXES, EXPERT, current, mesh_axes, on_each_device, parts_of, spec_of


def compact_size(num_rows: int, most: int, parts: int, share: float = 1.0) -> int:
    """E * U, the rows of the compact tables of all parts: room for a share of what a batch could touch.

    Args:
        num_rows: rows of the whole table, N * E.
        most: the most rows of the table that a batch can touch.
        parts: E.
        share: the share of min(N, most) for which there is room in each part.
    """
    return parts * math.ceil(share * min(num_rows // parts, most))


def touched_rows(
    indices: Int[Array, "..."], num_rows: int, most: int, copies: tuple[str, ...] = ()
) -> tuple[Int[Array, " U"], Int[Array, "..."]]:
    """The different rows of a part among ``indices``, ascending, and for each index its place among them.

    Args:
        indices: rows; they may repeat. One that is outside of the part has the place ``most``, which is as invalid.
        num_rows: N.
        most: U, the number of rows returned. They are padded with numbers from N on, so that all of them are different
            and ascending, and a scatter drops what it would write to the padding. Where there is no room for all
            different rows, the last ones are left out, and their places are from ``most`` on.
        copies: within ``on_each_device``, the mesh axes along which devices have the same part, but other indices. The
            rows are then those of all their indices.
    """
    flat = indices.reshape(-1)
    valid = (flat >= 0) & (flat < num_rows)
    used = jnp.zeros(num_rows, jnp.int32).at[jnp.where(valid, flat, num_rows)].set(1, mode="drop")
    if copies:
        used = jax.lax.pmax(used.astype(jnp.int8), copies).astype(jnp.int32)
    rank = jnp.cumsum(used) - used
    slots = jnp.where(valid, rank.at[flat].get(mode="clip"), most)
    rows = jnp.arange(num_rows, num_rows + most, dtype=jnp.int32).at[slots].set(flat.astype(jnp.int32), mode="drop")
    if copies:  # each row has been written by the devices that have it, and any number of padding is larger
        rows = jax.lax.pmin(rows, copies)
    return rows, slots.reshape(indices.shape)


def touched_by_all(
    indices: Int[Array, "*tokens h k"], num_rows: int, most: int
) -> tuple[Int[Array, " rows"], Int[Array, "*tokens h k"]]:
    """``touched_rows`` of all parts of a table, by the tokens of all devices.

    Args:
        indices: rows of the whole table.
        num_rows: rows of the whole table, N * E.
        most: the number of rows returned, U * E, those of one part after those of another. The places count them all.
    """
    parts, placement = parts_of("rows"), current()
    held = mesh_axes(spec_of("rows"))
    copies = () if placement is None else tuple(a for a in AXES if a not in held and placement.size(a) > 1)

    def on_device(indices):
        if parts == 1:
            return touched_rows(indices, num_rows, most, copies)
        N, U, part = num_rows // parts, most // parts, jax.lax.axis_index(EXPERT)
        rows, slots = touched_rows(gather(indices.reshape(-1)) - part * N, N, U, copies)
        # At most one part has the row of an index; without any, the sum is ``most``.
        slots = most + scatter_sum(jnp.where(slots < U, slots + part * U - most, 0))
        return rows, slots.reshape(indices.shape)

    return on_each_device(on_device, (TOKENS,), (spec_of("rows"), TOKENS))(indices)


def take_rows(table: Num[Array, "N d"], rows: Int[Array, " U"]) -> Num[Array, "U d"]:
    """The rows of the table; the padding of ``touched_rows`` stands for the last row."""
    return table.at[rows].get(mode="clip", indices_are_sorted=True)


def put_rows(table: Num[Array, "N d"], rows: Int[Array, " U"], values: Num[Array, "U d"]) -> Num[Array, "N d"]:
    """The table with other values in the rows, which ``touched_rows`` has made; nothing is written to the padding."""
    return table.at[rows].set(values, mode="drop", indices_are_sorted=True, unique_indices=True)
