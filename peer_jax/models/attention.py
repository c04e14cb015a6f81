"""Self-attention, causal or not, with rotary positions, packed sequences and a key-value cache.

b  batch     s  queries     S  keys     h  heads     c  width of a head     d  d_model, h * c
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.layers.checks import check_flag, check_sizes
from peer_jax.layers.interface import by_position
from peer_jax.layers.linear import Linear
from peer_jax.models import splash
from peer_jax.sharding import automatic, may_run_kernels, split_of, target


@by_position
class KVCache(NamedTuple):
    """Keys and values of the first ``length`` positions; the rest is room for more."""

    key: Float[Array, "b S h c"]
    value: Float[Array, "b S h c"]
    length: Int[Array, ""]


def rotate(x: Float[Array, "b s h c"], positions: Int[Array, "b s"], theta: float) -> Float[Array, "b s h c"]:
    """Rotary position embedding, halves rotated against each other; Su et al. 2021 (arXiv:2104.09864)."""
    c = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, c, 2, dtype=jnp.float32) / c)
    angles = (positions[..., None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


IMPLEMENTATIONS = ("xla", "cudnn", "splash")
WIDEST_HEAD, OLDEST_GPU = 128, 8.0  # for cuDNN; 8.0 is Ampere


class Attention(nnx.Module):
    """Multi-head attention without biases.

    Args:
        d_model: d.
        num_heads: h; each has a width of d / h, which must be even.
        causal: whether a token attends to earlier tokens alone. If not, it attends to all, and there is no cache.
        rope_theta: base of the rotary frequencies; None: queries and keys are not rotated.
        implementation: ``"xla"`` holds the scores of all heads, [b, h, s, S]; ``"cudnn"`` never holds them, and needs
            an NVIDIA GPU from Ampere on, bfloat16 or float16, and heads at most 128 wide; ``"splash"`` never holds
            them, and needs a TPU and sequences of a multiple of 128 tokens. None takes one of the latter two where it
            can run (docs/performance.md), except with a cache. Under ``jax.jit`` with arrays that are split over TPUs
            without ``peer_jax.sharding``, give "xla".
        dtype: type of the computation.
        param_dtype: type of the parameters.
        kernel_init: initialiser of the projections.
        rngs: random numbers for the parameters.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = True,
        rope_theta: float | None = 10_000.0,
        implementation: Placed[str | None] = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model, num_heads=num_heads)
        check_flag(causal=causal)
        if implementation not in (None, *IMPLEMENTATIONS):
            raise InputError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, nor None")
        if d_model % num_heads or (d_model // num_heads) % 2:
            raise InputError(
                f"d_model={d_model} does not split into num_heads={num_heads} heads of an even width: "
                f"choose d_model as a multiple of {2 * num_heads}"
            )

        linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.num_heads, self.causal = num_heads, causal
        self.rope_theta, self.implementation = rope_theta, implementation
        self.query_key_value = linear(d_model, 3 * d_model, ("embed", "heads"))
        self.out = linear(d_model, d_model, ("heads", "embed"))

    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"] | None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "b s d"], KVCache | None]:
        """Attends to the tokens with the same segment id, or to all if None; with ``causal``, not to later ones.

        With a cache, x continues the cached tokens, which must be of the same segment, and the cache is returned with
        x in it.
        """
        split = split_of(x, x.ndim - 1)
        attend = functools.partial(self._attend, is_split=split is not None)
        attend = automatic(attend, split and (split, split_of(x, 0)))
        y, cache = attend(self.query_key_value(x), positions, segment_ids, cache)
        return self.out(y), cache

    def _attend(
        self,
        query_key_value: Float[Array, "b s width"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"] | None,
        cache: KVCache | None,
        *,
        is_split: bool,
    ) -> tuple[Float[Array, "b s d"], KVCache | None]:
        """The weighted values of all heads, and the cache with keys and values in it."""
        b, s, width = query_key_value.shape
        qkv = query_key_value.reshape(b, s, 3, self.num_heads, width // (3 * self.num_heads))
        query, key, value = (qkv[:, :, part] for part in range(3))
        if self.rope_theta is not None:
            query, key = (rotate(a, positions, self.rope_theta) for a in (query, key))
        first = 0
        if cache is not None:
            if not self.causal:
                raise InputError("a cache needs causal attention: pass all tokens at once, or set causal=True")
            first = cache.length
            start = (0, first, 0, 0)
            key = jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start)
            value = jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), start)
            cache = KVCache(key, value, first + s)
            key, value = key.astype(query.dtype), value.astype(query.dtype)
        chosen = "xla" if cache is not None else self._choose(query, is_split)
        if chosen == "splash":
            y = splash.attend(query, key, value, segment_ids, causal=self.causal)
        else:
            mask = self._mask(first, s, key.shape[1], segment_ids)
            mask = None if mask is None else jnp.broadcast_to(mask, (b, s, key.shape[1]))[:, None]
            y = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=chosen)
        return y.reshape(b, s, width // 3), cache

    def _choose(self, query: Float[Array, "b s h c"], is_split: bool) -> str:
        """The implementation without a cache; with ``is_split``, explicit axes of a mesh split the tokens.

        Raises:
            InputError: if one was asked for that can't run.
        """
        reasons = {"cudnn": why_not_cudnn(query), "splash": splash.why_not(query)}
        if reasons["splash"] is None and (is_split or not may_run_kernels()):
            reasons["splash"] = "no mesh, or one of peer_jax.sharding"  # XLA can't partition a kernel
        if reason := reasons.get(self.implementation):
            raise InputError(
                f"attention with implementation={self.implementation!r} needs {reason}: None takes what can run"
            )
        return self.implementation or next((name for name, reason in reasons.items() if reason is None), "xla")

    def _mask(
        self, first: Int[Array, ""] | int, s: int, S: int, segment_ids: Int[Array, "b s"] | None
    ) -> Bool[Array, "#b s S"] | None:
        """Which keys each of s queries attends to, the first of which is at position ``first`` of S; None: all."""
        same = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
        if not self.causal:
            return same
        causal = (jnp.arange(S)[None] <= first + jnp.arange(s)[:, None])[None]
        return causal if same is None else causal & same

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per token: projections, and scores and weighted values of all ``seq_len`` keys."""
        d = self.out.in_features
        return 2 * 4 * d * d + 4 * seq_len * d


def why_not_cudnn(query: Float[Array, "b s h c"] | jax.ShapeDtypeStruct) -> str | None:
    """What cuDNN's attention lacks to run here for queries of this shape and type; None if it can run."""
    _, s, _, c = query.shape
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {query.dtype}"
    if c % 8 or c > WIDEST_HEAD or s % 2:
        return f"heads of a multiple of 8 up to {WIDEST_HEAD} wide and sequences of even length, not {c} and {s}"
    device = target()
    if device.platform != "gpu":
        return f"an NVIDIA GPU, not {device.platform!r}"
    capability = getattr(device, "compute_capability", None)
    try:
        newer = float(capability) >= OLDEST_GPU
    except (TypeError, ValueError):  # AMD: "gfx942"
        newer = False
    return None if newer else f"a GPU of compute capability {OLDEST_GPU:g} or higher, not {capability}"
