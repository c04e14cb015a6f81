"""Soft mixture of experts: every expert computes slots, which are averages of all tokens of a sequence.

Source: Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts" (arXiv:2308.00951). The paper's pseudocode and
its public code (``vmoe/projects/soft_moe/router.py`` of google-research/vmoe) agree.

b  batch     s  sequence     d  d_model     E  experts     p  slots of an expert     f  d_ff
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax.layers.checks import check_layer, check_sizes, initial
from peer_jax.layers.experts import CoarseExperts, as_batch
from peer_jax.layers.interface import Aux, Benchmark, DeviceLoad
from peer_jax.layers.masked import mean_of_real
from peer_jax.ops.traffic import Collectives
from peer_jax.sharding import automatic, constrain, split_of

EPSILON = 1e-6  # added to squared lengths
EXCLUDED = -1e30  # a logit whose weight is zero beside any other, and which is finite where there is no other


class SoftMoE(CoarseExperts):
    """y_t = sum_j C_tj f(sum_s D_sj x_s) over all slots j, where f is the MLP of the expert that has the slot.

    The logit of token and slot is scale * (x / |x|) . (key / |key|). The dispatch weights D are its softmax over the
    tokens of the sequence, the combine weights C its softmax over all slots. No token is dropped, and there is no
    auxiliary loss.

    Every output depends on every token of its sequence: ``is_causal`` is False. No expert is chosen for a token, since
    all weights are positive, and so the layer has no ``route``.

    The input may have any axes before that of the sequence. Tokens with infinite or NaN logits have the output NaN, and
    are left out of the slots.

    The parameters are ``keys`` [d, E, p], ``scale`` and, stacked along a first axis of E, ``up``, ``down`` and, if
    gated, ``gate``.

    Args:
        d_model: width of input and output.
        num_experts: E.
        d_ff: hidden width of an expert; 4 * d_model if None.
        slots_per_expert: p. With as many slots as a sequence has tokens, the experts take the FLOPs of one dense layer.
        activation: as in ``Dense``.
        dtype: type of the computation; the type of ``x`` if None. The weights are computed in float32.
        param_dtype: type of the parameters.
        kernel_init, key_init: initialisers.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    is_causal = False
    mixes_tokens = True
    benchmark = Benchmark(by_default=False, num_experts=(16, 64))

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_ff: int | None = None,
        *,
        slots_per_expert: int = 1,
        activation: str = "gelu",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(batch_axis=0),
        key_init: Initializer = nnx.initializers.lecun_normal(in_axis=0, out_axis=2, batch_axis=1),
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model, num_experts=num_experts, slots_per_expert=slots_per_expert)
        check_layer(dtype, param_dtype, rngs, kernel_init=kernel_init, key_init=key_init)
        shape = (d_model, num_experts, slots_per_expert)
        self._make_experts(
            d_model,
            num_experts,
            d_ff,
            activation,
            d_model * num_experts * slots_per_expert,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.slots_per_expert = slots_per_expert
        self.keys = nnx.Param(initial(key_init, rngs.params(), shape, param_dtype))
        self.scale = nnx.Param(jnp.ones((), param_dtype))

    def __call__(
        self, x: Float[Array, "*b s d"], mask: Bool[Array, "*b s"] | None = None
    ) -> tuple[Float[Array, "*b s d"], Aux]:
        x, mask = self._sequences(x, mask)
        split = split_of(x, x.ndim - 1)
        forward = automatic(self._forward, split and (split, split_of(x, 0)))
        return forward(x, mask, self.keys[...], self.scale[...], self._kernels())

    def _forward(
        self,
        x: Float[Array, "*b s d"],
        mask: Bool[Array, "*b s"],
        keys: Float[Array, "d E p"],
        scale: Float[Array, ""],
        kernels: list[Array],
    ) -> tuple[Float[Array, "*b s d"], Aux]:
        shape, dtype = x.shape, self.dtype or x.dtype
        if not x.size:
            return x.astype(dtype), Aux(jnp.zeros(()), {"top_slot": jnp.zeros(())})
        x, mask = as_batch(x.ndim - 2, x, mask)
        keys = scale.astype(jnp.float32) * _unit(keys.astype(jnp.float32), axis=0)
        logits = jnp.einsum("bsd,dep->bsep", _unit(x.astype(jnp.float32), axis=-1), keys)
        able = mask & jnp.all(jnp.isfinite(logits), axis=(2, 3))
        logits = jnp.where(able[..., None, None], logits, EXCLUDED)
        dispatch = jnp.where(able[..., None, None], jax.nn.softmax(logits, axis=1), 0)
        combine = jax.nn.softmax(logits, axis=(2, 3))

        x = jnp.where(able[..., None], x, 0).astype(dtype)
        rows = constrain(jnp.einsum("bsd,bsep->bepd", x, dispatch.astype(dtype)), "batch")
        y = jnp.einsum("bepd,bsep->bsd", self._by_capacity(rows, kernels), combine.astype(dtype))
        y = jnp.where(able[..., None], y, jnp.where(mask[..., None], jnp.nan, 0).astype(dtype))
        # The largest combine weight: near 1 where a token reads from a single slot.
        top = mean_of_real(jnp.max(combine, axis=(2, 3)), mask)
        return y.reshape(shape), Aux(jnp.zeros(()), {"top_slot": top})

    def flops_per_token(self, seq_len: int) -> float:
        """Logits, slots and outputs cost 2 d E p each, and the experts what they cost for E p / seq_len tokens."""
        check_sizes(seq_len=seq_len)
        slots = self.num_experts * self.slots_per_expert
        return 6 * self.up.shape[1] * slots + slots / seq_len * 2 * self._expert_params()

    def exchanged(self, load: DeviceLoad) -> Collectives:
        """Slots go to the experts and back."""
        return self._sent(load, load.tokens / load.seq_len * self.num_experts * self.slots_per_expert)


def _unit(vectors: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The vectors along an axis, scaled to length one; zero stays zero."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=axis, keepdims=True) + EPSILON)
