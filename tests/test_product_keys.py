"""product_key_top_k against brute force over all N = n * n keys."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.ops import checked, product_key_top_k
from peer_jax.ops.cpu import KEEPS_BARRIERS

# A float32 dot product of d_key/2 <= 8 terms and one sum: a few roundings of 6e-8 each, relative to the largest score.
FP32 = 1e-6


IMPLEMENTATIONS = ["reference", "xla"]


@functools.cache
def jitted(k, implementation=None):
    return jax.jit(functools.partial(product_key_top_k, k=k, implementation=implementation))


@checked
def checked_top_4(queries, sub_keys):
    return product_key_top_k(queries, sub_keys, 4)


def draw(rng, *, T=6, h=2, n=5, d_key=6, shared=True, dtype=jnp.float32):
    queries = rng.normal(size=(T, h, d_key))
    sub_keys = rng.normal(size=(2, n, d_key // 2) if shared else (h, 2, n, d_key // 2))
    return queries.astype(dtype), sub_keys.astype(dtype)


def far_apart(scores):
    """No two retrieved scores so near that float32 might rank them otherwise than float64."""
    return scores.shape[-1] == 1 or np.abs(np.diff(scores.astype(np.float64))).min() > 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 5, 25])  # 1, n, N; all others below
def test_forward_and_gradient_equal_brute_force(rng, k, shared, implementation):
    queries, sub_keys = draw(rng, shared=shared)
    expected_scores, expected_indices = reference.product_key_top_k(queries, sub_keys, k)
    assert far_apart(expected_scores)
    d_scores = rng.normal(size=expected_scores.shape).astype(np.float32)
    expected_grads = reference.product_key_top_k_grad(queries, sub_keys, expected_indices, d_scores)

    @jax.jit
    def forward_and_gradient(queries, sub_keys, d_scores):
        retrieve = functools.partial(product_key_top_k, k=k, implementation=implementation)
        scores, pullback, indices = jax.vjp(retrieve, queries, sub_keys, has_aux=True)
        return scores, indices, pullback(d_scores)

    scores, indices, grads = forward_and_gradient(queries, sub_keys, d_scores)
    assert scores.dtype == jnp.float32
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, expected_indices)
    assert relative_error(scores, expected_scores) < FP32
    for grad, expected in zip(grads, expected_grads, strict=True):
        # Sums of up to T * h * k = 300 float32 terms.
        assert relative_error(grad, expected) < 1e-5


@st.composite
def grids(draw):
    """Small integers, exact in float32, so that equal scores and equal sums abound; any n, h and k."""
    n, h, shared = draw(st.integers(1, 5)), draw(st.integers(1, 2)), draw(st.booleans())
    k = draw(st.one_of(st.integers(1, n), st.integers(1, n * n)))
    small = st.integers(-2, 2).map(np.float32)
    queries = draw(hnp.arrays(np.float32, (3, h, 4), elements=small))
    return queries, draw(hnp.arrays(np.float32, (2, n, 2) if shared else (h, 2, n, 2), elements=small)), k


@st.composite
def any_scores(draw):
    """Sub-keys of one feature and queries of +-1, so that a half's scores are any float32 we like, -0.0 and the largest
    included, and their sums round, absorb the smaller and overflow to infinity."""
    n = draw(st.integers(1, 4))
    k = draw(st.integers(1, n * n))
    huge = float(np.float32(3e38))
    finite = st.floats(-huge, huge, width=32, allow_subnormal=False)  # XLA on CPU flushes subnormal numbers to 0
    elements = st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, 2.0**24, 2.0**24 + 2, -huge, huge]))
    queries = draw(hnp.arrays(np.float32, (2, 1, 2), elements=st.sampled_from([-1.0, 1.0])))
    return queries, draw(hnp.arrays(np.float32, (2, n, 1), elements=elements)), k


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.one_of(grids(), any_scores()))
def test_exact_with_ties_for_any_size(case):
    queries, sub_keys, k = case
    expected_scores, expected_indices = reference.product_key_top_k(queries, sub_keys, k)
    for implementation in IMPLEMENTATIONS:
        scores, indices = jitted(k, implementation)(queries, sub_keys)
        np.testing.assert_array_equal(scores, expected_scores)
        np.testing.assert_array_equal(indices, expected_indices)


def test_all_scores_equal_ranks_by_index():
    scores, indices = jitted(7)(jnp.zeros((1, 1, 4)), jnp.ones((2, 3, 2)))
    np.testing.assert_array_equal(indices[0, 0], np.arange(7))
    np.testing.assert_array_equal(scores, np.zeros((1, 1, 7)))


@pytest.mark.parametrize("batch", [(), (2, 3)])  # (b,) is everywhere else
def test_batch_dimensions_and_vmap(rng, batch):
    queries, sub_keys = draw(rng, T=int(np.prod(batch)))
    expected_scores, expected_indices = reference.product_key_top_k(queries, sub_keys, 4)
    shaped = queries.reshape(*batch, 2, 6)
    scores, indices = jitted(4)(shaped, sub_keys)
    assert scores.shape == indices.shape == (*batch, 2, 4)
    np.testing.assert_array_equal(np.reshape(indices, expected_indices.shape), expected_indices)
    assert relative_error(np.reshape(scores, expected_scores.shape), expected_scores) < FP32
    if batch:
        mapped_scores, mapped_indices = jax.jit(jax.vmap(jitted(4), in_axes=(0, None)))(shaped, sub_keys)
        np.testing.assert_array_equal(mapped_indices, indices)
        assert relative_error(mapped_scores, scores) < FP32


def test_scores_of_bfloat16_inputs_are_float32(rng):
    """bfloat16 products are exact in float32, so the tolerance stays that of float32."""
    queries, sub_keys = draw(rng, d_key=16, dtype=jnp.bfloat16)
    scores, indices = jitted(6)(queries, sub_keys)
    expected_scores, expected_indices = reference.product_key_top_k(queries, sub_keys, 6)
    assert scores.dtype == jnp.float32
    assert far_apart(expected_scores)
    np.testing.assert_array_equal(indices, expected_indices)
    assert relative_error(scores, expected_scores) < FP32


def test_two_runs_are_bitwise_equal(rng):
    queries, sub_keys = draw(rng, T=64, n=16)
    first, second = (jitted(9)(queries, sub_keys) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("k", [0, -1, 26])
def test_k_outside_1_to_n_squared_is_an_error_that_names_it(rng, k):
    with pytest.raises(InputError, match=rf"{k}\b"):
        product_key_top_k(*map(jnp.asarray, draw(rng)), k)


def test_more_keys_than_int32_counts_are_an_error():
    arrays = jax.ShapeDtypeStruct((1, 1, 2), jnp.float32), jax.ShapeDtypeStruct((2, 46341, 1), jnp.float32)
    with pytest.raises(InputError, match="46341"):
        jax.eval_shape(lambda *a: product_key_top_k(*a, 1), *arrays)


@pytest.mark.parametrize("half", [0, 1])
def test_nan_query(rng, half):
    queries, sub_keys = draw(rng)
    clean, _ = jitted(4)(queries, sub_keys)
    bad = queries.copy()
    bad[2, 1, 3 * half] = np.nan
    scores, _ = jitted(4)(bad, sub_keys)
    # Without `checked`, every score of that token and head is NaN, and all other scores are as before.
    assert np.isnan(scores[2, 1]).all()
    np.testing.assert_array_equal(np.delete(np.asarray(scores), 2, 0), np.delete(np.asarray(clean), 2, 0))
    with pytest.raises(ValueError, match=r"(?i)nan"):
        checked_top_4(bad, sub_keys)


def test_nan_sub_key(rng):
    queries, sub_keys = draw(rng)
    sub_keys[1, 3, 0] = np.nan
    assert np.isnan(jitted(4)(queries, sub_keys)[0]).any(-1).all()
    with pytest.raises(ValueError, match=r"(?i)nan"):
        checked_top_4(queries, sub_keys)


def test_checked_changes_nothing_that_is_right(rng):
    queries, sub_keys = draw(rng)
    scores, indices = checked_top_4(queries, sub_keys)
    expected_scores, expected_indices = reference.product_key_top_k(queries, sub_keys, 4)
    np.testing.assert_array_equal(indices, expected_indices)
    assert relative_error(scores, expected_scores) < FP32


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_bounded(gradient):
    """The scores of both halves would be 64 MiB: "reference" holds them, "xla" at most a quarter of that.

    A version of XLA that drops barriers holds a little more per chunk.
    """
    T, h, n, c, k = 4096, 4, 512, 16, 8
    arguments = jax.ShapeDtypeStruct((T, h, 2 * c), jnp.float32), jax.ShapeDtypeStruct((2, n, c), jnp.float32)
    assert T * h * 2 * n * 4 == 64 * 2**20

    def temporary(implementation):
        def retrieve(queries, sub_keys):
            return jnp.sum(product_key_top_k(queries, sub_keys, k, implementation=implementation)[0])

        function = jax.grad(retrieve, argnums=(0, 1)) if gradient else retrieve
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary("xla") < (16 if KEEPS_BARRIERS else 24) * 2**20
    assert temporary("reference") > 64 * 2**20
