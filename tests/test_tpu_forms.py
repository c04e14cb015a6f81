"""What TPUs run instead of plain gathers, sums and scatters, computed on CPU: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Device

from peer_jax.ops import expert_mix, value_bag
from peer_jax.ops.rows import cast_whole
from peer_jax.ops.top_k import take_columns
from peer_jax.ops.tpu import columns, rows
from peer_jax.sharding import compiled_for


@pytest.mark.parametrize(("n", "k", "m"), [(5, 3, 2), (50, 16, 130), (1024, 4, 129)])
def test_spread_columns(rng, n, k, m):
    x, place = rng.normal(size=(k, m)).astype(np.float32), rng.integers(0, n, (k, m)).astype(np.int32)
    place[-1] = place[0]  # a place that occurs twice
    expected = np.zeros((n, m))
    np.add.at(expected, (place, np.arange(m)), x)
    np.testing.assert_allclose(
        columns.spread_columns(jnp.asarray(x), jnp.asarray(place), n, interpret=True), expected, rtol=1e-6, atol=1e-6
    )


def test_take_columns(rng):
    x, place = rng.integers(0, 2**31, (50, 7)).astype(np.int32), rng.integers(0, 50, (16, 7)).astype(np.int32)
    with compiled_for(Device("tpu")):
        taken = take_columns(jnp.asarray(x), jnp.asarray(place))
    np.testing.assert_array_equal(taken, np.take_along_axis(x, place, axis=0))


def test_products_in_groups(rng):
    """Products of bfloat16 are exact in float32, so only the order of sums differs; weights keep all of their bits."""
    x, table = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((16, 40), (30, 40)))
    indices, weights = jnp.asarray(rng.integers(0, 30, (16, 6))), jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    chosen = np.asarray(table, np.float64)[indices]
    dots = np.einsum("td,trd->tr", np.asarray(x, np.float64), chosen)
    np.testing.assert_allclose(rows.dot_rows(x, table, indices), dots, rtol=1e-5, atol=1e-5)
    sums = np.einsum("tr,trd->td", np.asarray(weights, np.float64), chosen)
    np.testing.assert_allclose(rows.sum_rows(weights, table, indices), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [20, 400])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ops_and_their_gradients_are_those_of_other_devices(rng, num_rows, dtype):
    """Tables that are cast whole and tables whose rows are cast; 12 tokens are no whole groups, 16 are."""
    for tokens in (12, 16):
        x = jnp.asarray(rng.normal(size=(tokens, 8)), dtype)
        tables = [jnp.asarray(rng.normal(size=(num_rows, 8)), jnp.float32) for _ in range(2)]
        indices = jnp.asarray(rng.integers(0, num_rows, (tokens, 2, 4)), jnp.int32)
        gates = jnp.asarray(rng.normal(size=indices.shape), dtype)

        def loss(x, down, up, gates, indices=indices):
            y = expert_mix(x, down, up, indices, gates, jax.nn.gelu, implementation="xla")
            return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(
                jnp.cos(value_bag(up, indices, gates, implementation="xla").astype(jnp.float32))
            )

        expected = jax.value_and_grad(loss, (0, 1, 2, 3))(x, *tables, gates)
        with compiled_for(Device("tpu")):
            found = jax.value_and_grad(loss, (0, 1, 2, 3))(x, *tables, gates)
        # What is rounded to bfloat16 on its way may differ in its last bit, 2^-8 of it.
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_which_tables_are_cast_whole():
    table, bfloat16 = jnp.ones((10, 4)), jnp.dtype(jnp.bfloat16)
    with compiled_for(Device("tpu")):
        assert cast_whole(table, bfloat16, 10).dtype == bfloat16
        assert cast_whole(table, bfloat16, 9).dtype == jnp.float32
    assert cast_whole(table, bfloat16, 10).dtype == jnp.float32
