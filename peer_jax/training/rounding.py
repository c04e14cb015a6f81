"""How parameters in bfloat16 are rounded after an update, of which they would often lose all to the nearest value.

The two remedies are those of Zamirai et al. 2020, "Revisiting BFloat16 Training" (arXiv:2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt16

FORMS = ("nearest", "stochastic", "compensated")


def stochastic(x: Float[Array, "*shape"], bits: UInt16[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """The value of bfloat16 below or above ``x``, by chance, such that its expectation is ``x``.

    Args:
        x: in float32, whose lower 16 bits are what bfloat16 lacks.
        bits: random, uniform.
    """
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)


def compensated(x: Float[Array, "*shape"], dtype: Any) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The value of ``dtype`` nearest to ``x``, and what it lacks, rounded in its turn.

    In bfloat16 their sum differs from ``x`` by at most 2^-17 of it. XLA may leave out a conversion to a smaller type
    and back, after which nothing would be lacking, but never ``reduce_precision``.
    """
    type_ = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, exponent_bits=type_.nexp, mantissa_bits=type_.nmant)
    return rounded.astype(dtype), (x - rounded).astype(dtype)


def random_bits(step: Array, place: int, shape: tuple[int, ...]) -> UInt16[Array, "..."]:
    """The bits for the parameter at ``place`` among all, which depend on nothing else but the step.

    Threefry makes the same bits for each element whatever devices the array is split over.
    """
    key = jax.random.fold_in(jax.random.key(place, impl="threefry2x32"), step)
    return jax.random.bits(key, shape, jnp.uint16)
