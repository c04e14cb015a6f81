"""Rounding of updated parameters to bfloat16: what is kept of a number, and steps that are too small for bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peer_jax.training import rounding
from peer_jax.training.optimizer import AdamW, label_params

STEPS, RATE = 1000, 2**-14


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax's bias correction raises a float to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def numbers(rng):
    """Of all sizes and both signs, with powers of two, numbers just below them, and such as bfloat16 has."""
    drawn = (rng.normal(size=40) * 2.0 ** rng.integers(-130, 120, 40)).astype(np.float32)
    powers = np.float32(2.0) ** np.array([-126, -3, 0, 5, 100], np.float32)
    return np.concatenate([drawn, powers, -np.nextafter(powers, np.float32(0)), np.float32([0, 1.5, -0.0078125])])


def test_infinities_and_nan_stay():
    x = jnp.float32([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(np.asarray(rounding.compensated(x, jnp.bfloat16)[0].astype(jnp.float32)), x)


def test_what_is_lost_is_kept_to_17_bits(rng):
    """Compiled, since XLA may take a conversion to bfloat16 and back for none."""
    x = numbers(rng)
    x = x[np.abs(x) > 2.0**-100]  # whose remainders are normal numbers
    compensated = jax.jit(functools.partial(rounding.compensated, dtype=jnp.bfloat16))
    high, low = (np.asarray(of.astype(jnp.float32)).astype(np.float64) for of in compensated(x))
    assert (np.abs(x - high) <= 2.0**-8 * np.abs(x)).all()
    assert (np.abs(x - high - low) <= 2.0**-17 * np.abs(x)).all()
    np.testing.assert_array_equal(high, np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)))


def after_tiny_steps(form, dtype):
    """Parameters that begin at 1, after 1000 steps of 2^-14 downwards, where neighbours in bfloat16 are 2^-8 apart."""
    params = nnx.state(nnx.Dict(kernel=nnx.Param(jnp.ones((64, 64), dtype))), nnx.Param)
    labels = label_params(params)
    optimizer = AdamW(learning_rate=RATE, weight_decay=0.0, clip_norm=None, b1=0.0, b2=0.0, eps=1e-30, rounding=form)

    def step(carry, _):
        params, state = carry
        params, state, _ = optimizer.update(labels, params, jax.tree.map(jnp.ones_like, params), state, rates)
        return (params, state), None

    rates = {"backbone": RATE}
    first = (params, optimizer.init(labels, params))
    (params, _), _ = jax.jit(functools.partial(jax.lax.scan, step, length=STEPS))(first, None)
    return np.asarray(params["kernel"].get_value().astype(jnp.float32)).astype(np.float64)


def test_steps_too_small_for_bfloat16():
    exact = 1 - STEPS * RATE
    assert np.abs(after_tiny_steps("nearest", jnp.float32) - exact).max() < STEPS * 2.0**-25
    assert (after_tiny_steps("nearest", jnp.bfloat16) == 1).all()
    # What is kept of a parameter below 1 is off by 2^-18 after each step, and what the forward pass sees by 2^-9.
    assert np.abs(after_tiny_steps("compensated", jnp.bfloat16) - exact).max() < STEPS * 2.0**-18 + 2.0**-9
