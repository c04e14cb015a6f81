"""The ops on many devices: tokens are split over all of them, tables over the ``expert`` axis by rows or by columns.

As "xla" and as "mosaic_gpu", no row of a table leaves its device. If tables are split by rows, the devices along
``expert`` exchange their tokens, each adds up what its own experts contribute, and the sums, [tokens, d], go back. If
they are split by columns, each device takes its columns of all tokens, and the devices exchange sums of their partial
products, [tokens, r]. What a device does by itself is in the module `parts`. ``docs/sharding.md`` counts the bytes.

t  tokens per device     g  tokens of all devices along ``expert``, g = E t     r  rows per token     d  row width
N  rows of a table     E  devices along ``expert``     p  pairs of a token and a row, p = g r
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from peer_jax.ops.kept import keep
from peer_jax.ops.parts import Activation, Parts
from peer_jax.sharding import AXES, DATA, EXPERT, FSDP, constrain, current, on_each_device

TOKENS = P(AXES)
Sized = jax.ShapeDtypeStruct


def by_tokens(f: Callable[..., Any], whole: tuple[Array, ...], split: tuple[Array, ...]) -> Any:
    """``f(*whole, *split)``, where each device has its own tokens of the arrays in ``split`` and all of the others."""
    specs = (P(),) * len(whole) + (TOKENS,) * len(split)
    return on_each_device(f, specs, TOKENS)(*whole, *split)


def by_partitioner(f: Callable[..., Array], tables: tuple[Array, ...], tokens: tuple[Array, ...]) -> Array:
    """``f(*tables, *tokens)`` with tables and tokens split; XLA decides what the devices exchange."""
    tables = tuple(constrain(table, "rows", "columns") for table in tables)
    return constrain(f(*tables, *(constrain(a, "batch") for a in tokens)), "batch")


def splits_experts() -> bool:
    """Whether expert tables, and the experts of an MoE, are split over devices."""
    return current() is not None and current().size(EXPERT) > 1


def part_shapes(x: Float[Array, "t d"] | Sized, table: Float[Array, "N d"] | Sized) -> tuple[Sized, Sized]:
    """The shapes and types of the tokens and the part of the table that one device works with."""
    if (placement := current()) is None:
        return Sized(x.shape, x.dtype), Sized(table.shape, table.dtype)
    expert = placement.size(EXPERT)
    tokens = -(-x.shape[0] // (placement.size(DATA) * placement.size(FSDP)))
    rows, columns = table.shape
    rows, columns = (rows // expert, columns) if _by_rows() else (rows, columns // expert)
    return Sized((tokens, columns), x.dtype), Sized((rows, columns), table.dtype)


def expert_mix(
    parts: Parts,
    x: Float[Array, "t d"],
    down: Float[Array, "N d"],
    up: Float[Array, "N d"],
    indices: Int[Array, "t r"],
    gates: Float[Array, "t r"],
    activation: Activation,
) -> Float[Array, "t d"]:
    """``peer_jax.ops.expert_mix`` with its tables split; ``parts`` computes what each device does by itself."""
    return _mix(activation, parts, x, down, up, indices, gates)


def value_bag(
    parts: Parts, values: Float[Array, "N d"], indices: Int[Array, "t r"], gates: Float[Array, "t r"]
) -> Float[Array, "t d"]:
    """``peer_jax.ops.value_bag`` with its table split; ``parts`` computes what each device does by itself."""
    return _bag(parts, values, indices, gates)


def _table() -> P:
    """How the placement in use splits tables."""
    return current().spec(("rows", "columns"))


def _by_rows() -> bool:
    return current().tables == "rows"


# Exchanges along the ``expert`` axis.

gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT, tiled=True)  # t -> g tokens
scatter_sum = functools.partial(jax.lax.psum_scatter, axis_name=EXPERT, tiled=True)  # g -> t tokens, summed
_sum = functools.partial(jax.lax.psum, axis_name=EXPERT)


def _from_first_row(indices: Int[Array, "t r"], table: Float[Array, "M d"]) -> Int[Array, "g r"]:
    """The indices of all devices along ``expert``, counted from this device's first row."""
    return gather(indices) - jax.lax.axis_index(EXPERT) * table.shape[0]


def _to_columns(x: Float[Array, "t d"]) -> Float[Array, "g e"]:
    """This device's columns of the tokens of all devices along ``expert``."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=1, concat_axis=0, tiled=True)


def _to_tokens(x: Float[Array, "g e"]) -> Float[Array, "t d"]:
    """All columns of this device's own tokens: the inverse of ``_to_columns``."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=1, tiled=True)


def _own_tokens(a: Float[Array, "g r"], t: int) -> Float[Array, "t r"]:
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(EXPERT) * t, t)


def _sum_of_copies(table: Float[Array, "M e"]) -> Float[Array, "M e"]:
    """The gradient of a part of a table, summed over the devices that hold the same part."""
    copies = current().size(DATA) * current().size(FSDP)
    return jax.lax.psum(table, (DATA, FSDP)) if copies > 1 else table


