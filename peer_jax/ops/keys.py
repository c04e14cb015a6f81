"""Integers that rank elements of a column by value, then by place, so that no two are equal.

The high half has the value's bits, changed such that they order as integers; the low half has the complement of the
place. NaN ranks first. All of this needs 64-bit types: callers enable them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int64

_PLACES = 2**32 - 1
_MAGNITUDE = 2**31 - 1


def key_of(x: Float[Array, "*shape"], place: Int[Array, "*#shape"]) -> Int64[Array, "*shape"]:
    """The keys of values at their places."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = jnp.where(jnp.isnan(x), jnp.int32(_MAGNITUDE), bits ^ ((bits >> 31) & jnp.int32(_MAGNITUDE)))
    return (ordered.astype(jnp.int64) << 32) | (jnp.int64(_PLACES) - place.astype(jnp.int64))


def place_of(key: Int64[Array, "*shape"]) -> Int[Array, "*shape"]:
    return (jnp.int64(_PLACES) - (key & jnp.int64(_PLACES))).astype(jnp.int32)


def value_of(key: Int64[Array, "k m"]) -> Float[Array, "k m"]:
    """The values of keys that are sorted with the highest first; all NaN for a column whose highest is NaN."""
    ordered = (key >> 32).astype(jnp.int32)
    x = jax.lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & jnp.int32(_MAGNITUDE)), jnp.float32)
    return jnp.where(jnp.isnan(x[:1]), jnp.float32(jnp.nan), x)
