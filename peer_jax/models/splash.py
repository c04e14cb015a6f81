"""JAX's splash attention, Pallas kernels for TPUs: no scores of whole rows, and no work for blocks without any.

b  batch     s  sequence     h  heads     c  width of a head
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from peer_jax.sharding import AXES, on_each_device, target

# Queries and keys that a kernel holds at a time: at most so many, and a multiple of the lanes of a TPU.
BLOCK, LANES = 512, 128


def why_not(query: Float[Array, "b s h c"] | jax.ShapeDtypeStruct) -> str | None:
    """What splash attention lacks to run for queries of this shape and type; None if it can run."""
    s = query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"bfloat16 or float32, not {query.dtype}"
    if s % LANES:
        return f"sequences of a multiple of {LANES} tokens, not {s}"
    platform = target().platform
    return None if platform == "tpu" else f"a TPU, not {platform!r}"


def attend(
    query: Float[Array, "b s h c"],
    key: Float[Array, "b s h c"],
    value: Float[Array, "b s h c"],
    segment_ids: Int[Array, "b s"] | None,
    *,
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "b s h c"]:
    """Attention within segments, each device with its own rows; ``interpret`` simulates the kernels on CPU."""
    arguments = (query, key, value) if segment_ids is None else (query, key, value, segment_ids)
    rows = PartitionSpec(AXES)
    own = functools.partial(_attend, causal=causal, interpret=interpret)
    return on_each_device(own, (rows,) * len(arguments), rows)(*arguments)


def _attend(query, key, value, segment_ids=None, *, causal, interpret):
    # Imported here, because Pallas takes a second to import and other devices need none of it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    s, h, c = query.shape[1:]
    block = math.gcd(s, BLOCK)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = (splash.CausalMask if causal else splash.FullMask)((s, s))
    # The sequence is the minor axis, as in the products that queries, keys and values come from: with heads that are
    # narrower than the lanes as the minor axis, the arrays would be padded, and copied to that layout.
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * h),
        block_sizes=splash.BlockSizes(
            **{f"block_{name}": block for name in sizes},
            **{f"{name}_layout": splash.QKVLayout.SEQ_MINOR for name in "qkv"},
        ),
        interpret=interpret,
    )
    by_head = (a.swapaxes(1, 2) for a in (query * c**-0.5, key, value))
    if segment_ids is None:
        return jax.vmap(kernel)(*by_head).swapaxes(1, 2)
    return jax.vmap(kernel)(*by_head, splash.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)
