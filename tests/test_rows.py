"""Gradients of a table, added up in the order of the tokens (CPU) or of the rows (elsewhere), against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from peer_jax.ops.rows import _in_row_order, _in_token_order, table_gradients

ORDERS = {"tokens": _in_token_order, "rows": _in_row_order}
# name: T, r, d, N
SIZES = {"one pair": (1, 1, 3, 4), "ragged": (37, 5, 6, 23), "one row": (19, 4, 2, 1), "several chunks": (301, 3, 5, 7)}


def loops(indices, num_rows, weights, cotangents):
    table = np.zeros((num_rows, cotangents.shape[1]))
    for t, row in enumerate(indices):
        for j, i in enumerate(row):
            table[i] += float(weights[t, j]) * cotangents[t].astype(np.float64)
    return table


@functools.cache
def jitted(order):
    return jax.jit(ORDERS[order], static_argnums=1)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("peer_jax.ops.chunks.CPU_BUDGET", 2**10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_both_orders_equal_loops(rng, order, size, dtype):
    T, r, d, N = SIZES[size]
    indices = rng.integers(0, N, (T, r), np.int32)
    terms = tuple((rng.normal(size=(T, r)).astype(np.float32), rng.normal(size=(T, d)).astype(dtype)) for _ in range(2))
    tables = jitted(order)(indices, N, terms)
    for table, term in zip(tables, terms, strict=True):
        assert table.dtype == jnp.float32
        # Sums of up to T * r = 903 float32 terms.
        assert relative_error(table, loops(indices, N, *term)) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_two_runs_are_bitwise_equal(rng, order):
    indices = rng.integers(0, 3, (256, 8), np.int32)
    terms = ((rng.normal(size=(256, 8)).astype(np.float32), rng.normal(size=(256, 4)).astype(np.float32)),)
    np.testing.assert_array_equal(*(jitted(order)(indices, 3, terms)[0] for _ in range(2)))


@pytest.mark.parametrize(
    ("platform", "num_rows", "sorts"),
    [("cpu", 9, False), ("cpu", 2**22, False), ("cpu", 2**22 + 1, True), ("cuda", 9, True), ("tpu", 9, True)],
)
def test_pairs_are_sorted_where_it_pays_and_where_a_scatter_has_no_order(platform, num_rows, sorts):
    """On CPU tables of up to 256 MiB, here of 16 float32 a row, are filled in the tokens' order."""
    indices = jax.ShapeDtypeStruct((64, 8), jnp.int32)
    term = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.float32)
    gradients = jax.jit(lambda indices, *term: table_gradients(indices, num_rows, term))
    text = gradients.trace(indices, *term).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.sort" in text) is sorts
