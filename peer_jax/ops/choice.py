"""Which implementation an op uses: the one that was asked for, if it can run; else the one that measures fastest."""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peer_jax.errors import InputError
from peer_jax.ops import mosaic_gpu, sharded

# Bytes of the table, and of the gathered rows, up to which a CPU is fastest if it holds all of these rows at once
# (docs/performance.md).
HELD = 2**20

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")

SPLIT = "Mosaic GPU kernels need whole tables, but these are split over devices."


def check_implementation(implementation: str | None) -> None:
    """Raises an InputError unless ``implementation`` is None or in ``IMPLEMENTATIONS``."""
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

    None means "xla"; on a CPU it means "reference" if table and gathered rows are small and float32, because its
    backward pass can be faster. The kernels of "mosaic_gpu" have not been measured on a GPU yet, so they run only if
    they are asked for. Where they can't run, "xla" does instead, and a warning says why, once for each reason.

    Args:
        implementation: what the caller of the op asks for.
        x: the tokens' vectors, or for ``value_bag`` something with the shape and type of its output.
        table: ``down`` and ``up``, which are alike, or ``values``.
        r: rows per token.
        platform: where the op will run, as ``jax.default_backend()`` names it; None takes that.

    Raises:
        InputError: if the implementation is unknown.
    """
    check_implementation(implementation)
    split = sharded.splits_experts()
    if implementation is None:
        if split:
            return "xla"
        small = 4 * x.shape[1] * max(x.shape[0] * r, table.shape[0]) <= HELD and table.dtype == jnp.float32
        return "reference" if small and (platform or jax.default_backend()) == "cpu" else "xla"
    if implementation != "mosaic_gpu":
        return implementation
    if reason := SPLIT if split else mosaic_gpu.why_not(x, table, r, platform):
        _say_once(reason)
        return "xla"
    return implementation


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("implementation='mosaic_gpu' falls back to 'xla': %s", reason)
