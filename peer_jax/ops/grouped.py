"""Products of rows that are sorted by group with the kernel of their group: MoE's experts without a capacity.

m  rows     G  groups     i  width of a row     o  width of a product     T  rows of a tile
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from peer_jax.sharding import target

# Rows of a tile: at least and at most so many.
LEAST, MOST = 16, 512


def grouped_product(
    rows: Float[Array, "m i"], kernels: Float[Array, "G i o"], sizes: Int[Array, " G"]
) -> Float[Array, "m o"]:
    """Each row times the kernel of its group, in the type of ``rows``, to which the kernels are cast.

    The first ``sizes[0]`` rows are of group 0, and so on. The products of rows behind the last group are not defined.
    Gradients of kernels add up in float32.

    On TPUs this is ``jax.lax.ragged_dot``, for which there is a kernel. XLA has none for other devices, where it would
    multiply every row by every kernel: there, tiles of rows are gone through, each with the groups that it has.
    """
    return _product.bind(rows, kernels, sizes, transposed=False, tiled=target().platform != "tpu")


# The product is linear in its rows and in its kernels, and so is what it is differentiated to. As two primitives that
# are each other's transposes, they have derivatives of any order and in any mode.


def _products(
    rows: Float[Array, "m i"],
    kernels: Float[Array, "G i o"] | Float[Array, "G o i"],
    sizes: Int[Array, " G"],
    *,
    transposed: bool,
    tiled: bool,
) -> Float[Array, "m o"]:
    if not tiled:
        numbers = (((1,), (2 if transposed else 1,)), ((), ()))
        numbers = jax.lax.RaggedDotDimensionNumbers(numbers, lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
        return jax.lax.ragged_dot_general(rows, kernels.astype(rows.dtype), sizes, numbers)

    def visit(y: Array, group: Array, tile: Callable[[Array], Array], put: Callable[[Array, Array], Array]) -> Array:
        kernel = kernels[group].astype(rows.dtype)
        return put(y, tile(rows) @ (kernel.T if transposed else kernel))

    zeros = jnp.zeros((len(rows), kernels.shape[1 if transposed else 2]), rows.dtype)
    return _visit_tiles(visit, zeros, len(rows), sizes)


def _sums_of_outer_products(
    rows: Float[Array, "m i"], others: Float[Array, "m o"], sizes: Int[Array, " G"], *, dtype: Any, tiled: bool
) -> Float[Array, "G i o"]:
    """Over the rows of each group; the gradient of kernels of the type ``dtype``."""
    if not tiled:
        numbers = (((0,), (0,)), ((), ()))
        numbers = jax.lax.RaggedDotDimensionNumbers(numbers, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
        product = functools.partial(jax.lax.ragged_dot_general, preferred_element_type=jnp.float32)
        return product(rows, others, sizes, numbers).astype(dtype)

    def visit(sums: Array, group: Array, tile: Callable[[Array], Array], put: Callable[[Array, Array], Array]) -> Array:
        return sums.at[group].add(jnp.dot(tile(rows).T, tile(others), preferred_element_type=jnp.float32))

    zeros = jnp.zeros((len(sizes), rows.shape[1], others.shape[1]), jnp.float32)
    return _visit_tiles(visit, zeros, len(rows), sizes).astype(dtype)


def _primitive(
    name: str,
    function: Callable[..., Array],
    options: tuple[str, ...],
    transposes: tuple[Callable[..., Array], Callable[..., Array]],
) -> Primitive:
    """``function`` of two arrays in which it is linear, of sizes of groups and of ``options``.

    ``transposes`` has a rule for each of the two arrays.
    """
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function, static_argnames=options))

    @primitive.def_abstract_eval
    def abstract(*arrays, **options):
        made = jax.eval_shape(functools.partial(function, **options), *arrays)
        return jax.core.ShapedArray(made.shape, made.dtype)

    def transpose(cotangent, first, second, sizes, **options):
        if isinstance(cotangent, ad.Zero):
            return None, None, None
        if ad.is_undefined_primal(first):
            return transposes[0](cotangent, second, sizes, first.aval, **options), None, None
        return None, transposes[1](cotangent, first, sizes, second.aval, **options), None

    def batch(arrays, axes, **options):
        along = {n: jnp.moveaxis(arrays[n], axis, 0) for n, axis in enumerate(axes) if axis is not None}

        def one(mapped: dict[int, Array]) -> Array:
            return primitive.bind(*(mapped.get(n, a) for n, a in enumerate(arrays)), **options)

        return jax.lax.map(one, along), 0

    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.defjvp(
        primitive,
        lambda first, _, second, sizes, **options: primitive.bind(first, second, sizes, **options),
        lambda second, first, _, sizes, **options: primitive.bind(first, second, sizes, **options),
        None,
    )
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return primitive


def _visit_tiles(visit: Callable[..., Any], carry: Any, m: int, sizes: Int[Array, " G"]) -> Any:
    """``carry = visit(carry, group, tile, put)`` for every tile of rows and every group with rows in it.

    ``tile(a)`` is the tile of an array [m, ...], with zeros in place of other groups' rows; ``put(a, b)`` adds the tile
    b to that of a.
    """
    size = min(m, max(LEAST, min(MOST, 2 ** int(math.log2(max(1, m / len(sizes) / 2))))))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // size
    number = jnp.where(sizes > 0, (ends - 1) // size - first + 1, 0)
    visited = jnp.cumsum(number)

    def step(index: Array, carry: Any) -> Any:
        group = jnp.sum(visited <= index)
        begin = (first[group] + index - visited[group] + number[group]) * size
        # The last tile ends with the last row. It may overlap the one before, whose rows are not its own.
        start = jnp.minimum(begin, m - size)
        row = start + jnp.arange(size)
        own = (row >= jnp.maximum(starts[group], begin)) & (row < ends[group])

        def tile(a: Array) -> Array:
            return jnp.where(own[:, None], jax.lax.dynamic_slice_in_dim(a, start, size), 0)

        def put(a: Array, b: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(a, jax.lax.dynamic_slice_in_dim(a, start, size) + b, start, 0)

        return visit(carry, group, tile, put)

    return jax.lax.fori_loop(0, visited[-1], step, carry)


def _swap(kernels: Array, transposed: bool) -> Array:
    return jnp.swapaxes(kernels, 1, 2) if transposed else kernels


_product = _primitive(
    "grouped_product",
    _products,
    ("transposed", "tiled"),
    (
        lambda dy, kernels, sizes, rows, *, transposed, tiled: _product.bind(
            dy, kernels, sizes, transposed=not transposed, tiled=tiled
        ),
        lambda dy, rows, sizes, kernels, *, transposed, tiled: _swap(
            _outer.bind(rows, dy, sizes, dtype=kernels.dtype, tiled=tiled), transposed
        ),
    ),
)
_outer = _primitive(
    "grouped_outer_products",
    _sums_of_outer_products,
    ("dtype", "tiled"),
    (
        lambda d_sums, others, sizes, rows, *, dtype, tiled: _product.bind(
            others, d_sums, sizes, transposed=True, tiled=tiled
        ),
        lambda d_sums, rows, sizes, others, *, dtype, tiled: _product.bind(
            rows, d_sums, sizes, transposed=False, tiled=tiled
        ),
    ),
)
