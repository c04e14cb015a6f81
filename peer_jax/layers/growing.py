"""What a layer with a larger pool of experts takes over from one with a smaller pool.

N  experts     n  sub-keys in a half, N = n * n     c  d_key / 2
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peer_jax.layers.interface import FeedForward, Table

# The share of the mean of two old sub-keys that a new one is; docs/growing.md has what was measured.
SHRINKING = 0.75


def take_over(layer: FeedForward, smaller: FeedForward) -> None:
    """Gives a layer all variables of one that differs in nothing but a smaller ``num_experts``.

    What the layer has beyond that stays as it is: the rows of new experts, for example.
    """
    before = dict(nnx.to_flat_state(nnx.state(smaller)))

    def taken(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        old, new = before[path].get_value(), variable.get_value()
        return variable.replace(placed(layer, smaller.num_experts, variable, old, new))

    nnx.update(layer, nnx.map_state(taken, nnx.state(layer)))


def placed(layer: FeedForward, num_experts: int, variable: nnx.Variable, before: Array, after: Array) -> Array:
    """``after`` with the elements of ``before`` where they belong in a larger pool.

    Args:
        layer: the layer with the larger pool.
        num_experts: N of the smaller pool.
        variable: the parameter that both arrays belong to, or that they are moments of.
        before: an array of the smaller layer. The rows of a table are those of the experts in their order; any other
            array is longer in ``after`` along some axes, and its elements come first there.
        after: the array of the larger layer.
    """
    if before.shape == after.shape:
        return before
    if not isinstance(variable, Table):
        return jax.lax.dynamic_update_slice(after, before.astype(after.dtype), (0,) * after.ndim)
    there = layer.were_there(jnp.arange(after.shape[0]), num_experts)
    return after.at[jnp.flatnonzero(there, size=before.shape[0])].set(before.astype(after.dtype))


def sub_keys_between(sub_keys: Float[Array, "*sets n c"], more: int) -> Float[Array, "*sets more c"]:
    """New sub-keys that refine the old ones and hardly displace them.

    New sub-key m = r n + p, counted from 0, lies between two old ones, q = (p + 1 + r) mod n being the other::

        new_m = SHRINKING * (old_p + old_q) / 2

    Its score is that share of the mean of the two scores. Where it is positive, as the k highest scores of a half are
    unless k is near n, one of the two old sub-keys scores more: the old sub-key that scores highest stays first, and a
    new one is retrieved only beside one of those which it lies between. The order among the old sub-keys is that of
    their own scores, as before.
    """
    n = sub_keys.shape[-2]
    p, r = jnp.arange(more) % n, jnp.arange(more) // n
    first, second = (jnp.take(sub_keys, at, axis=-2) for at in (p, (p + 1 + r) % n))
    return (SHRINKING / 2) * (first + second)
