"""The dense feed-forward layer: the baseline, and what a coarse expert is made of."""

import functools

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax.layers.checks import check_choice, check_layer, check_memory, check_sizes, real_tokens
from peer_jax.layers.interface import ACTIVATIONS, GATED_ACTIVATIONS, Aux, FeedForward
from peer_jax.layers.linear import Linear
from peer_jax.ops import floor
from peer_jax.ops.floor import Floor


class Dense(FeedForward):
    """Two-layer MLP without biases, ``act(x W_up) W_down``; gated, ``(act(x W_gate) * (x W_up)) W_down``.

    Gated variants: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202).

    Args:
        d_model: width of input and output.
        d_ff: hidden width; 4 * d_model if None.
        activation: "gelu", "relu" or "silu"; or "swiglu" or "geglu", which are gated and have 1.5 times as many
            parameters.
        dtype: type of the computation; the type of ``x`` if None.
        param_dtype: type of the parameters.
        kernel_init: initialiser of all kernels.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    variant_option = "activation"

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "gelu",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model)
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_sizes(d_ff=d_ff)
        check_choice("activation", activation, ACTIVATIONS | GATED_ACTIVATIONS)
        check_layer(dtype, param_dtype, rngs, kernel_init=kernel_init)
        kernels = 3 if activation in GATED_ACTIVATIONS else 2
        check_memory(self.name, kernels * d_model * d_ff, param_dtype, d_model=d_model, d_ff=d_ff)

        linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.activation = activation
        self.variant = None if activation == "gelu" else activation
        self.is_baseline = activation == "gelu" and d_ff == 4 * d_model
        self.up = linear(d_model, d_ff, ("embed", "hidden"))
        self.gate = linear(d_model, d_ff, ("embed", "hidden")) if activation in GATED_ACTIVATIONS else None
        self.down = linear(d_ff, d_model, ("hidden", "embed"))

    def __call__(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens d"], Aux]:
        x, _ = real_tokens(self.name, x, mask, self.up.in_features)
        if self.gate is None:
            hidden = ACTIVATIONS[self.activation](self.up(x))
        else:
            hidden = GATED_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(hidden), Aux(jnp.zeros(()), {})

    def options(self) -> dict[str, object]:
        d_ff = self.up.out_features
        return super().options() | ({} if d_ff == 4 * self.up.in_features else {"d_ff": d_ff})

    def flops_per_token(self, seq_len: int) -> float:
        return 2 * self.num_params()

    def floor(self, tokens: int, order: str, *, backward: bool, size: int, weight_size: int) -> Floor:
        products = (
            floor.linear_passes(
                tokens, linear.in_features, linear.out_features, backward=backward, size=size, weight_size=weight_size
            )
            for linear in (self.up, self.gate, self.down)
            if linear is not None
        )
        return sum(products, Floor(0, 0))
