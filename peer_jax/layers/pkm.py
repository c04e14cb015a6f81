"""Product-key memory.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242).
"""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax.fields import Placed
from peer_jax.layers.checks import check_function, initial, real_tokens
from peer_jax.layers.interface import TABLE_AXES, Aux, DeviceLoad, Routing, Table
from peer_jax.layers.retrieval import ProductKeyRetrieval
from peer_jax.layers.touched import retrieved
from peer_jax.ops import floor, traffic, value_bag
from peer_jax.ops.floor import Floor
from peer_jax.ops.traffic import Collectives


class PKM(ProductKeyRetrieval):
    """y = sum over heads and top-k of g_i v_i, over values retrieved by product keys.

    The parameters are ``query_proj``, ``query_norm``, ``sub_keys`` and ``values`` [N, d_model]. The arguments are
    those of ``PEER``; ``top_k`` is 32 by default, as in the PEER paper's baseline.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    outputs = "values"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_heads: int = 8,
        top_k: int = 32,
        d_key: int = 128,
        share_sub_keys: bool = True,
        query_norm: str | None = "batch",
        score_activation: str = "softmax",
        implementation: Placed[str | None] = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        query_init: Initializer = nnx.initializers.xavier_uniform(),
        value_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_out", "normal"),
        rngs: nnx.Rngs,
    ) -> None:
        check_function(value_init=value_init)
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
        self.values = Table(initial(value_init, rngs.params(), (num_experts, d_model), param_dtype), axes=TABLE_AXES)

    def __call__(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens d"], Aux]:
        x, mask = real_tokens(self.name, x, mask, self.d_model)
        routing = self._route(x, mask, self.query_norm)
        return self.mix(x, routing), self._aux(routing, mask)

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"]:
        indices, values = retrieved(routing.indices, self.values)
        gates = routing.gates.astype(self.dtype or x.dtype)
        return value_bag(values, indices, gates, implementation=self.implementation)

    def rows_touched(self, tokens: int) -> int:
        return self._rows_touched(tokens)

    def flops_per_token(self, seq_len: int) -> float:
        return self._retrieval_flops() + 2 * self.num_heads * self.top_k * self.d_model

    def exchanged(self, load: DeviceLoad) -> Collectives:
        return self._exchanged(traffic.value_bag_step, load, gate_size=load.size)

    def floor(self, tokens: int, order: str, *, backward: bool, size: int, weight_size: int) -> Floor:
        sizes = tokens, self.num_heads * self.top_k, self.d_model, self.num_experts, order
        least = self._retrieval_floor(tokens, backward=backward, size=size, weight_size=weight_size)
        least += floor.value_bag(*sizes, size=size, row_size=weight_size)
        if backward:
            least += floor.value_bag_backward(*sizes, size=size, row_size=weight_size)
        return least
