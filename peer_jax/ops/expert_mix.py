"""One-neuron experts that each token retrieves: y = sum_i g_i act(u_i . x) v_i.

Source: He 2024, "Mixture of A Million Experts" (arXiv:2407.04153), section 2.

t  tokens     r  retrieved experts per token, r = h * k     d  d_model     N  experts     h, k  heads, top-k
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.ops import mosaic_gpu, sharded
from peer_jax.ops.checks import check_arrays, check_indices, check_pairs, drop_invalid
from peer_jax.ops.choice import PARTS, choose
from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.kept import keep
from peer_jax.ops.reverse_mode import explained, reverse_mode
from peer_jax.ops.rows import cast_whole, dot_rows, sum_rows
from peer_jax.ops.table_gradients import table_gradients
from peer_jax.sharding import automatic, split_of

Activation = Callable[[Array], Array]


def expert_mix(
    x: Float[Array, "*tokens d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "*tokens h k"],
    gates: Float[Array, "*tokens h k"],
    activation: Activation,
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens d"]:
    """Sum over heads and k of ``gates * activation(down[indices] . x) * up[indices]``.

    Rows are cast to the type of ``x`` after they are gathered; products accumulate in float32. Differentiable in all
    but the indices; the gradients of the tables add up in float32. Forward-mode derivatives (``jax.jvp``,
    ``jax.jacfwd``) need ``"reference"``.

    Args:
        x: one vector per token.
        down: u; row i is what expert i multiplies the input by.
        up: v; row i is what expert i adds to the output, weighted.
        indices: experts of each token and head; they may repeat.
        gates: their weights.
        activation: elementwise; called on float32.
        implementation: ``"reference"``: plain gather and einsum, which holds [tokens, h, k, d]; ``"xla"``: chunks of
            tokens, and a backward pass that gathers again; ``"mosaic_gpu"``: kernels for Hopper GPUs and newer, or
            ``"xla"`` where they can't run; None picks. On tables that are split over devices, XLA partitions
            ``"reference"``; the others exchange tokens (``peer_jax.ops.sharded``).

    Raises:
        InputError: if sizes don't fit, or the implementation is unknown; under ``checked``, also if an index is out of
            range. Without ``checked``, the output of such a token is NaN.
    """
    check_arrays("expert_mix", x=(x, "*tokens d"), down=(down, "N d"), up=(up, "N d"), gates=(gates, "*tokens h k"))
    check_arrays("expert_mix", integer=True, indices=(indices, "*tokens h k"))
    if not callable(activation):
        raise InputError(f"expert_mix: activation={activation!r} must be a function, such as jax.nn.gelu")
    if down.shape != up.shape:
        raise InputError(f"down {down.shape} and up {up.shape} must have the same shape, [N, d]")
    if down.dtype != up.dtype:
        raise InputError(f"down is {down.dtype} and up is {up.dtype}: cast one of them")
    if x.shape[-1] != down.shape[1] or not down.shape[0]:
        raise InputError(f"tables {down.shape} must have rows, as wide as x {x.shape}")
    check_pairs("expert_mix", x.shape[:-1], indices, gates)
    check_indices("expert_mix", indices, down.shape[0])
    if not indices.size:
        return jnp.zeros(x.shape, x.dtype)
    mix = functools.partial(_mix, activation=activation, implementation=implementation)
    with explained("expert_mix"):
        return automatic(mix, split_of(x, x.ndim - 1))(x, down, up, indices, gates)


def _mix(
    x: Float[Array, "*tokens d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "*tokens h k"],
    gates: Float[Array, "*tokens h k"],
    *,
    activation: Activation,
    implementation: str | None,
) -> Float[Array, "*tokens d"]:
    """``expert_mix`` of arguments that fit one another."""
    gates, indices, valid = drop_invalid(gates, indices, down.shape[0])
    *tokens, h, k = indices.shape
    flat = x.reshape(-1, x.shape[-1])
    pairs = indices.reshape(-1, h * k), gates.reshape(-1, h * k)
    chosen, split = choose(implementation, flat, down, h * k), sharded.splits_experts()
    if chosen != "reference":
        flat, down, up, gates = (reverse_mode("expert_mix", a) for a in (flat, down, up, pairs[1]))
        pairs = pairs[0], gates
    if split and chosen in PARTS:
        y = sharded.expert_mix(PARTS[chosen], flat, down, up, *pairs, activation)
    else:
        mix = _IMPLEMENTATIONS[chosen]
        run = sharded.by_partitioner if split else sharded.by_tokens
        y = run(lambda down, up, x, *pairs: mix(x, down, up, *pairs, activation), (down, up), (flat, *pairs))
    return jnp.where(valid[..., None], y.reshape(*tokens, x.shape[-1]), jnp.nan)


def _reference(x, down, up, indices, gates, activation):
    # Gathered in float32, so that the gradients of a row add up in float32.
    u = down.astype(jnp.float32)[indices].astype(x.dtype)
    v = up.astype(jnp.float32)[indices].astype(x.dtype)
    s = jnp.einsum("td,trd->tr", x, u, preferred_element_type=jnp.float32)
    a = gates.astype(jnp.float32) * activation(s)
    return jnp.einsum("tr,trd->td", a.astype(x.dtype), v, preferred_element_type=jnp.float32).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _xla(
    x: Float[Array, "t d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"],
    activation: Activation,
) -> Float[Array, "t d"]:
    return _xla_forward(x, down, up, indices, gates, activation)[0]


def _chunk(indices: Int[Array, "t r"], d: int) -> int:
    t, r = indices.shape
    return chunk_size(t, 4 * r * d)


def _xla_forward(x, down, up, indices, gates, activation):
    u, v = (cast_whole(table, x.dtype, indices.size) for table in (down, up))

    def body(_, chunk):
        x, indices, gates = chunk
        s = dot_rows(x, u, indices)
        y = sum_rows(gates.astype(jnp.float32) * activation(s), v, indices, x.dtype)
        return None, (y.astype(x.dtype), s)

    _, (y, s) = scan_chunks(body, None, (x, indices, gates), x.shape[0], _chunk(indices, x.shape[1]))
    return y, (x, down, up, indices, gates, keep(s))


def _xla_backward(activation, residuals, dy):
    """With a = act(s) and r = dy . v:  dg = r a,  ds = r g act'(s),  dx = sum ds u,  du_i += ds x,  dv_i += g a dy."""
    x, down, up, indices, gates, s = residuals
    u, v = (cast_whole(table, x.dtype, indices.size) for table in (down, up))

    def body(_, chunk):
        indices, gates, s, dy = chunk
        g = gates.astype(jnp.float32)
        a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
        r = dot_rows(dy, v, indices)
        ds = r * g * slope
        dx = sum_rows(ds, u, indices, dy.dtype)
        return None, (dx.astype(dy.dtype), (r * a).astype(gates.dtype), ds, g * a)

    t, d = x.shape
    _, (dx, d_gates, ds, ga) = scan_chunks(body, None, (indices, gates, s, dy), t, _chunk(indices, d))
    d_down, d_up = table_gradients(indices, down.shape[0], (ds, x), (ga, dy))
    return dx, d_down.astype(down.dtype), d_up.astype(up.dtype), None, d_gates


_xla.defvjp(_xla_forward, _xla_backward)

_IMPLEMENTATIONS = {"reference": _reference, "xla": _xla, "mosaic_gpu": mosaic_gpu.expert_mix}
