"""A stack of coarse experts, each an MLP, which MoE and Soft MoE share.

b  batch     s  sequence     d  d_model     E  experts     C  rows that an expert gets from a sequence     f  d_ff
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax.layers.checks import check_choice, check_memory, check_sizes, initial, real_tokens
from peer_jax.layers.interface import ACTIVATIONS, GATED_ACTIVATIONS, DeviceLoad, FeedForward
from peer_jax.ops.traffic import Collectives
from peer_jax.sharding import constrain


class CoarseExperts(FeedForward):
    """The experts of a layer; a subclass says which rows each of them gets, and what becomes of their outputs.

    The parameters are, stacked along a first axis of E, ``up``, ``down`` and, if gated, ``gate``.
    """

    def _make_experts(
        self,
        d_model: int,
        num_experts: int,
        d_ff: int | None,
        activation: str,
        other_params: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the experts, unless they and ``other_params`` parameters of the layer don't fit into memory."""
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_sizes(d_ff=d_ff)
        check_choice("activation", activation, ACTIVATIONS | GATED_ACTIVATIONS)
        gated = activation in GATED_ACTIVATIONS
        num_params = other_params + num_experts * (3 if gated else 2) * d_model * d_ff
        check_memory(self.name, num_params, param_dtype, d_model=d_model, num_experts=num_experts, d_ff=d_ff)

        def kernels(d_in: int, d_out: int, *axes: str) -> nnx.Param:
            stacked = initial(kernel_init, rngs.params(), (num_experts, d_in, d_out), param_dtype)
            return nnx.Param(stacked, axes=("experts", *axes))

        self.num_experts, self.activation, self.dtype = num_experts, activation, dtype
        self.up = kernels(d_model, d_ff, "embed", "hidden")
        self.gate = kernels(d_model, d_ff, "embed", "hidden") if gated else None
        self.down = kernels(d_ff, d_model, "hidden", "embed")

    def _sequences(
        self, x: Float[Array, "*b s d"], mask: Bool[Array, "*b s"] | None
    ) -> tuple[Float[Array, "*b s d"], Bool[Array, "*b s"]]:
        """x and a mask, with zeros for padding."""
        x, mask = real_tokens(self.name, x, mask, self.up.shape[1], in_sequences=True)
        return x, jnp.ones(x.shape[:-1], bool) if mask is None else mask

    def _kernels(self) -> list[Array]:
        """Up, down and, if gated, gate: each [E, i, o], with widths i and o."""
        return [kernel[...] for kernel in (self.up, self.down, self.gate) if kernel is not None]

    def _mlp(
        self, product: Callable[[Array, Array], Array], rows: Array, up: Array, down: Array, gate: Array | None = None
    ) -> Array:
        """Every expert's MLP on the rows that ``product`` gives it."""
        hidden = product(rows, up)
        if gate is None:
            hidden = ACTIVATIONS[self.activation](hidden)
        else:
            hidden = GATED_ACTIVATIONS[self.activation](product(rows, gate)) * hidden
        return product(hidden, down)

    def _by_capacity(self, rows: Float[Array, "b E C d"], kernels: list[Array]) -> Float[Array, "b E C d"]:
        """Applies every expert's MLP to its C rows of each sequence.

        On a mesh an all-to-all brings the rows to the devices of their experts, and another one brings outputs back.
        """
        y = self._mlp(_capacity_product, constrain(rows, "group", "experts"), *kernels)
        return constrain(constrain(y, "group", "experts"), "batch")

    def options(self) -> dict[str, object]:
        _, d_model, d_ff = self.up.shape
        return super().options() | ({} if d_ff == 4 * d_model else {"d_ff": d_ff})

    def _expert_params(self) -> int:
        """Parameters of one expert."""
        kernels = (self.up, self.gate, self.down)
        return sum(math.prod(kernel.shape[1:]) for kernel in kernels if kernel is not None)

    def _sent(self, load: DeviceLoad, rows: float) -> Collectives:
        """Rows go to their experts and back once in each direction, and once more with remat."""
        return Collectives(all_to_all=(6 if load.remat else 4) * load.size * rows * self.up.shape[1])


def _capacity_product(rows: Float[Array, "b E C i"], kernels: Float[Array, "E i o"]) -> Float[Array, "b E C o"]:
    return jnp.einsum("beci,eio->beco", rows, kernels.astype(rows.dtype))


def as_batch(num_axes: int, *arrays: Array) -> list[Array]:
    """The arrays with their first ``num_axes`` axes, which may be none, as one axis."""
    return [a.reshape(math.prod(a.shape[:num_axes]), *a.shape[num_axes:]) for a in arrays]
