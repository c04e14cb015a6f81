"""Product-key memory, plain or with a gated output.

Sources: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242); gated, Berges et al. 2024,
"Memory Layers at Scale" (arXiv:2412.09764), section 3.1.4.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from peer_jax.fields import Placed
from peer_jax.layers.checks import check_flag, check_function, real_tokens
from peer_jax.layers.interface import Aux, DeviceLoad, Routing
from peer_jax.layers.linear import Linear
from peer_jax.layers.retrieval import ProductKeyRetrieval, initial_table
from peer_jax.layers.touched import retrieved
from peer_jax.ops import floor, traffic, value_bag
from peer_jax.ops.floor import Floor
from peer_jax.ops.traffic import Collectives


class PKM(ProductKeyRetrieval):
    """m = sum over heads and top-k of g_i v_i, over values retrieved by product keys.

    The output is m or, with ``gated=True`` as in Memory+, W_v (m * SiLU(W_g x)).

    The parameters are ``query_proj``, ``query_norm``, ``sub_keys``, ``values`` [N, d_model] and, if gated,
    ``gate_proj`` (W_g) and ``value_proj`` (W_v), which are initialised by ``projection_init``. The other arguments are
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
        gated: bool = False,
        implementation: Placed[str | None] = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        query_init: Initializer = nnx.initializers.xavier_uniform(),
        value_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_out", "normal"),
        projection_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
        rngs: nnx.Rngs,
    ) -> None:
        check_flag(gated=gated)
        check_function(value_init=value_init, projection_init=projection_init)
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
        self.values = initial_table(value_init, rngs.params(), (num_experts, d_model), param_dtype)
        self.gated = gated
        linear = functools.partial(
            Linear, d_model, d_model, dtype=dtype, param_dtype=param_dtype, kernel_init=projection_init, rngs=rngs
        )
        self.gate_proj = linear(("embed", "hidden")) if gated else None
        self.value_proj = linear(("hidden", "embed")) if gated else None

    def __call__(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens d"], Aux]:
        x, mask = real_tokens(self.name, x, mask, self.d_model)
        routing = self._route(x, mask, self.query_norm)
        return self.mix(x, routing), self._aux(routing, mask)

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"]:
        indices, values = retrieved(routing.indices, self.values)
        gates = routing.gates.astype(self.dtype or x.dtype)
        y = value_bag(values, indices, gates, implementation=self.implementation)
        return self.value_proj(y * jax.nn.silu(self.gate_proj(x))) if self.gated else y

    def expert_outputs(self, experts: Int[Array, " m"]) -> Float[Array, "m d"] | None:
        return None if self.gated else super().expert_outputs(experts)

    def rows_touched(self, tokens: int) -> int:
        return self._rows_touched(tokens)

    def flops_per_token(self, seq_len: int) -> float:
        projections = 2 * 2 * self.d_model**2 if self.gated else 0
        return self._retrieval_flops() + 2 * self.num_heads * self.top_k * self.d_model + projections

    def exchanged(self, load: DeviceLoad) -> Collectives:
        return self._exchanged(traffic.value_bag_step, load, gate_size=load.size)

    def floor(self, tokens: int, order: str, *, backward: bool, size: int, weight_size: int) -> Floor:
        sizes = tokens, self.num_heads * self.top_k, self.d_model, self.num_experts, order
        least = self._retrieval_floor(tokens, backward=backward, size=size, weight_size=weight_size)
        least += floor.value_bag(*sizes, size=size, row_size=weight_size)
        if backward:
            least += floor.value_bag_backward(*sizes, size=size, row_size=weight_size)
        for _ in (self.gate_proj, self.value_proj) if self.gated else ():
            least += floor.linear_passes(
                tokens, self.d_model, self.d_model, backward=backward, size=size, weight_size=weight_size
            )
        return least
