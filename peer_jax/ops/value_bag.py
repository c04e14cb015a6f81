"""A weighted sum of retrieved values: y = sum_i g_i v_i.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242), section 3.

t  tokens     r  retrieved values per token, r = h * k     d  value width     N  values     h, k  heads, top-k
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.ops import mosaic_gpu, sharded
from peer_jax.ops.checks import check_arrays, check_indices, check_pairs, drop_invalid
from peer_jax.ops.choice import PARTS, choose
from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.reverse_mode import explained, reverse_mode
from peer_jax.ops.rows import cast_whole, dot_rows, sum_rows
from peer_jax.ops.table_gradients import table_gradients
from peer_jax.sharding import automatic, split_of


def value_bag(
    values: Float[Array, "N d"],
    indices: Int[Array, "*tokens h k"],
    gates: Float[Array, "*tokens h k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens d"]:
    """Sum over heads and k of ``gates * values[indices]``, in the type of ``gates``.

    Values are cast to the type of ``gates`` after they are gathered; sums accumulate in float32. Differentiable in
    the values and gates. Forward-mode derivatives (``jax.jvp``, ``jax.jacfwd``) need ``"reference"``.

    Args:
        values: the table.
        indices: values of each token and head; they may repeat.
        gates: their weights.
        implementation: ``"reference"``: plain gather and einsum, which holds [tokens, h, k, d]; ``"xla"``: chunks of
            tokens, and a backward pass that gathers again; ``"mosaic_gpu"``: kernels for Hopper GPUs and newer, or
            ``"xla"`` where they can't run; None picks. On a table that is split over devices, XLA partitions
            ``"reference"``; ``"xla"`` exchanges tokens (``peer_jax.ops.sharded``).

    Raises:
        InputError: if sizes don't fit, or the implementation is unknown; under ``checked``, also if an index is out of
            range. Without ``checked``, the output of such a token is NaN.
    """
    check_arrays("value_bag", values=(values, "N d"), gates=(gates, "*tokens h k"))
    check_arrays("value_bag", integer=True, indices=(indices, "*tokens h k"))
    if not values.shape[0]:
        raise InputError(f"values {values.shape} must have rows")
    check_pairs("value_bag", gates.shape[:-2], indices, gates)
    check_indices("value_bag", indices, values.shape[0])
    if not indices.size:
        return jnp.zeros((*gates.shape[:-2], values.shape[1]), gates.dtype)
    bag = functools.partial(_bag, implementation=implementation)
    with explained("value_bag"):
        return automatic(bag, split_of(gates, gates.ndim - 2))(values, indices, gates)


def _bag(
    values: Float[Array, "N d"],
    indices: Int[Array, "*tokens h k"],
    gates: Float[Array, "*tokens h k"],
    *,
    implementation: str | None,
) -> Float[Array, "*tokens d"]:
    """``value_bag`` of arguments that fit one another."""
    gates, indices, valid = drop_invalid(gates, indices, values.shape[0])
    *tokens, h, k = indices.shape
    gates = gates.reshape(-1, h * k)
    like_y = jax.ShapeDtypeStruct((gates.shape[0], values.shape[1]), gates.dtype)
    chosen, split = choose(implementation, like_y, values, h * k), sharded.splits_experts()
    if chosen != "reference":
        values, gates = (reverse_mode("value_bag", a) for a in (values, gates))
    pairs = indices.reshape(-1, h * k), gates
    if split and chosen in PARTS:
        y = sharded.value_bag(PARTS[chosen], values, *pairs)
    else:
        run = sharded.by_partitioner if split else sharded.by_tokens
        y = run(_IMPLEMENTATIONS[chosen], (values,), pairs)
    return jnp.where(valid[..., None], y.reshape(*tokens, values.shape[-1]), jnp.nan)


def _reference(values, indices, gates):
    # Gathered in float32, so that the gradients of a row add up in float32.
    rows = values.astype(jnp.float32)[indices].astype(gates.dtype)
    return jnp.einsum("tr,trd->td", gates, rows, preferred_element_type=jnp.float32).astype(gates.dtype)


@jax.custom_vjp
def _xla(values: Float[Array, "N d"], indices: Int[Array, "t r"], gates: Float[Array, "t r"]) -> Float[Array, "t d"]:
    return _xla_forward(values, indices, gates)[0]


def _xla_forward(values, indices, gates):
    v = cast_whole(values, gates.dtype, indices.size)

    def body(_, chunk):
        indices, gates = chunk
        return None, sum_rows(gates, v, indices, gates.dtype).astype(gates.dtype)

    t, r = indices.shape
    _, y = scan_chunks(body, None, (indices, gates), t, chunk_size(t, 4 * r * values.shape[1]))
    return y, (values, indices, gates)


def _xla_backward(residuals, dy):
    """dg = dy . v,  dv_i += g dy."""
    values, indices, gates = residuals
    v = cast_whole(values, gates.dtype, indices.size)

    def body(_, chunk):
        indices, dy = chunk
        return None, dot_rows(dy, v, indices)

    t, r = indices.shape
    _, d_gates = scan_chunks(body, None, (indices, dy), t, chunk_size(t, 4 * r * values.shape[1]))
    (d_values,) = table_gradients(indices, values.shape[0], (gates.astype(jnp.float32), dy))
    return d_values.astype(values.dtype), None, d_gates.astype(gates.dtype)


_xla.defvjp(_xla_forward, _xla_backward)

_IMPLEMENTATIONS = {"reference": _reference, "xla": _xla, "mosaic_gpu": mosaic_gpu.value_bag}
