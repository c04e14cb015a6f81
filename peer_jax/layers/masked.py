"""Statistics over the real tokens of a batch: means of metrics, and batch-norm."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float


def mean_of_real(values: Float[Array, "*tokens"], mask: Bool[Array, "*tokens"] | None) -> Float[Array, ""]:
    """The mean over real tokens; zero if there are none."""
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    return jnp.sum(values, where=mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def batch_norm(
    norm: nnx.BatchNorm, values: Float[Array, "*tokens q"], mask: Bool[Array, "*tokens"] | None
) -> Float[Array, "*tokens q"]:
    """Batch-norm over the real tokens; a batch without real tokens leaves the running statistics as they are."""
    if not values.size:
        return values
    if mask is None:
        return norm(values)
    some = jnp.any(mask)
    before = norm.mean[...], norm.var[...]
    normed = norm(values, mask=(mask | ~some)[..., None])
    if not norm.use_running_average:
        for statistic, old in zip((norm.mean, norm.var), before, strict=True):
            statistic[...] = jnp.where(some, statistic[...], old)
    return normed