# expert_mix.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mix(activation, parts, x, down, up, indices, gates):
    return _mix_forward(activation, parts, x, down, up, indices, gates)[0]


def _mix_forward(activation, parts, *arguments):
    forward = functools.partial(_mix_rows if _by_rows() else _mix_columns, activation, parts)
    table = _table()
    y, kept = on_each_device(forward, (TOKENS, table, table, TOKENS, TOKENS), (TOKENS, TOKENS))(*arguments)
    return y, (*arguments, kept)


def _mix_backward(activation, parts, residuals, dy):
    backward = functools.partial(_mix_rows_backward if _by_rows() else _mix_columns_backward, activation, parts)
    table = _table()
    in_specs = (TOKENS, table, table, TOKENS, TOKENS, TOKENS, TOKENS)
    dx, d_down, d_up, d_gates = on_each_device(backward, in_specs, (TOKENS, table, table, TOKENS))(*residuals, dy)
    return dx, d_down, d_up, None, d_gates


_mix.defvjp(_mix_forward, _mix_backward)


def _mix_rows(activation, parts, x, down, up, indices, gates):
    indices = _from_first_row(indices, down)
    y, kept = parts.mix(gather(x), down, up, indices, gather(gates), activation)
    return scatter_sum(y).astype(x.dtype), kept


def _mix_rows_backward(activation, parts, x, down, up, indices, gates, kept, dy):
    indices = _from_first_row(indices, down)
    dx, d_down, d_up, d_gates = parts.mix_backward(
        gather(x), down, up, indices, gather(gates), activation, kept, gather(dy)
    )
    d_gates = scatter_sum(d_gates).astype(gates.dtype)
    d_down, d_up = _sum_of_copies(d_down), _sum_of_copies(d_up)
    return scatter_sum(dx).astype(x.dtype), d_down.astype(down.dtype), d_up.astype(up.dtype), d_gates


def _mix_columns(activation, parts, x, down, up, indices, gates):
    columns, indices, all_gates = _to_columns(x), gather(indices), gather(gates)
    s = _sum(parts.dots(columns, down, indices))
    y = parts.sums(all_gates.astype(jnp.float32) * activation(s), up, indices, x.dtype)
    return _to_tokens(y), keep(_own_tokens(s, x.shape[0]))


def _mix_columns_backward(activation, parts, x, down, up, indices, gates, s, dy):
    t, dtype, gates_dtype = x.shape[0], x.dtype, gates.dtype
    x, dy, indices = _to_columns(x), _to_columns(dy), gather(indices)
    g, s = gather(gates).astype(jnp.float32), gather(s)
    a, slope = jax.jvp(activation, (s,), (jnp.ones_like(s),))
    q = _sum(parts.dots(dy, up, indices))
    ds = q * g * slope
    dx = _to_tokens(parts.sums(ds, down, indices, dtype))
    d_down, d_up = (_sum_of_copies(table) for table in parts.gradients(indices, down.shape[0], (ds, x), (g * a, dy)))
    return dx, d_down.astype(down.dtype), d_up.astype(up.dtype), _own_tokens(q * a, t).astype(gates_dtype)


# value_bag.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bag(parts, values, indices, gates):
    return _bag_forward(parts, values, indices, gates)[0]


def _bag_forward(parts, values, indices, gates):
    forward = functools.partial(_bag_rows if _by_rows() else _bag_columns, parts)
    y = on_each_device(forward, (_table(), TOKENS, TOKENS), TOKENS)(values, indices, gates)
    return y, (values, indices, gates)


def _bag_backward(parts, residuals, dy):
    values, indices, gates = residuals
    table = _table()
    backward = functools.partial(_bag_rows_backward if _by_rows() else _bag_columns_backward, parts)
    in_specs = table, TOKENS, TOKENS, TOKENS
    d_values, d_gates = on_each_device(backward, in_specs, (table, TOKENS))(values, indices, gates, dy)
    return d_values, None, d_gates


_bag.defvjp(_bag_forward, _bag_backward)


def _bag_rows(parts, values, indices, gates):
    return scatter_sum(parts.bag(values, _from_first_row(indices, values), gather(gates))).astype(gates.dtype)


def _bag_rows_backward(parts, values, indices, gates, dy):
    d_values, d_gates = parts.bag_backward(values, _from_first_row(indices, values), gather(gates), gather(dy))
    return _sum_of_copies(d_values).astype(values.dtype), scatter_sum(d_gates).astype(gates.dtype)


def _bag_columns(parts, values, indices, gates):
    return _to_tokens(parts.sums(gather(gates), values, gather(indices), gates.dtype))


def _bag_columns_backward(parts, values, indices, gates, dy):
    dy, indices, all_gates = _to_columns(dy), gather(indices), gather(gates)
    d_gates = scatter_sum(parts.dots(dy, values, indices))
    (d_values,) = parts.gradients(indices, values.shape[0], (all_gates.astype(jnp.float32), dy))
    return _sum_of_copies(d_values).astype(values.dtype), d_gates.astype(gates.dtype)
