"""Top k of columns against a stable sort in NumPy: any size, ties, infinities, NaN."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Device
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_jax.ops.cpu.top_k import by_tournament
from peer_jax.ops.top_k import by_groups, plain, top_k_columns
from peer_jax.ops.tpu import columns as on_tpu
from peer_jax.sharding import compiled_for

WAYS = {
    "tournament": by_tournament,
    "groups": by_groups,
    "kernel": functools.partial(on_tpu.top_k_columns, interpret=True),
    "rows": plain,
}


@functools.cache
def jitted(way, k):
    return jax.jit(functools.partial(WAYS[way], k=k))


def sorted_columns(x, k):
    place = np.argsort(-x, axis=0, kind="stable")[:k]
    return np.take_along_axis(x, place, axis=0), place


@st.composite
def columns(draw):
    """Matrices with few different values, -inf among them, so that many are equal; and k."""
    n, k_of_n = draw(st.sampled_from([(1, 1), (5, 1), (5, 5), (16, 3), (16, 16), (23, 4), (33, 16)]))
    values = st.sampled_from([-np.inf, -2.5, -1.0, 1.0, 2.0, np.inf])
    return draw(hnp.arrays(np.float32, (n, 3), elements=values)), k_of_n


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=80)
@given(columns())
def test_equals_a_stable_sort(way, case):
    x, k = case
    values, place = jitted(way, k)(x)
    expected_values, expected_place = sorted_columns(x, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(place, expected_place)
    assert place.dtype == jnp.int32


@pytest.mark.parametrize("way", WAYS)
def test_zeros_rank_by_their_sign(way):
    values, place = jitted(way, 4)(np.array([[-0.0, 0.0, -1.0, -0.0, 0.0]], np.float32).T)
    np.testing.assert_array_equal(place[:, 0], [1, 4, 0, 3])
    np.testing.assert_array_equal(np.signbit(values[:, 0]), [False, False, True, True])


@pytest.mark.parametrize(("n", "k"), [(512, 16), (1000, 32), (128, 100), (300, 17), (2049, 1)])
@pytest.mark.parametrize("way", ["tournament", "groups", "kernel"])
@pytest.mark.parametrize("different", [2**32, 40])
def test_large_columns(rng, way, n, k, different):
    x = rng.integers(0, different, (n, 65)).astype(np.float32)
    for ours, expected in zip(jitted(way, k)(x), sorted_columns(x, k), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("where", [0, 6, 12])
@pytest.mark.parametrize("way", ["tournament", "kernel"])
def test_a_nan_is_not_lost(rng, way, where, sign):
    x = rng.normal(size=(13, 4)).astype(np.float32)
    x[where, 2] = np.copysign(np.nan, sign)
    values, place = jitted(way, 3)(x)
    assert np.isnan(values[:, 2]).all()
    assert ((place >= 0) & (place < 13)).all()
    others = [0, 1, 3]
    np.testing.assert_array_equal(values[:, others], sorted_columns(x[:, others], 3)[0])


@pytest.mark.parametrize(
    ("platform", "k", "columns", "ours"),
    [
        ("cpu", 8, 64, True),
        ("cpu", 128, 64, True),
        ("cpu", 8, 63, False),
        ("cpu", 129, 64, False),
        ("cuda", 8, 64, True),
        ("cuda", 33, 64, False),
        ("tpu", 8, 3, True),
        ("tpu", 65, 64, False),
    ],
)
def test_jax_s_own_is_for_few_columns_or_many_values(platform, k, columns, ours):
    x = jax.ShapeDtypeStruct((256, columns), jnp.float32)
    with compiled_for(Device(platform)):
        text = jax.jit(lambda x: top_k_columns(x, k)).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert ("chlo.top_k" not in text) is ours
