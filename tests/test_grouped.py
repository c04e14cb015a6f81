"""Products of rows with the kernel of their group, against loops in float64; and what a TPU gets."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Device

from peer_jax.ops.grouped import grouped_product
from peer_jax.sharding import compiled_for

I, O = 5, 3  # noqa: E741
SIZES = {
    "tiles that groups share": [7, 25, 0, 40, 1],
    "all rows in the last group": [0, 0, 0, 0, 73],
    "rows behind the last group": [0, 3, 30, 0, 0],
    "no rows in any group": [0, 0, 0, 0, 0],
    "fewer rows than a tile": [1, 2, 0, 0, 0],
}


def by_hand(rows, kernels, sizes, dy):
    """The product and its gradients, row by row; rows without a group have none."""
    y, d_rows, d_kernels = np.zeros((len(rows), O)), np.zeros(rows.shape), np.zeros(kernels.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = rows[row] @ kernels[group]
        d_rows[row] = kernels[group] @ dy[row]
        d_kernels[group] += np.outer(rows[row], dy[row])
    return y, d_rows, d_kernels


@jax.jit
def run(rows, kernels, sizes, dy):
    y, pullback = jax.vjp(lambda rows, kernels: grouped_product(rows, kernels, sizes), rows, kernels)
    return y, *pullback(dy)


# Sums of at most 73 products: in float32 as many roundings of 2^-24; in bfloat16 one of 2^-9 of what float32 added up.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 73 * 2**-24), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_gradients(rng, name, dtype, tolerance):
    sizes = np.array(SIZES[name], np.int32)
    m = 3 if name == "fewer rows than a tile" else 73
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, I), (5, I, O), (m, O))]
    rows, kernels, dy = (np.asarray(a, np.float64) for a in arrays)
    found = run(arrays[0], arrays[1].astype(jnp.float32), sizes, arrays[2])
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32]
    for a, b in zip(found, by_hand(rows, kernels, sizes, dy), strict=True):
        a = np.asarray(a, np.float64)
        if len(a) == m:
            a = np.where(np.arange(m)[:, None] < sizes.sum(), a, 0)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def test_examples_of_a_batch(rng):
    """Also where only one of the arrays has a batch axis, as for gradients per example."""
    sizes = jnp.asarray(SIZES["tiles that groups share"], jnp.int32)
    rows, kernels = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 73, I), (5, I, O)))
    together = jax.jit(jax.vmap(lambda rows: grouped_product(rows, kernels, sizes)))(rows)
    for y, own in zip(together, rows, strict=True):
        np.testing.assert_array_equal(y, grouped_product(own, kernels, sizes))


@pytest.mark.parametrize(("platform", "ragged"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_only_tpus_get_ragged_products(platform, ragged):
    """Elsewhere XLA would hold every row once per group."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((640, I), (5, I, O), (640, O))]
    with compiled_for(Device(platform)):
        traced = jax.jit(run.__wrapped__).trace(*shapes[:2], jax.ShapeDtypeStruct((5,), jnp.int32), shapes[2])
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == ragged
    largest = max(math.prod(map(int, shape.split("x"))) for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x\w+>", text))
    assert largest < 5 * 640 * O


def test_a_second_product_compiles_nothing(rng):
    rows = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    kernels, sizes = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32), jnp.asarray([5, 3])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    grouped_product(rows, kernels, sizes)
    assert compiled
    compiled.clear()
    grouped_product(rows, kernels, sizes)
    assert not compiled
