"""expert_mix against loops: forward, gradient, precision, bad indices, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.ops import checked, expert_mix

# float32 against float64: dot products of up to 16 terms, then sums of at most some hundred pairs (the gradient of a
# row collects every token that used it), each term rounding 6e-8 of a partial sum of about the result's size.
FP32 = 1e-5
# bfloat16 keeps 8 bits, so a rounding costs at most 2^-9 of a value. The result takes one, and each term of its sum may
# have taken another (a float32 activation rounded before the product) or two (rows cast to bfloat16 as well).
BF16 = 2**-7

IMPLEMENTATIONS = ["reference", "xla"]
ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "identity": lambda s: s}

# name: T, d, N, h, k
SIZES = {
    "k=1": (6, 5, 9, 2, 1),
    "middle": (7, 6, 23, 3, 5),
    "k=n": (5, 8, 16, 2, 4),
    "k=N": (5, 8, 16, 2, 16),
    "one token": (1, 16, 16, 2, 4),
    "several chunks": (131, 3, 41, 2, 3),
}


def draw(rng, T, d, N, h, k, dtype=jnp.float32):
    """x, down, up, indices, gates. Indices repeat, within a head and across heads."""
    x, down, up, gates = (rng.normal(size=shape) for shape in [(T, d), (N, d), (N, d), (T, h, k)])
    indices = rng.integers(0, N, (T, h, k), np.int32)
    return *(a.astype(dtype) for a in (x, down, up)), indices, gates.astype(dtype)


@functools.cache
def forward_and_gradient(activation, implementation):
    """(x, down, up, indices, gates, dy) -> y, (dx, d_down, d_up, d_gates)."""

    @jax.jit
    def run(x, down, up, indices, gates, dy):
        def mix(x, down, up, gates):
            return expert_mix(x, down, up, indices, gates, ACTIVATIONS[activation], implementation=implementation)

        y, pullback = jax.vjp(mix, x, down, up, gates)
        return y, pullback(dy)

    return run


@functools.cache
def checked_mix(implementation):
    return checked(functools.partial(expert_mix, activation=jax.nn.gelu, implementation=implementation))


def compare(arguments, dy, activation, implementation, tolerance):
    y, grads = forward_and_gradient(activation, implementation)(*arguments, dy)
    assert y.dtype == arguments[0].dtype
    assert relative_error(y, reference.expert_mix(*arguments, activation)) < tolerance
    primals = [arguments[i] for i in (0, 1, 2, 4)]
    expected = reference.expert_mix_grad(*arguments, activation, dy)
    for name, primal, grad, wanted in zip(["x", "down", "up", "gates"], primals, grads, expected, strict=True):
        assert grad.dtype == primal.dtype, name
        assert relative_error(grad, wanted) < tolerance, name


@pytest.mark.parametrize(
    ("size", "implementation"),
    [*((size, implementation) for size in SIZES for implementation in IMPLEMENTATIONS), ("middle", None)],
)
def test_forward_and_gradient(rng, size, implementation):
    arguments = draw(rng, *SIZES[size])
    dy = rng.normal(size=arguments[0].shape).astype(jnp.float32)
    compare(arguments, dy, "gelu", implementation, FP32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_other_activations(rng, activation, implementation):
    arguments = draw(rng, *SIZES["middle"])
    dy = rng.normal(size=arguments[0].shape).astype(jnp.float32)
    compare(arguments, dy, activation, implementation, FP32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_expert_retrieved_by_everybody(rng, implementation):
    x, down, up, indices, gates = draw(rng, *SIZES["several chunks"])
    dy = rng.normal(size=x.shape).astype(jnp.float32)
    compare((x, down, up, np.full_like(indices, 40), gates), dy, "gelu", implementation, FP32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_in_bfloat16_out(rng, implementation):
    arguments = draw(rng, *SIZES["middle"], dtype=jnp.bfloat16)
    dy = rng.normal(size=arguments[0].shape).astype(jnp.bfloat16)
    compare(arguments, dy, "gelu", implementation, BF16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_tokens_with_float32_tables(rng, implementation):
    """Compute in bfloat16, parameters and gates in float32: gradients come back in each argument's own type."""
    x, *rest = draw(rng, *SIZES["middle"])
    dy = rng.normal(size=x.shape).astype(jnp.bfloat16)
    compare((x.astype(jnp.bfloat16), *rest), dy, "gelu", implementation, BF16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    """In bfloat16, 256 + 1 = 256: a sum of 512 ones would stop half way. Over d, over h * k, and over tokens."""
    run = forward_and_gradient("relu", implementation)

    def ones(*shape):
        return np.ones(shape, jnp.bfloat16)

    # One token, d = 512, and 512 pairs of gate 1/512 with one expert: each act(u . x) = 512, and so is their mean.
    x, indices = ones(1, 512), np.zeros((1, 2, 256), np.int32)
    y, (dx, _, d_up, d_gates) = run(x, ones(1, 512), ones(1, 512), indices, ones(1, 2, 256) / 512, x)
    np.testing.assert_array_equal(y, np.full((1, 512), 512.0))
    np.testing.assert_array_equal(dx, np.full((1, 512), 512.0))
    np.testing.assert_array_equal(d_up, np.full((1, 512), 512.0))
    np.testing.assert_array_equal(d_gates, np.full((1, 2, 256), 512.0 * 512))
    # 512 tokens, each with one pair of g = act = 1: the rows collect 512 * dy and 512 * x.
    x, one = ones(512, 1), ones(1, 1)
    _, (_, d_down, d_up, _) = run(x, one, one, np.zeros((512, 1, 1), np.int32), ones(512, 1, 1), x)
    assert d_up[0, 0] == 512
    assert d_down[0, 0] == 512


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [(), (2, 3)])  # (b,) is everywhere else
def test_batch_dimensions(rng, batch, implementation):
    x, down, up, indices, gates = draw(rng, int(np.prod(batch)), 5, 16, 2, 3)
    shaped = [a.reshape(*batch, *a.shape[1:]) for a in (x, indices, gates)]
    mix = functools.partial(expert_mix, activation=jax.nn.gelu, implementation=implementation)
    y = jax.jit(mix)(shaped[0], down, up, *shaped[1:])
    assert y.shape == (*batch, 5)
    assert relative_error(np.reshape(y, x.shape), reference.expert_mix(x, down, up, indices, gates, "gelu")) < FP32


