"""The mean output of experts over the tokens that use them, for experts whose output has no fixed direction.

b  batch     s  sequence     h  heads     k  top-k     d  d_model     m  experts     N  experts of the layer
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from peer_jax.analysis.experts.passes import Passes, Seen, takes_routings
from peer_jax.layers import Routing


class MeanOutputs(NamedTuple):
    """The outputs of experts with a weight of 1, over all their uses.

    Attributes:
        directions: the mean output of each expert; zero for one that no token uses.
        norms: the mean of the norms of its outputs. It is the norm of the mean output if all outputs are the same.
    """

    directions: Float[np.ndarray, "m d"]
    norms: Float[np.ndarray, " m"]


def mean_outputs(passes: Passes, block: int, experts: Sequence[int]) -> MeanOutputs | None:
    """Runs the model over the rows once more, and the layer of a block on each token with each of these experts alone.

    None if the layer can't compute its output for another routing. What it puts out without any expert, as a shared
    expert does, is left out.
    """
    layer = passes.model.blocks[block].ffw
    if not takes_routings(layer, passes.model.d_model):
        return None
    graph, state = nnx.split(layer)
    numbers = jnp.asarray(experts, jnp.int32)
    totals = [np.zeros((len(experts), passes.model.d_model)), np.zeros(len(experts)), np.zeros(len(experts))]
    for own, _, seen in passes.batches(f"outputs of block {block}", {}):
        x, routing = seen[block]
        real = np.zeros(x.shape[:-1], bool)
        real[: len(own)] = own
        for total, more in zip(totals, _sums(graph, state, Seen(x, routing), real, numbers), strict=True):
            total += np.asarray(more, np.float64)
    outputs, norms, uses = totals
    uses = np.maximum(uses, 1)
    return MeanOutputs(outputs / uses[:, None], norms / uses)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    graph: nnx.GraphDef, state: nnx.State, seen: Seen, real: Bool[Array, "b s"], experts: Int[Array, " m"]
) -> tuple[Float[Array, "m d"], Float[Array, " m"], Float[Array, " m"]]:
    """The sum of the outputs of each expert over its uses, that of their norms, and how many they are."""
    layer = nnx.merge(graph, state)
    m, (x, (indices, gates)) = experts.size, seen
    x = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
    place = jnp.full(layer.num_experts, m).at[experts].set(jnp.arange(m))
    used = (gates > 0) & real[..., None, None]
    # The places of each token's experts among these, which come first; m stands for any other expert.
    places = jnp.sort(jnp.where(used, place[indices], m).reshape(*real.shape, -1), axis=-1)
    numbers = jnp.append(experts, 0)

    def with_one(at: Int[Array, "b s"], weight: Float[Array, "b s"]) -> Float[Array, "b s d"]:
        one = Routing(numbers[at][..., None, None], weight[..., None, None])
        return layer.mix(x, one).astype(jnp.float32)

    nothing = with_one(places[..., 0], jnp.zeros(real.shape))

    def add(turn: Int[Array, ""], sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = jax.lax.dynamic_index_in_dim(places, turn, axis=-1, keepdims=False)
        outputs = with_one(at, jnp.where(at < m, 1.0, 0.0)) - nothing
        more = outputs, jnp.linalg.norm(outputs, axis=-1), jnp.ones(at.shape)
        return jax.tree.map(lambda total, one: total.at[at].add(one), sums, more)

    zeros = jnp.zeros((m + 1, x.shape[-1])), jnp.zeros(m + 1), jnp.zeros(m + 1)
    turns = jnp.max(jnp.sum(places < m, axis=-1))  # MoE has one with top-1 routing, muMoE up to m
    return jax.tree.map(lambda total: total[:m], jax.lax.fori_loop(0, turns, add, zeros))
