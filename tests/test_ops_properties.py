"""expert_mix and value_bag over any shape: against loops, and their gradients against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from peer_jax.ops import expert_mix, value_bag

IMPLEMENTATIONS = ["reference", "xla"]
# Few shapes, so that few programs are compiled: one token, k = 1, one expert, sizes that nothing divides.
SHAPES = [(1, 1, 1, 1, 1), (1, 7, 5, 2, 3), (13, 3, 1, 1, 4), (11, 5, 29, 3, 1), (33, 2, 7, 1, 5)]


@functools.cache
def mix(implementation):
    return jax.jit(functools.partial(expert_mix, activation=jax.nn.gelu, implementation=implementation))


@functools.cache
def bag(implementation):
    return jax.jit(functools.partial(value_bag, implementation=implementation))


@st.composite
def cases(draw):
    T, d, N, h, k = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = draw(st.integers(1, N))  # experts in use: the fewer there are, the more they repeat
    x, down, up = (rng.normal(size=(rows, d)).astype(np.float32) for rows in (T, N, N))
    return x, down, up, rng.integers(0, few, (T, h, k), np.int32), rng.normal(size=(T, h, k)).astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=40)
@given(cases())
def test_any_shape_equals_loops(implementation, case):
    x, down, up, indices, gates = case
    # float32 against float64; sums of up to 8 and then 6 terms that may cancel, so by their size, not the sum's.
    size = np.abs(reference.expert_mix(np.abs(x), np.abs(down), np.abs(up), indices, np.abs(gates), "gelu")).max()
    y = mix(implementation)(x, down, up, indices, gates)
    assert np.abs(y - reference.expert_mix(x, down, up, indices, gates, "gelu")).max() < 1e-6 * max(size, 1e-3)
    size = np.abs(reference.value_bag(np.abs(up), indices, np.abs(gates))).max()
    y = bag(implementation)(up, indices, gates)
    assert np.abs(y - reference.value_bag(up, indices, gates)).max() < 1e-6 * size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]])
def test_gradients_equal_finite_differences(rng, shape, implementation):
    T, d, N, h, k = shape
    x, down, up = (jnp.asarray(rng.normal(size=(rows, d)), jnp.float32) for rows in (T, N, N))
    indices, gates = rng.integers(0, N, (T, h, k), np.int32), jnp.asarray(rng.normal(size=(T, h, k)), jnp.float32)
    # Differences over 0.01 in float32: roundings of 1e-7 / 0.01 times the size of a sum, and curvature of 1e-4.
    check = functools.partial(check_grads, order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)
    check(lambda x, down, up, gates: mix(implementation)(x, down, up, indices, gates), (x, down, up, gates))
    check(lambda up, gates: bag(implementation)(up, indices, gates), (up, gates))
