"""The rows of a table that a batch retrieves, and the place of each retrieved row among them.

t  tokens     r  rows per token     N  rows of the table     U  the most rows that the batch can touch
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Num


def touched_rows(indices: Int[Array, "..."], num_rows: int, most: int) -> tuple[Int[Array, " U"], Int[Array, "..."]]:
    """The different rows among ``indices``, ascending, and for each index its place among them.

    Args:
        indices: rows; they may repeat. One that is outside of the table has the place ``most``, which is as invalid.
        num_rows: N.
        most: U, at least the number of different rows. The rows are padded with numbers from N on, so that all of them
            are different and ascending, and a scatter drops what it would write to the padding.
    """
    flat = indices.reshape(-1)
    valid = (flat >= 0) & (flat < num_rows)
    used = jnp.zeros(num_rows, jnp.int32).at[jnp.where(valid, flat, num_rows)].set(1, mode="drop")
    rank = jnp.cumsum(used) - used
    slots = jnp.where(valid, rank.at[flat].get(mode="clip"), most)
    rows = jnp.arange(num_rows, num_rows + most, dtype=jnp.int32).at[slots].set(flat.astype(jnp.int32), mode="drop")
    return rows, slots.reshape(indices.shape)


def take_rows(table: Num[Array, "N d"], rows: Int[Array, " U"]) -> Num[Array, "U d"]:
    """The rows of the table; the padding of ``touched_rows`` stands for the last row."""
    return table.at[rows].get(mode="clip", indices_are_sorted=True)


def put_rows(table: Num[Array, "N d"], rows: Int[Array, " U"], values: Num[Array, "U d"]) -> Num[Array, "N d"]:
    """The table with other values in the rows, which ``touched_rows`` has made; nothing is written to the padding."""
    return table.at[rows].set(values, mode="drop", indices_are_sorted=True, unique_indices=True)
