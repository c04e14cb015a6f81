"""Integers that rank elements of a column by value, then by place, so that no two are equal.

The high half has the rank of the value, an integer of 32 bits; the low half has the complement of the place. NaN ranks
first. Keys need 64-bit types, which callers enable; ranks don't, and serve within kernels too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int64

_PLACES = 2**32 - 1
HIGHEST = 2**31 - 1  # the rank of NaN, and the bits of a magnitude


def rank_of(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The bits of values, changed such that they order as integers do."""
    return jnp.where(jnp.isnan(x), HIGHEST, _turned(jax.lax.bitcast_convert_type(x, jnp.int32)))


def of_rank(rank: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values of ranks."""
    return jax.lax.bitcast_convert_type(_turned(rank), jnp.float32)


def _turned(bits: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The reverse of itself: the magnitude of negative numbers is counted the other way."""
    return bits ^ ((bits >> 31) & HIGHEST)


def key_of(x: Float[Array, "*shape"], place: Int[Array, "*#shape"]) -> Int64[Array, "*shape"]:
    """The keys of values at their places."""
    return (rank_of(x).astype(jnp.int64) << 32) | (jnp.int64(_PLACES) - place.astype(jnp.int64))


def place_of(key: Int64[Array, "*shape"]) -> Int[Array, "*shape"]:
    return (jnp.int64(_PLACES) - (key & jnp.int64(_PLACES))).astype(jnp.int32)


def value_of(key: Int64[Array, "k m"]) -> Float[Array, "k m"]:
    """The values of keys that are sorted with the highest first, see ``nan_alone``."""
    return nan_alone(of_rank((key >> 32).astype(jnp.int32)))


def nan_alone(x: Float[Array, "k m"]) -> Float[Array, "k m"]:
    """The values of each column, highest first; all NaN for a column whose highest is NaN."""
    return jnp.where(jnp.isnan(x[:1]), jnp.float32(jnp.nan), x)
