"""Entmax with alpha 1.5: a softmax that gives small scores a weight of exactly zero.

Source: Peters et al. 2019, "Sparse Sequence-to-Sequence Models" (arXiv:1905.05702).

n  scores
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# At most 8 steps led to float32's rounding (and to 1e-12 in float64) in all that was tried: normal, uniform, geometric
# and clustered scores of all sizes, up to 95,000 of them.
STEPS = 12


def entmax15(scores: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """p_i = max(0, s_i / 2 - tau)^2 with the threshold tau for which the weights p of a row sum to one.

    A score of minus infinity has weight zero. A row with NaN, with plus infinity, or with no finite score has NaN.

    The gradient is that of the exact weights, in any mode and of any order.
    """
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # does not change p, and so no derivative
    # The largest weight is at most 1, so tau is at least -1: what lies below has weight zero wherever it lies.
    halves = jnp.maximum((scores - top) / 2, -1)
    return jnp.maximum(halves - _threshold(halves), 0) ** 2


@jax.custom_jvp
def _threshold(halves: Float[Array, "*b n"]) -> Float[Array, "*b 1"]:
    """tau with sum_i max(0, h_i - tau)^2 = 1, where the largest h_i is 0 and none is below -1.

    The norm of max(0, h - tau) is convex and falls with tau. From the left, Newton's method therefore never goes too
    far; where all h are equal, the norm is linear and one step is enough.
    """

    def step(_: Array, tau: Array) -> Array:
        kept = jnp.maximum(halves - tau, 0)
        norm = jnp.linalg.norm(kept, axis=-1, keepdims=True)
        # No step to the left, which only rounding could make.
        return tau + jnp.maximum(norm - 1, 0) * norm / jnp.sum(kept, axis=-1, keepdims=True)

    return jax.lax.fori_loop(0, STEPS, step, jnp.full_like(halves[..., :1], -1))


@_threshold.defjvp
def _threshold_jvp(primals, tangents):
    """The derivative of sum_i max(0, h_i - tau)^2 = 1: it moves tau by the mean of dh, weighted by max(0, h - tau)."""
    (halves,), (d_halves,) = primals, tangents
    tau = _threshold(halves)
    kept = jnp.maximum(halves - tau, 0)
    return tau, jnp.sum(kept * d_halves, axis=-1, keepdims=True) / jnp.sum(kept, axis=-1, keepdims=True)
