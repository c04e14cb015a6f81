"""Which implementation an op uses: the one that was asked for, if it can run; else the one that measures fastest."""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peer_jax.errors import InputError
from peer_jax.ops import mosaic_gpu, sharded
from peer_jax.ops.parts import Xla
from peer_jax.sharding import may_run_kernels, target

# Bytes of the table, and of the gathered rows, up to which a CPU is fastest if it holds all of these rows at once
# (docs/performance.md).
HELD = 2**20

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")

# What each device computes by itself where tables are split; XLA partitions "reference" as a whole.
PARTS = {"xla": Xla(), "mosaic_gpu": mosaic_gpu.KernelParts()}

# Compute capability of the GPUs on which the kernels were measured, and are the default.
HOPPER = "9.0"


def check_implementation(implementation: str | None) -> None:
    """Raises an InputError unless ``implementation`` is None or in ``IMPLEMENTATIONS``."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, nor None")


def choose(
    implementation: str | None,
    x: Float[Array, "t d"] | jax.ShapeDtypeStruct,
    table: Float[Array, "N d"] | jax.ShapeDtypeStruct,
    r: int,
) -> str:
    """The implementation of ``expert_mix`` or ``value_bag`` for t tokens that retrieve r rows each.

    None means the kernels of "mosaic_gpu" on a Hopper GPU, where they were faster at every size that was measured
    (docs/performance.md), and else "xla"; on a CPU it means "reference" if table and gathered rows are small and
    float32, because its backward pass can be faster. Where kernels that were asked for can't run, "xla" does instead,
    and a warning says why, once for each reason.

    Args:
        implementation: what the caller of the op asks for.
        x: the tokens' vectors, or for ``value_bag`` something with the shape and type of its output.
        table: ``down`` and ``up``, which are alike, or ``values``.
        r: rows per token.

    Raises:
        InputError: if the implementation is unknown.
    """
    check_implementation(implementation)
    if implementation not in (None, "mosaic_gpu"):
        return implementation
    device = target()
    if implementation is None and device.platform == "cpu":
        small = 4 * x.shape[1] * max(x.shape[0] * r, table.shape[0]) <= HELD and table.dtype == jnp.float32
        return "reference" if small and not sharded.splits_experts() else "xla"
    reason = mosaic_gpu.why_not(*sharded.part_shapes(x, table), r)
    if not may_run_kernels():
        reason = "Mosaic GPU kernels need no mesh, or one of peer_jax.sharding."
    if reason and implementation:
        _say_once(reason)
    is_hopper = getattr(device, "compute_capability", None) == HOPPER
    return "xla" if reason or (implementation is None and not is_hopper) else "mosaic_gpu"


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("implementation='mosaic_gpu' falls back to 'xla': %s", reason)
