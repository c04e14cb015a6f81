"""update_by_rows against the same update in NumPy, whatever number of rows it takes at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from peer_jax.training.update_by_rows import update_by_rows


def update(table, moment, gradient):
    """A step of momentum, and two sums over all rows."""
    moment = 0.5 * moment + gradient
    table = table - 0.25 * moment
    return (table, moment), jnp.stack([jnp.sum(table * table), jnp.sum(gradient)])


# The table has 7 rows.
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 100])
def test_equals_numpy(rng, rows, monkeypatch):
    monkeypatch.setattr("peer_jax.training.update_by_rows.ROWS_BUDGET", rows * 4 * 5)
    table, moment, gradient = rng.normal(size=(3, 7, 5)).astype(np.float32)
    step = jax.jit(lambda table, moment, gradient: update_by_rows(update, (table, moment), gradient))
    (new_table, new_moment), sums = step(table, moment, gradient)
    wide = [a.astype(np.float64) for a in (table, moment, gradient)]
    expected_moment = 0.5 * wide[1] + wide[2]
    expected_table = wide[0] - 0.25 * expected_moment
    # Sums of 35 float32 terms.
    assert relative_error(new_table, expected_table) < 1e-6
    assert relative_error(new_moment, expected_moment) < 1e-6
    assert relative_error(sums, [np.sum(expected_table**2), np.sum(wide[2])]) < 1e-6


# The table has 7 rows; there is room for 5.
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("touched", [[], [0], [2, 6], [0, 1, 3, 6], [1, 2, 3, 4, 5]])
def test_some_rows_equal_numpy(rng, size, touched, monkeypatch):
    """All other rows are those of ``onto``, here a decayed moment, which the update does not read."""
    monkeypatch.setattr("peer_jax.training.update_by_rows.ROWS_BUDGET", size * 4 * 5)
    table, moment = rng.normal(size=(2, 7, 5)).astype(np.float32)
    rows = np.array([*touched, *range(7, 12 - len(touched))], np.int32)
    gradient = np.zeros((5, 5), np.float32)
    gradient[: len(touched)] = rng.normal(size=(len(touched), 5))

    def change(table, moment, gradient):
        new = table - gradient * (1 + moment)
        return (new, 0.5 * moment + gradient), jnp.stack([jnp.sum(gradient), jnp.sum(new - table)])

    @jax.jit
    def step(table, moment, gradient, rows):
        onto = table, 0.5 * moment
        return update_by_rows(change, (table, moment), gradient, rows=rows, onto=onto)

    (new_table, new_moment), sums = step(table, moment, gradient, rows)
    expected_table, expected_moment = table.astype(np.float64), 0.5 * moment.astype(np.float64)
    own = gradient[: len(touched)].astype(np.float64)
    expected_table[touched] -= own * (1 + moment[touched].astype(np.float64))
    expected_moment[touched] += own
    assert relative_error(new_table, expected_table) < 1e-6
    assert relative_error(new_moment, expected_moment) < 1e-6
    np.testing.assert_allclose(sums, [own.sum(), (expected_table - table).sum()], atol=1e-5)


def test_a_scalar_is_updated_whole():
    (table, moment), _ = update_by_rows(update, (jnp.float32(1), jnp.float32(2)), jnp.float32(3))
    assert (table, moment) == (0, 4)
