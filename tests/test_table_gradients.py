"""Gradients of a table, added up in the order of the tokens or of the rows, or a row at a time, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from peer_jax.ops.cpu.table_gradients import in_token_order, row_by_row
from peer_jax.ops.table_gradients import in_row_order, table_gradients

ORDERS = {"tokens": in_token_order, "rows": in_row_order, "row by row": row_by_row}
# name: T, r, d, N; and the share of the pairs that retrieve row 0 whatever the others do
SIZES = {
    "one pair": (1, 1, 3, 4, 0),
    "ragged": (37, 5, 6, 23, 0),
    "one row": (19, 4, 2, 1, 0),
    "several chunks": (301, 3, 5, 7, 0),
    "many rows": (31, 5, 3, 500, 0),
    "a hot row": (150, 4, 3, 200, 0.6),
}


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
def test_all_orders_equal_loops(rng, order, size, dtype):
    T, r, d, N, hot = SIZES[size]
    indices = np.where(rng.random((T, r)) < hot, 0, rng.integers(0, N, (T, r))).astype(np.int32)
    terms = tuple((rng.normal(size=(T, r)).astype(np.float32), rng.normal(size=(T, d)).astype(dtype)) for _ in range(2))
    tables = jitted(order)(indices, N, terms)
    for table, term in zip(tables, terms, strict=True):
        assert table.dtype == jnp.float32
        # Sums of up to T * r = 903 float32 terms.
        assert relative_error(table, loops(indices, N, *term)) < 1e-5


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_rows", [3, 50, 5000])
@pytest.mark.parametrize("order", ORDERS)
def test_nan_stays_in_the_rows_that_its_token_retrieved(rng, order, num_rows):
    T, r, d = 37, 5, 6
    indices = rng.integers(0, num_rows, (T, r), np.int32)
    cotangents = rng.normal(size=(T, d)).astype(np.float32)
    spoilt = cotangents.copy()
    spoilt[[0, 20, -1]] = np.nan  # among them the first and the last token, which padding must not use
    weights = rng.normal(size=(T, r)).astype(np.float32)
    clean, bad = (np.asarray(jitted(order)(indices, num_rows, ((weights, a),))[0]) for a in (cotangents, spoilt))
    touched = np.isin(np.arange(num_rows), indices[[0, 20, -1]])
    assert np.isnan(bad[touched]).all()
    np.testing.assert_array_equal(bad[~touched], clean[~touched])


@pytest.mark.usefixtures("small_chunks")
def test_rows_are_sorted_where_xla_is_told_so(rng, monkeypatch):
    """They are sorted up to the end of the last chunk, which is padded."""
    chunks = []

    def scan(body, carry, tokens, num_tokens, size):
        assert num_tokens % size == 0
        chunks.append(tokens[0])
        return carry, None

    monkeypatch.setattr("peer_jax.ops.table_gradients.scan_chunks", scan)
    indices = jnp.asarray(rng.integers(0, 5000, (37, 5)), jnp.int32)
    in_row_order(indices, 5000, ((jnp.ones((37, 5)), jnp.ones((37, 6))),))
    (row,) = chunks
    assert row.size > indices.size
    np.testing.assert_array_equal(row, np.sort(row))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_rows", [3, 700])
def test_two_runs_are_bitwise_equal(rng, order, num_rows):
    indices = rng.integers(0, num_rows, (256, 8), np.int32)
    terms = ((rng.normal(size=(256, 8)).astype(np.float32), rng.normal(size=(256, 4)).astype(np.float32)),)
    np.testing.assert_array_equal(*(jitted(order)(indices, num_rows, terms)[0] for _ in range(2)))


@pytest.mark.parametrize(
    ("platform", "num_rows", "order"),
    [
        ("cpu", 9, "tokens"),
        ("cpu", 2**20, "tokens"),
        ("cpu", 2**20 + 1, "row by row"),
        ("cpu", 2**23, "row by row"),
        ("cpu", 2**23 + 1, "rows"),
        ("cuda", 9, "rows"),
        ("tpu", 9, "rows"),
    ],
)
def test_pairs_are_sorted_where_it_pays_and_where_a_scatter_has_no_order(platform, num_rows, order):
    """On CPU, tables of up to 64 MiB, which here have 16 float32 per row, are filled in the order of the tokens.

    Larger ones are written row by row, unless they have more than eight rows per pair; here there are 2**20 pairs.
    """
    indices = jax.ShapeDtypeStruct((2**17, 8), jnp.int32)
    term = jax.ShapeDtypeStruct((2**17, 8), jnp.float32), jax.ShapeDtypeStruct((2**17, 16), jnp.float32)
    gradients = jax.jit(lambda indices, *term: table_gradients(indices, num_rows, term))
    text = gradients.trace(indices, *term).lower(lowering_platforms=(platform,)).as_text()
    # Only "row by row" has barriers, only "tokens" does not sort.
    found = "row by row" if "optimization_barrier" in text else "rows" if "stablehlo.sort" in text else "tokens"
    assert found == order
