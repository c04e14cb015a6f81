"""Query batch norm: batch statistics in training, running statistics in evaluation, real tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import relative_error

from peer_jax.layers import PEER

D, H, D_KEY = 6, 2, 4
FP32 = 1e-5  # a product of width 6 and means over tens of tokens, in float32

step = nnx.jit(lambda layer, x, mask: layer(x, mask))


def retriever(**options):
    return PEER(D, 16, num_heads=H, top_k=4, d_key=D_KEY, **options, rngs=nnx.Rngs(0))


def batches(rng, count, shape=(2, 7)):
    """x of differing means and scales, and masks with differing numbers of real tokens."""
    for i in range(count):
        x = jnp.asarray((i + 1) * rng.normal(size=(*shape, D)) + i, jnp.float32)
        yield x, jnp.asarray(rng.random(shape) < 0.7)


@pytest.fixture
def running(params_of):
    """layer -> its running (mean, var)."""

    def running(layer):
        statistics = params_of(layer, nnx.BatchStat)
        assert statistics.keys() == {"query_norm.mean", "query_norm.var"}
        return statistics["query_norm.mean"], statistics["query_norm.var"]

    return running


def batch_statistics(params, x, mask):
    return reference.batch_statistics(np.asarray(x, np.float64) @ params["query_proj.kernel"], np.asarray(mask))


def test_running_statistics_follow_the_recursion_in_closed_form(rng, params_of, running):
    layer = retriever()  # in training mode as constructed
    np.testing.assert_array_equal(running(layer), [np.zeros(H * D_KEY), np.ones(H * D_KEY)])
    seen = []
    for x, mask in batches(rng, 4):
        step(layer, x, mask)
        seen.append(batch_statistics(params_of(layer), x, mask))
        for actual, expected in zip(running(layer), reference.running_statistics(seen), strict=True):
            assert relative_error(actual, expected) < FP32


def test_evaluation_uses_and_keeps_the_running_statistics(rng, params_of, running):
    layer = retriever()
    for x, mask in batches(rng, 3):
        step(layer, x, mask)
    before = running(layer)
    layer.eval()
    for x, mask in batches(rng, 1):
        y, _ = step(layer, x, mask)
        one, _ = step(layer, x[:1, :1], mask[:1, :1])  # no batch to take statistics of
        expected = reference.peer(
            params_of(layer), np.asarray(x, np.float64), np.asarray(mask), num_heads=H, top_k=4, running=before
        )
        assert relative_error(np.asarray(y)[mask], expected[mask]) < FP32
        assert relative_error(one[0, 0], y[0, 0]) < FP32
    np.testing.assert_array_equal(running(layer), before)
    layer.train()
    step(layer, x, mask)
    assert np.abs(running(layer)[0] - before[0]).max() > 1e-3  # and training moves them again


def test_padding_counts_for_nothing(rng, running):
    """A padded batch has the same statistics as the batch without its padding."""
    padded, bare = retriever(), retriever()
    x = jnp.asarray(rng.normal(size=(1, 5, D)), jnp.float32)
    wide = jnp.concatenate([x, jnp.full((1, 4, D), 1e3)], axis=1)
    y, _ = step(padded, wide, jnp.arange(9)[None] < 5)
    expected, _ = step(bare, x, jnp.ones((1, 5), bool))
    assert relative_error(y[:, :5], expected) < FP32
    for actual, wanted in zip(running(padded), running(bare), strict=True):
        assert relative_error(actual, wanted) < FP32


def test_a_batch_of_padding_only_leaves_the_statistics_alone(rng, running):
    layer = retriever()
    for x, mask in batches(rng, 2):
        step(layer, x, mask)
    before = running(layer)
    y, aux = step(layer, x, jnp.zeros_like(mask))
    assert np.isfinite(y).all()
    assert np.isfinite(aux.loss)
    np.testing.assert_array_equal(running(layer), before)


def test_variance_survives_a_large_mean(rng, params_of, running):
    """mean^2 / var = 1e4: E[q^2] - E[q]^2 in float32 would keep three digits, the two-pass form keeps five."""
    layer = retriever()
    x = jnp.asarray(rng.normal(size=(2, 32, D)) + 100, jnp.float32)
    mask = jnp.ones((2, 32), bool)
    step(layer, x, mask)
    _, var = batch_statistics(params_of(layer), x, mask)
    # q itself carries roundings of 6e-8 * sqrt(1e4) of a standard deviation.
    assert relative_error((running(layer)[1] - 0.9) / 0.1, var) < 1e-4


def test_statistics_are_float32_in_bfloat16_compute(rng, params_of, running):
    layer = retriever(dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(2, 7, D)), jnp.bfloat16)
    mask = jnp.ones((2, 7), bool)
    step(layer, x, mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.BatchStat))} == {jnp.dtype("float32")}
    # The queries are bfloat16 (2^-9 of their size each), their statistics are not rounded again.
    seen = [batch_statistics(params_of(layer), x, mask)]
    for actual, expected in zip(running(layer), reference.running_statistics(seen), strict=True):
        assert np.abs(actual - expected).max() < 2**-8


@pytest.mark.parametrize("query_norm", ["layer", None])
def test_no_statistics_without_batch_norm(rng, query_norm):
    layer = retriever(query_norm=query_norm)
    assert not jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
    x, mask = next(batches(rng, 1))
    trained, _ = step(layer, x, mask)
    layer.eval()
    evaluated, _ = step(layer, x, mask)
    np.testing.assert_array_equal(trained, evaluated)
