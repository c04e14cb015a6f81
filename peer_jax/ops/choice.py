"""Which implementation an op uses: the one asked for where it can, else the one that measures fastest."""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peer_jax.errors import InputError
from peer_jax.ops import mosaic_gpu

# Bytes of the table, and of rows gathered, both in float32, up to which a CPU does best to hold all of these rows
# (docs/performance.md).
HELD = 2**20

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")


def check_implementation(implementation: str | None) -> None:
    """An InputError unless it is None or one of the implementations."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, nor None")


def choose(
    implementation: str | None,
    x: Float[Array, "t d"] | jax.ShapeDtypeStruct,
    table: Float[Array, "N d"] | jax.ShapeDtypeStruct,
    r: int,
    platform: str | None = None,
) -> str:
    """The implementation of ``expert_mix`` or ``value_bag`` for t tokens that retrieve r rows each.

    None is "xla", but on CPU "reference" where table and rows are small and float32, which can be faster backward.
    The kernels of "mosaic_gpu" have not been measured on a GPU yet, so they must be asked for. What they can't take
    falls back to "xla", and says so once.
    """
    check_implementation(implementation)
    if implementation is None:
        small = 4 * x.shape[1] * max(x.shape[0] * r, table.shape[0]) <= HELD and table.dtype == jnp.float32
        return "reference" if small and (platform or jax.default_backend()) == "cpu" else "xla"
    if implementation != "mosaic_gpu":
        return implementation
    if reason := mosaic_gpu.why_not(x, table, r, platform):
        _say_once(reason)
        return "xla"
    return implementation


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("implementation='mosaic_gpu' falls back to 'xla': %s", reason)
