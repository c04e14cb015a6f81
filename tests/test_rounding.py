"""Rounding of updated parameters to bfloat16: expectations over all bits, and steps that are too small for it."""

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


def test_the_expectation_of_stochastic_rounding_is_the_number(rng):
    """Over all 2^16 values of the bits, exactly; and only the two neighbours in bfloat16 occur."""
    x, bits = numbers(rng), np.arange(2**16, dtype=np.uint16)
    shape = (len(x), len(bits))
    rounded = jax.jit(rounding.stochastic)(np.broadcast_to(x[:, None], shape), np.broadcast_to(bits, shape))
    values = np.asarray(rounded.astype(jnp.float32)).astype(np.float64)
    np.testing.assert_array_equal(values.mean(axis=1), x.astype(np.float64))
    spread = values.max(axis=1) - values.min(axis=1)
    assert (spread <= 2.0**-7 * np.abs(x)).all()
    assert all(len(np.unique(row)) <= 2 for row in values)


def test_infinities_and_nan_stay():
    x = jnp.float32([jnp.inf, -jnp.inf, jnp.nan])
    for bits in (0, 2**16 - 1):
        rounded = rounding.stochastic(x, jnp.full(3, bits, jnp.uint16))
        np.testing.assert_array_equal(np.asarray(rounded.astype(jnp.float32)), x)
    np.testing.assert_array_equal(np.asarray(rounding.compensated(x, jnp.bfloat16)[0].astype(jnp.float32)), x)


def test_bits_are_uniform_and_of_their_step_and_place():
    """Each of the 16 bits is set in half of n draws, within five standard deviations, and half agree with others'."""
    n = 2**14
    draws = [rounding.random_bits(jnp.int32(step), place, (n,)) for step, place in ((3, 0), (4, 0), (3, 1))]
    bits = np.stack([(np.asarray(of)[:, None] >> np.arange(16)) & 1 for of in draws])
    bound = 5 * 0.5 / np.sqrt(n)
    assert np.abs(bits.mean(axis=1) - 0.5).max() < bound
    for other in bits[1:]:
        assert np.abs((bits[0] == other).mean(axis=0) - 0.5).max() < bound
    np.testing.assert_array_equal(draws[0], rounding.random_bits(jnp.int32(3), 0, (n,)))


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
    # Each step adds a variance of at most RATE * 2^-8, the step times the distance of neighbours below 1.
    by_chance = after_tiny_steps("stochastic", jnp.bfloat16)
    assert abs(by_chance.mean() - exact) < 5 * np.sqrt(STEPS * RATE * 2.0**-8 / by_chance.size)
    assert by_chance.std() > 0
