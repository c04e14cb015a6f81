"""Products with rows and weighted sums of rows against NumPy in float64, for every form that a CPU uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from peer_jax.ops.cpu import KEEPS_BARRIERS
from peer_jax.ops.rows import dot_rows, sum_rows

# Widths: no multiple of 16 parts, narrow, wide. Numbers of rows per token: a CPU takes these 1, 4, 8 and 16 at a time.
WIDTHS = (6, 16, 48, 128, 144, 256)
ROWS = (1, 5, 12, 8, 48)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("r", ROWS)
@pytest.mark.parametrize("d", WIDTHS)
def test_equal_float64(rng, d, r, dtype):
    t, N = 7, 29
    table, x = (jnp.asarray(rng.normal(size=(n, d)), dtype) for n in (N, t))
    weights = rng.normal(size=(t, r)).astype(np.float32)
    indices = rng.integers(0, N, (t, r), np.int32)
    rows, exact = (np.asarray(a, np.float64) for a in (table, x))
    rows = rows[indices]
    products = jax.jit(dot_rows)(x, table, indices)
    sums = jax.jit(sum_rows, static_argnums=3)(weights, table, indices, table.dtype)
    assert products.dtype == sums.dtype == jnp.float32
    # Inputs are exact; up to 256 float32 terms are added.
    assert relative_error(products, np.einsum("td,trd->tr", exact, rows)) < 1e-5
    assert relative_error(sums, np.einsum("tr,trd->td", weights.astype(np.float64), rows)) < 1e-5


def test_barriers_keep_operations_from_being_fused():
    program = jax.jit(lambda x: jax.lax.optimization_barrier(x + 1) * 2).lower(jnp.ones((8, 8))).compile().as_text()
    assert program.count(" fusion(") == (2 if KEEPS_BARRIERS else 1)
