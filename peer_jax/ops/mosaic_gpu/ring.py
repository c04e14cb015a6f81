"""A ring of rows in shared memory: its size, and which warp fetches what.

Copies are issued by single warps (`plgpu.warp_map`), a warp a row: by all threads together, each copy would be twice
the arrivals at a barrier and a synchronisation of the block.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

RING_BYTES = 49 * 2**10  # four blocks a multiprocessor
MOST_RING_BYTES = 176 * 2**10  # one


def count_stages(stage_bytes: int, most: int) -> int:
    """Stages of a ring: as many, up to four, as let four blocks share a multiprocessor, but two if they fit at all."""
    fitting = max(RING_BYTES // stage_bytes, 2 if 2 * stage_bytes <= MOST_RING_BYTES else 1)
    return min(most, fitting, 4)


def pick(four: list[Int[Array, ""]], warp: Int[Array, ""]) -> Int[Array, ""]:
    """``four[warp]``, of scalars: Pallas can't load one from memory where warps part."""
    low, high = (jnp.where(warp % 2 == 0, *four[i : i + 2]) for i in (0, 2))
    return jnp.where(warp < 2, low, high)
