"""Entmax against bisection in float64: ties, one score, large and masked scores; derivatives against differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from peer_jax.ops.entmax import entmax15

# Roundings of 6e-8 of a threshold of at most 1, and of sums of weights that are as exact.
FP32 = 2e-6


def draw(shape, size):
    return (np.random.default_rng(0).normal(size=shape) * size).astype(np.float32)


ROWS = {
    "one score": np.float32([[3.5], [-2.0], [0.0]]),
    "two scores": draw((50, 2), 1.0),
    **{f"64 scores of size {size}": draw((8, 64), size) for size in (1e-3, 0.1, 1.0, 10.0)},
    "many scores": draw((2, 5000), 2.0),
    "all alike": np.full((1, 37), -0.7, np.float32),
    "ties": np.float32([[1, 1, 0, 0, 0, 1], [2, 2, 2, -1, -1, -1], [0, 0, 0, 0, 0, 1]]),
    "on the edge of the support": np.float32([[0, -2], [0, -1.999999], [0, -2.000001]]),
    "large": np.float32([[1e30, 1e30, -1e30], [3e38, -3e38, 0], [1e8, 1e8 - 16, 1e8 + 16]]),
    "masked": np.float32([[1, -np.inf, 0.5, -np.inf], [-np.inf, -np.inf, -np.inf, -4], [0, 0, -np.inf, 0]]),
    "leading axes": draw((2, 3, 4, 5), 1.0),
}
weights = jax.jit(entmax15)


@pytest.mark.parametrize("name", ROWS)
def test_weights_are_those_of_bisection(name):
    scores = ROWS[name]
    found, expected = np.asarray(weights(scores)), reference.entmax15(scores.astype(np.float64))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < FP32
    np.testing.assert_allclose(np.sum(found, axis=-1, dtype=np.float64), 1, atol=FP32)
    # Zero is exact.
    assert np.all(found[expected == 0] < 1e-12)
    assert np.all(found[np.isneginf(scores)] == 0)


def test_masked_scores_change_nothing():
    scores = draw((4, 6), 1.0)
    masked = np.insert(scores, [0, 2, 6], -np.inf, axis=-1)
    np.testing.assert_array_equal(np.delete(weights(masked), [0, 3, 8], axis=-1), weights(scores))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_says_so_and_no_other_row_does(value):
    scores = draw((3, 4), 1.0)
    scores[1, 2] = value
    found = weights(scores)
    assert np.isnan(found[1]).any()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()
    assert np.isnan(weights(np.full((1, 3), -np.inf, np.float32))).all()


def test_the_type_stays():
    assert weights(jnp.zeros((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


# Derivatives


def jacobian(scores, eps=1e-6):
    """By central differences of the bisection, [n, n]."""
    steps = eps * np.eye(len(scores))
    return (reference.entmax15(scores + steps) - reference.entmax15(scores - steps)).T / (2 * eps)


# A difference in float64 errs by 1e-6; a derivative has terms up to 1.
DERIVATIVE = 1e-5


@pytest.mark.parametrize("name", ["one score", "two scores", "64 scores of size 1.0", "ties", "all alike"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivatives_are_those_of_bisection(name, mode):
    row = ROWS[name][0]
    found = jax.jit(mode(entmax15))(row)
    expected = jacobian(row.astype(np.float64))
    assert np.abs(found - expected).max() < DERIVATIVE
    assert np.abs(np.sum(found, axis=0)).max() < DERIVATIVE  # weights always sum to one


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivatives_beside_masked_and_large_scores(mode):
    """They are finite, zero for what has no weight, and those of the other scores alone."""
    row = np.float32([0.3, -np.inf, 0.1, -1e30, -0.4])
    found = np.array(jax.jit(mode(entmax15))(row))
    real = [0, 2, 4]
    assert np.abs(found[np.ix_(real, real)] - jacobian(row[real].astype(np.float64))).max() < DERIVATIVE
    found[np.ix_(real, real)] = 0
    np.testing.assert_array_equal(found, 0)


def test_second_derivatives():
    """Hessian-vector products, forward over reverse, against differences of the float64 Jacobian."""
    row, v, w = (draw((9,), size) for size in (1.0, 1.0, 0.5))
    v, w = v[::-1].copy(), np.roll(w, 3)
    grad = jax.grad(lambda s: jnp.vdot(w, entmax15(s)))
    found = jax.jit(lambda s: jax.jvp(grad, (s,), (v,))[1])(row)
    row, v, w = (a.astype(np.float64) for a in (row, v, w))
    jacobian_at = functools.partial(jacobian, eps=1e-5)
    expected = w @ (jacobian_at(row + 1e-3 * v) - jacobian_at(row - 1e-3 * v)) / 2e-3
    assert np.abs(expected).max() > 1e-2
    assert np.abs(found - expected).max() < 1e-4
