"""A ring of rows in shared memory: its size, and which warp fetches which row.

Single warps issue the copies (`plgpu.warp_map`), one row per warp. If all threads issued a copy together, it would cost
twice the arrivals at a barrier, and a synchronisation of the block.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

RING_BYTES = 49 * 2**10  # lets four blocks share a multiprocessor
MOST_RING_BYTES = 176 * 2**10  # for one block per multiprocessor


def count_stages(stage_bytes: int, most: int) -> int:
    """Stages of a ring: up to four, as long as four blocks share a multiprocessor; but at least two if these fit."""
    fitting = max(RING_BYTES // stage_bytes, 2 if 2 * stage_bytes <= MOST_RING_BYTES else 1)
    return min(most, fitting, 4)


def pick(four: list[Int[Array, ""]], warp: Int[Array, ""]) -> Int[Array, ""]:
    """``four[warp]``. Pallas can't load a scalar from memory where warps do different things, so it is selected."""
    low, high = (jnp.where(warp % 2 == 0, *four[i : i + 2]) for i in (0, 2))
    return jnp.where(warp < 2, low, high)
