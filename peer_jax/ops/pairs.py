"""The (token, row) pairs of a batch as one list: sorted by row, or some of them chosen.

t  tokens     r  rows per token     d  row width     p  pairs, p = t * r
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The weights of the pairs, and the vectors, one per token, that are weighted.
Term = tuple[Float[Array, "t r"], Float[Array, "t d"]]


class SortedPairs(NamedTuple):
    """Rows in ascending order, and for each the number of its pair in the order of the tokens."""

    row: Int[Array, " p"]
    pair: Int[Array, " p"]


def sort_pairs(indices: Int[Array, "t r"]) -> SortedPairs:
    """Sorts the pairs by row. The sort is stable: a row's gradients always add up in the order of the tokens."""
    flat = indices.reshape(-1)
    row, pair = jax.lax.sort_key_val(flat, jnp.arange(flat.size, dtype=flat.dtype), is_stable=True)
    return SortedPairs(row, pair)


def chosen_first(chosen: Bool[Array, " p"]) -> tuple[Int[Array, " p"], Int[Array, ""]]:
    """The places of the chosen pairs in ascending order, padded with the last place; and how many are chosen."""
    p = chosen.size
    one = chosen.astype(jnp.int32)
    place, before = jnp.arange(p, dtype=jnp.int32), jnp.cumsum(one) - one
    # A place that is not chosen adds 0 where the next chosen one goes, so that the indices ascend: TPUs sort others.
    places = jnp.zeros(p, jnp.int32).at[before].add(jnp.where(chosen, place, 0), mode="drop", indices_are_sorted=True)
    count = jnp.sum(one)
    return jnp.where(place < count, places, p - 1), count


def with_zero_token(cotangents: Float[Array, "t d"]) -> Float[Array, "t+1 d"]:
    """Appends a token of zeros, which padding names: a weight of 0 would not cancel a NaN of a real token."""
    return jnp.pad(cotangents, ((0, 1), (0, 0)))
