"""Rounding of updated parameters to a smaller type, such that no update is lost.

It is the Kahan summation of Zamirai et al. 2020, "Revisiting BFloat16 Training" (arXiv:2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORMS = ("compensated", "nearest")


def compensated(x: Float[Array, "*shape"], dtype: Any) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The value of ``dtype`` nearest to ``x``, and what it lacks, rounded in its turn.

    In bfloat16 their sum differs from ``x`` by at most 2^-17 of it. XLA may leave out a conversion to a smaller type
    and back, after which nothing would be lacking, but never ``reduce_precision``.
    """
    type_ = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, exponent_bits=type_.nexp, mantissa_bits=type_.nmant)
    return rounded.astype(dtype), (x - rounded).astype(dtype)
