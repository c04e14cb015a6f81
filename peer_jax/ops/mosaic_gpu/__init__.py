"""``expert_mix`` and ``value_bag`` as Pallas Mosaic GPU kernels, for NVIDIA GPUs from Hopper on.

No array of size [t, r, d] reaches memory. The module `tokens` has the kernel for the forward pass and for the gradients
of the tokens, `tables` those for the gradients of the tables; `copies` counts the bytes that they ask of memory. Pallas
is imported when a kernel is built, so that this module can be imported quickly, and on a JAX that has no such kernels.

t  tokens     r  rows per token     d  row width     N  rows of a table
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.ops.mosaic_gpu.parts import KernelParts
from peer_jax.ops.mosaic_gpu.tables import sum_pairs
from peer_jax.ops.mosaic_gpu.tokens import mix_tokens
from peer_jax.sharding import target

__all__ = ["KernelParts", "expert_mix", "value_bag", "why_not"]

Activation = Callable[[Array], Array]
Sized = jax.ShapeDtypeStruct  # takes the place of an array whose shape and type are all that matters

OLDEST_JAX = (0, 11)
WIDTHS = (64, 4096)
MOST_ROWS = 1024


def why_not(
    x: Float[Array, "t d"] | Sized,
    table: Float[Array, "N d"] | Sized,
    r: int,
) -> str | None:
    """One sentence that says why the kernels can't run with these sizes and types on the device that what is traced is
    for; None if they can.

    Args:
        x: the tokens' vectors; for ``value_bag``, something with the shape and type of its output.
        table: ``down`` and ``up``, which must be alike, or ``values``.
        r: rows per token, heads times top-k.
    """
    device = target()
    if device.platform != "gpu":
        return f"Mosaic GPU kernels run on NVIDIA GPUs, not on {device.platform!r}."
    if (reason := _why_not_sizes(x, table, r)) is not None:
        return reason
    capability = getattr(device, "compute_capability", None)
    try:
        too_old = capability is not None and float(capability) < 9.0
    except ValueError:  # AMD: "gfx942"
        too_old = True
    return f"Mosaic GPU kernels need a Hopper GPU or newer, not compute capability {capability}." if too_old else None


def _why_not_sizes(x, table, r) -> str | None:
    t, d = x.shape
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"Mosaic GPU kernels need JAX {'.'.join(map(str, OLDEST_JAX))} or later, not {jax.__version__}."
    for name, array in [("x", x), ("the table", table)]:
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"Mosaic GPU kernels take float32 and bfloat16; {name} is {array.dtype}."
    if d % 64 or not WIDTHS[0] <= d <= WIDTHS[1]:
        return f"Mosaic GPU kernels take rows of a multiple of 64 from {WIDTHS[0]} to {WIDTHS[1]} wide, not {d}."
    if t == 0 or r == 0 or table.shape[0] == 0:
        return "Mosaic GPU kernels need something to retrieve, but there is nothing."
    if r > MOST_ROWS:
        return f"Mosaic GPU kernels take at most {MOST_ROWS} rows per token, not {r}."
    if t * r >= 2**31:
        return f"Mosaic GPU kernels number pairs of token and row in 32 bits; {t} * {r} are too many."
    return None


def expert_mix(
    x: Float[Array, "t d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"],
    activation: Activation,
    *,
    interpret: Any = False,
) -> Float[Array, "t d"]:
    """Sum over r of ``gates * activation(down[indices] . x) * up[indices]``; the indices must be in range.

    Rows are cast to the type of ``x``; products and gradients add up in float32, as in ``peer_jax.ops.expert_mix``.
    The result is deterministic: every sum has a fixed order.

    Args:
        activation: elementwise, on float32, and made of operations that Mosaic GPU compiles.
        interpret: True, or an ``InterpretGPUParams``, to simulate the kernels on CPU.

    Raises:
        ValueError: with the sentence of ``why_not``.
    """
    if (down.shape, down.dtype) != (up.shape, up.dtype):
        raise ValueError(f"down {down.shape} {down.dtype} and up {up.shape} {up.dtype} must be alike.")
    _check(x, down, indices.shape[1])
    return _expert_mix(x, down, up, indices.astype(jnp.int32), gates, activation, interpret)


def value_bag(
    values: Float[Array, "N d"],
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"],
    *,
    interpret: Any = False,
) -> Float[Array, "t d"]:
    """Sum over r of ``gates * values[indices]``, in the type of ``gates``; the indices must be in range.

    The result is deterministic. ``interpret`` and the errors raised are those of ``expert_mix``.
    """
    t, r = indices.shape
    _check(Sized((t, values.shape[1]), gates.dtype), values, r)
    return _value_bag(values, indices.astype(jnp.int32), gates, interpret)


def _check(x, table, r) -> None:
    if (reason := _why_not_sizes(x, table, r)) is not None:
        raise ValueError(reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _expert_mix(x, down, up, indices, gates, activation, interpret):
    return _expert_mix_forward(x, down, up, indices, gates, activation, interpret)[0]


def _expert_mix_forward(x, down, up, indices, gates, activation, interpret):
    y, s = mix_tokens(x, down, up, indices, gates, activation, x.dtype, interpret)
    return y, (x, down, up, indices, gates, s)


def _expert_mix_backward(activation, interpret, residuals, dy):
    """With a = act(s) and q = dy . v:  dg = q a,  ds = q g act'(s),  dx = sum ds u,  du_i += ds x,  dv_i += g a dy.

    dx is a mix of experts as well, with input dy, v and u exchanged, gates g act'(s) and no activation.
    """
    x, down, up, indices, gates, s = residuals
    g = gates.astype(jnp.float32)
    a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
    dx, q = mix_tokens(dy, up, down, indices, g * slope, lambda q: q, dy.dtype, interpret)
    terms = [(q * g * slope, x, down.dtype), (g * a, dy, up.dtype)]
    d_down, d_up = sum_pairs(indices, down.shape[0], terms, interpret)
    return dx, d_down, d_up, None, (q * a).astype(gates.dtype)


_expert_mix.defvjp(_expert_mix_forward, _expert_mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _value_bag(values, indices, gates, interpret):
    return _value_bag_forward(values, indices, gates, interpret)[0]


def _value_bag_forward(values, indices, gates, interpret):
    y, _ = mix_tokens(None, None, values, indices, gates, None, gates.dtype, interpret)
    return y, (values, indices, gates)


def _value_bag_backward(interpret, residuals, dy):
    """dg = dy . v,  dv_i += g dy."""
    values, indices, gates = residuals
    _, d_gates = mix_tokens(dy, values, None, indices, None, None, dy.dtype, interpret)
    (d_values,) = sum_pairs(indices, values.shape[0], [(gates.astype(jnp.float32), dy, values.dtype)], interpret)
    return d_values, None, d_gates.astype(gates.dtype)


_value_bag.defvjp(_value_bag_forward, _value_bag_backward)