def test_vmap_over_tokens_and_over_tables(rng):
    x, down, up, indices, gates = draw(rng, 6, 5, 16, 2, 3)

    def mapped(*in_axes):
        mix = functools.partial(expert_mix, activation=jax.nn.gelu, implementation="xla")
        return jax.jit(jax.vmap(mix, in_axes=in_axes))

    y = mapped(0, None, None, 0, 0)(x, down, up, indices, gates)
    assert relative_error(y, reference.expert_mix(x, down, up, indices, gates, "gelu")) < FP32
    tables = mapped(None, 0, 0, None, None)(x, np.stack([down, up]), np.stack([up, down]), indices, gates)
    assert relative_error(tables[1], reference.expert_mix(x, up, down, indices, gates, "gelu")) < FP32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bitwise_equal(rng, implementation):
    """The same rows collected from many tokens: an accumulation in a varying order would show."""
    arguments = draw(rng, 256, 16, 8, 2, 8)
    run = forward_and_gradient("gelu", implementation)
    first, second = (run(*arguments, arguments[0]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [-1, 23, 2**31 - 1, -(2**31)])
def test_index_out_of_range(rng, bad, implementation):
    x, down, up, indices, gates = draw(rng, *SIZES["middle"])
    dy = np.ones_like(x)
    spoilt = np.clip(indices, 1, 21)  # nobody retrieves rows 0 and 22, where wrapping or clipping would end up
    spoilt[3, 1, 2] = bad
    others = [0, 1, 2, 4, 5, 6]
    good = (x[others], down, up, spoilt[others], gates[others])
    expected = reference.expert_mix_grad(*good, "gelu", dy[others])
    y, (dx, d_down, d_up, d_gates) = forward_and_gradient("gelu", implementation)(x, down, up, spoilt, gates, dy)
    y, dx, d_down, d_up, d_gates = (np.asarray(a) for a in (y, dx, d_down, d_up, d_gates))
    assert np.isnan(y[3]).all()
    assert relative_error(y[others], reference.expert_mix(*good, "gelu")) < FP32
    # Gradients: right for all other tokens, and for every row that the bad token doesn't retrieve.
    assert relative_error(dx[others], expected[0]) < FP32
    assert relative_error(d_gates[others], expected[3]) < FP32
    untouched = np.setdiff1d(np.arange(23), spoilt[3])
    assert {0, 22} <= set(untouched.tolist())
    assert relative_error(d_down[untouched], expected[1][untouched]) < FP32
    assert relative_error(d_up[untouched], expected[2][untouched]) < FP32

    with pytest.raises(InputError, match=rf"{bad}\b"):
        checked_mix(implementation)(x, down, up, spoilt, gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checked_gradient(rng, implementation):
    x, down, up, indices, gates = draw(rng, *SIZES["middle"])

    def loss(*arguments):
        return jnp.sum(expert_mix(*arguments, jax.nn.gelu, implementation=implementation))

    expected, *_ = reference.expert_mix_grad(x, down, up, indices, gates, "gelu", np.ones_like(x))
    gradient = checked(jax.grad(loss))
    assert relative_error(gradient(x, down, up, indices, gates), expected) < FP32
    indices[0, 0, 0] = 23
    with pytest.raises(InputError, match="23"):
        gradient(x, down, up, indices, gates)


def test_unknown_implementation_is_named(rng):
    with pytest.raises(InputError, match="abacus"):
        expert_mix(*map(jnp.asarray, draw(rng, 1, 2, 4, 1, 1)), jax.nn.gelu, implementation="abacus")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x": (3, 5)}, r"\(3, 5\)"),
        ({"x": (2, 4)}, r"\(2,\)"),
        ({"up": (8, 4)}, r"\(8, 4\)"),
        ({"down": (0, 4), "up": (0, 4)}, r"\(0, 4\)"),
        ({"gates": (3, 1, 1)}, r"\(3, 1, 1\)"),
        ({"indices": (1, 1, 2)}, r"\(1, 1, 2\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changed, named, unchecked_types):
    sizes = {"x": (3, 4), "down": (9, 4), "up": (9, 4), "indices": (3, 1, 2), "gates": (3, 1, 2)} | changed
    arrays = [jnp.zeros(size, jnp.int32 if name == "indices" else jnp.float32) for name, size in sizes.items()]
    with pytest.raises(InputError, match=named):
        expert_mix(*arrays, jax.nn.gelu)


def test_tables_of_two_types_are_named(rng):
    x, down, up, *pairs = map(jnp.asarray, draw(rng, 1, 2, 4, 1, 1))
    with pytest.raises(InputError, match="bfloat16"):
        expert_mix(x, down, up.astype(jnp.bfloat16), *pairs, jax.nn.gelu)


MIB = 2**20


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_bounded(gradient):
    """[tokens, h * k, d] would be 64 MiB: "reference" holds that, "xla" less than a quarter beside its results."""
    T, d, N, h, k = 1024, 256, 64**2, 4, 16
    shapes = [(T, d), (N, d), (N, d), (T, h, k), (T, h, k)]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(*of) for of in zip(shapes, dtypes, strict=True)]
    assert T * h * k * d * 4 == 64 * MIB

    def temporary(implementation):
        def mix(*arguments):
            return expert_mix(*arguments, jax.nn.gelu, implementation=implementation)

        grad = jax.grad(lambda *arguments: jnp.sum(mix(*arguments) ** 2), argnums=(0, 1, 2, 4))
        return jax.jit(grad if gradient else mix).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    tables = 2 * N * d * 4 if gradient else 0  # the accumulated table gradients may be held once beside the results
    assert temporary("xla") - tables < 16 * MIB
    assert temporary("reference") > 64 * MIB
