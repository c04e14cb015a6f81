"""PEER: parameter-efficient expert retrieval, a layer of one-neuron experts.

Source: He 2024, "Mixture of A Million Experts" (arXiv:2407.04153).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax.fields import Placed
from peer_jax.layers.checks import check_choice, check_function, real_tokens
from peer_jax.layers.interface import ACTIVATIONS, Aux, DeviceLoad, Routing
from peer_jax.layers.retrieval import ProductKeyRetrieval, initial_table
from peer_jax.layers.touched import retrieved
from peer_jax.ops import expert_mix, floor, traffic
from peer_jax.ops.floor import Floor
from peer_jax.ops.traffic import FLOAT, Collectives

EXPERT_ACTIVATIONS = ACTIVATIONS | {"identity": lambda s: s}


class PEER(ProductKeyRetrieval):
    """y = sum over heads and top-k of g_i act(u_i . x) v_i, over experts retrieved by product keys.

    The defaults are the paper's; ``num_experts``, 1024**2 in the paper, has none. The parameters are ``query_proj``,
    ``query_norm``, ``sub_keys``, ``down`` [N, d_model] (rows u_i) and ``up`` [N, d_model] (rows v_i).

    Args:
        d_model: width of input and output.
        num_experts: N, a square.
        num_heads: h, independent queries; all heads share the experts.
        top_k: k, experts retrieved per head.
        d_key: width of a query; a sub-key is compared with one half of it.
        share_sub_keys: whether all heads share one set of sub-keys; each head has its own set otherwise.
        query_norm: "batch", "layer" (over each head's query), "qk" (over queries and sub-keys) or None.
        activation: activation of an expert: "gelu", "relu", "silu", or "identity" for experts of rank one without an
            activation, as the values of UltraMemV2 (arXiv:2508.18756, section 3.4) are.
        score_activation: "softmax" over the k scores of a head; "sigmoid" or "relu" are non-competing.
        implementation: implementation of the ops, see ``peer_jax.ops``; forward-mode derivatives (``jax.jvp``,
            ``jax.jacfwd``) need "reference".
        dtype: type of the computation; the type of ``x`` if None. The router is always float32.
        param_dtype: type of the parameters.
        query_init, down_init, up_init: initialisers.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    num_tables = 2
    outputs = "up"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_heads: int = 8,
        top_k: int = 16,
        d_key: int = 128,
        share_sub_keys: bool = True,
        query_norm: str | None = "batch",
        activation: str = "gelu",
        score_activation: str = "softmax",
        implementation: Placed[str | None] = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        query_init: Initializer = nnx.initializers.xavier_uniform(),
        down_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_out", "normal"),
        up_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_out", "normal"),
        rngs: nnx.Rngs,
    ) -> None:
        check_choice("activation", activation, EXPERT_ACTIVATIONS)
        check_function(down_init=down_init, up_init=up_init)
        super().__init__(
            d_model,
            num_experts,
            num_heads=num_heads,
            top_k=top_k,
            d_key=d_key,
            share_sub_keys=share_sub_keys,
            query_norm=query_norm,
            score_activation=score_activation,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            query_init=query_init,
            rngs=rngs,
        )
        self.activation = activation
        self.down = initial_table(down_init, rngs.params(), (num_experts, d_model), param_dtype)
        # One table is made after the other, so that both need the memory for random numbers in turn.
        _, key = jax.lax.optimization_barrier((self.down[...], rngs.params()))
        self.up = initial_table(up_init, key, (num_experts, d_model), param_dtype)

    def __call__(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens d"], Aux]:
        x, mask = real_tokens(self.name, x, mask, self.d_model)
        routing = self._route(x, mask, self.query_norm)
        return self.mix(x, routing), self._aux(routing, mask)

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"]:
        indices, down, up = retrieved(routing.indices, self.down, self.up)
        return expert_mix(
            x.astype(self.dtype or x.dtype),
            down,
            up,
            indices,
            routing.gates,
            EXPERT_ACTIVATIONS[self.activation],
            implementation=self.implementation,
        )

    def rows_touched(self, tokens: int) -> int:
        return self._rows_touched(tokens)

    def flops_per_token(self, seq_len: int) -> float:
        return self._retrieval_flops() + 4 * self.num_heads * self.top_k * self.d_model

    def exchanged(self, load: DeviceLoad) -> Collectives:
        return self._exchanged(traffic.expert_mix_step, load, gate_size=FLOAT)

    def floor(self, tokens: int, order: str, *, backward: bool, size: int, weight_size: int) -> Floor:
        sizes = tokens, self.num_heads * self.top_k, self.d_model, self.num_experts, order
        least = self._retrieval_floor(tokens, backward=backward, size=size, weight_size=weight_size)
        least += floor.expert_mix(*sizes, size=size, row_size=weight_size)
        if backward:
            least += floor.expert_mix_backward(*sizes, size=size, row_size=weight_size)
        return least
