"""Loops over chunks of the tokens, so that gathered rows outgrow neither a CPU's cache nor an accelerator's budget."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peer_jax.sharding import target

# Gathered bytes that a chunk may hold. On a CPU they should stay in a core's cache: 16 tokens of 128 float32 rows of
# width 256 measured fastest there. Elsewhere a chunk is a kernel launch, so it should be large, but small compared with
# the device's memory.
CPU_BUDGET = 2 * 2**20
ACCELERATOR_BUDGET = 256 * 2**20


def chunk_size(num_tokens: int, bytes_per_token: int) -> int:
    """Tokens per chunk: all of them where they fit the device's budget, else a power of two."""
    budget = CPU_BUDGET if target().platform == "cpu" else ACCELERATOR_BUDGET
    fitting = max(1, budget // max(1, bytes_per_token))
    return num_tokens if num_tokens <= fitting else 2 ** int(math.log2(fitting))


def _split(tree: Any, size: int) -> Any:
    """[tokens, ...] -> [chunks, size, ...], the last chunk padded with zeros."""

    def split(a: jax.Array) -> jax.Array:
        padding = -a.shape[0] % size
        if padding:
            a = jnp.concatenate([a, jnp.zeros((padding, *a.shape[1:]), a.dtype)])
        return a.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(split, tree)


def scan_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tokens: Any, num_tokens: int, size: int
) -> tuple[Any, Any]:
    """``carry, out = body(carry, chunk)`` over chunks of ``size`` of the leading axis of every array in ``tokens``.

    Returns the last carry and the outputs, joined along their leading axis, [num_tokens, ...]. The last chunk is
    padded with zeros, for which ``body`` must not change the carry (a gate of zero has that effect).
    """
    if size >= num_tokens:
        return body(carry, tokens)
    carry, out = jax.lax.scan(body, carry, _split(tokens, size))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_tokens], out)
