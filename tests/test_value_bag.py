"""value_bag against loops: forward, gradient, precision, bad indices, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.ops import checked, value_bag

# The tolerances of test_expert_mix.py; sums are shorter here.
FP32 = 1e-5
BF16 = 2**-7

IMPLEMENTATIONS = ["reference", "xla"]

# name: T, d_v, N, h, k
SIZES = {
    "k=1": (6, 5, 9, 2, 1),
    "middle": (7, 6, 23, 3, 5),
    "k=n": (5, 8, 16, 2, 4),
    "k=N": (5, 8, 16, 2, 16),
    "one token": (1, 16, 16, 2, 4),
    "several chunks": (131, 3, 41, 2, 3),
}


def draw(rng, T, d_v, N, h, k, dtype=jnp.float32):
    """values, indices, gates."""
    values, gates = rng.normal(size=(N, d_v)), rng.normal(size=(T, h, k))
    return values.astype(dtype), rng.integers(0, N, (T, h, k), np.int32), gates.astype(dtype)


@functools.cache
def forward_and_gradient(implementation):
    """(values, indices, gates, dy) -> y, (d_values, d_gates)."""

    @jax.jit
    def run(values, indices, gates, dy):
        bag = functools.partial(value_bag, implementation=implementation)
        y, pullback = jax.vjp(lambda values, gates: bag(values, indices, gates), values, gates)
        return y, pullback(dy)

    return run


@functools.cache
def checked_bag(implementation):
    return checked(functools.partial(value_bag, implementation=implementation))


def compare(values, indices, gates, dy, implementation, tolerance):
    y, (d_values, d_gates) = forward_and_gradient(implementation)(values, indices, gates, dy)
    assert y.dtype == gates.dtype
    assert d_values.dtype == values.dtype
    assert d_gates.dtype == gates.dtype
    expected_d_values, expected_d_gates = reference.value_bag_grad(values, indices, gates, dy)
    assert relative_error(y, reference.value_bag(values, indices, gates)) < tolerance
    assert relative_error(d_values, expected_d_values) < tolerance
    assert relative_error(d_gates, expected_d_gates) < tolerance


@pytest.mark.parametrize(
    ("size", "implementation"),
    [*((size, implementation) for size in SIZES for implementation in IMPLEMENTATIONS), ("middle", None)],
)
def test_forward_and_gradient(rng, size, implementation):
    T, d_v, *_ = SIZES[size]
    dy = rng.normal(size=(T, d_v)).astype(jnp.float32)
    compare(*draw(rng, *SIZES[size]), dy, implementation, FP32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_the_type_of_the_gates(rng, dtype, implementation):
    """Gates in bfloat16: so is the result, whatever the table's type; the table's gradient is in the table's."""
    values, indices, gates = draw(rng, *SIZES["middle"], dtype=jnp.bfloat16)
    dy = rng.normal(size=(7, 6)).astype(jnp.bfloat16)
    compare(values.astype(dtype), indices, gates, dy, implementation, BF16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    """In bfloat16, 256 + 1 = 256: a sum of 512 ones would stop half way. Over h * k, over d_v, and over tokens."""
    run = forward_and_gradient(implementation)

    def ones(*shape):
        return np.ones(shape, jnp.bfloat16)

    y, (_, d_gates) = run(ones(1, 512), np.zeros((1, 2, 256), np.int32), ones(1, 2, 256), ones(1, 512))
    np.testing.assert_array_equal(y, np.full((1, 512), 512.0))
    np.testing.assert_array_equal(d_gates, np.full((1, 2, 256), 512.0))
    _, (d_values, _) = run(ones(1, 2), np.zeros((512, 1, 1), np.int32), ones(512, 1, 1), ones(512, 2))
    np.testing.assert_array_equal(d_values, np.full((1, 2), 512.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [(), (2, 3)])  # (b,) is everywhere else
def test_batch_dimensions_and_vmap(rng, batch, implementation):
    values, indices, gates = draw(rng, int(np.prod(batch)), 5, 16, 2, 3)
    expected = reference.value_bag(values, indices, gates)
    bag = functools.partial(value_bag, implementation=implementation)
    indices, gates = (a.reshape(*batch, 2, 3) for a in (indices, gates))
    y = jax.jit(bag)(values, indices, gates)
    assert y.shape == (*batch, 5)
    assert relative_error(np.reshape(y, expected.shape), expected) < FP32
    if batch:
        mapped = jax.jit(jax.vmap(bag, in_axes=(None, 0, 0)))(values, indices, gates)
        assert relative_error(np.reshape(mapped, expected.shape), expected) < FP32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bitwise_equal(rng, implementation):
    values, indices, gates = draw(rng, 256, 16, 8, 2, 8)
    dy = rng.normal(size=(256, 16)).astype(jnp.float32)
    first, second = (forward_and_gradient(implementation)(values, indices, gates, dy) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [-1, 23, 2**31 - 1, -(2**31)])
def test_index_out_of_range(rng, bad, implementation):
    values, indices, gates = draw(rng, *SIZES["middle"])
    dy = rng.normal(size=(7, 6)).astype(jnp.float32)
    spoilt = np.clip(indices, 1, 21)  # nobody retrieves rows 0 and 22, where wrapping or clipping would end up
    spoilt[3, 1, 2] = bad
    others = [0, 1, 2, 4, 5, 6]
    good = (values, spoilt[others], gates[others])
    y, (d_values, d_gates) = forward_and_gradient(implementation)(values, spoilt, gates, dy)
    y, d_values, d_gates = (np.asarray(a) for a in (y, d_values, d_gates))
    expected_d_values, expected_d_gates = reference.value_bag_grad(*good, dy[others])
    assert np.isnan(y[3]).all()
    assert relative_error(y[others], reference.value_bag(*good)) < FP32
    assert relative_error(d_gates[others], expected_d_gates) < FP32
    untouched = np.setdiff1d(np.arange(23), spoilt[3])
    assert {0, 22} <= set(untouched.tolist())
    assert relative_error(d_values[untouched], expected_d_values[untouched]) < FP32
    with pytest.raises(InputError, match=rf"{bad}\b"):
        checked_bag(implementation)(values, spoilt, gates)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"values": (0, 4)}, r"\(0, 4\)"), ({"gates": (3, 1, 1)}, r"\(3, 1, 1\)"), ({"gates": (2, 1, 2)}, r"\(3, 1, 2\)")],
)
def test_sizes_that_do_not_fit_are_named(changed, named, unchecked_types):
    sizes = {"values": (9, 4), "indices": (3, 1, 2), "gates": (3, 1, 2)} | changed
    arrays = [jnp.zeros(size, jnp.int32 if name == "indices" else jnp.float32) for name, size in sizes.items()]
    with pytest.raises(InputError, match=named):
        value_bag(*arrays)


def test_unknown_implementation_is_named(rng):
    with pytest.raises(InputError, match="abacus"):
        value_bag(*map(jnp.asarray, draw(rng, 1, 2, 4, 1, 1)), implementation="abacus")


MIB = 2**20


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_bounded(gradient):
    """[tokens, h * k, d_v] would be 64 MiB; "xla" holds less than a quarter of that beside its results."""
    T, d_v, N, h, k = 1024, 256, 64**2, 4, 16
    arguments = [
        jax.ShapeDtypeStruct((N, d_v), jnp.float32),
        jax.ShapeDtypeStruct((T, h, k), jnp.int32),
        jax.ShapeDtypeStruct((T, h, k), jnp.float32),
    ]
    assert T * h * k * d_v * 4 == 64 * MIB

    def temporary(implementation):
        bag = functools.partial(value_bag, implementation=implementation)
        grad = jax.grad(lambda *arguments: jnp.sum(bag(*arguments) ** 2), argnums=(0, 2))
        return jax.jit(grad if gradient else bag).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    table = N * d_v * 4 if gradient else 0
    assert temporary("xla") - table < 16 * MIB
    if gradient:  # forward, XLA may fuse the gather with the sum by itself
        assert temporary("reference") > 64 * MIB
