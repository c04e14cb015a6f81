"""The layers in programs of others: any batch and axes, JAX's transformations, explicit meshes."""

import functools

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, MuMoE, SoftMoE
from peer_jax.models import Transformer
from peer_jax.ops import expert_mix, value_bag

B, S, D = 2, 5, 6
RETRIEVAL = {"num_heads": 2, "d_key": 4, "top_k": 4}
LAYERS = {
    "dense": functools.partial(Dense, D, 10, activation="swiglu"),
    "expert choice": functools.partial(MoE, D, 3, 5),
    "token choice": functools.partial(MoE, D, 3, 5, routing="token_choice", top_k=2),
    "token choice, dropless": functools.partial(MoE, D, 3, 5, routing="token_choice", top_k=2, capacity_factor=None),
    "soft moe": functools.partial(SoftMoE, D, 3, 5, slots_per_expert=2),
    "mumoe": functools.partial(MuMoE, D, 3, 5, rank=4),
    "mumoe, tr": functools.partial(MuMoE, D, 6, 5, rank=3, form="TR", ring_rank=2, second_level=2, gate_norm="batch"),
    "pkm": functools.partial(PKM, D, 16, **RETRIEVAL),
    "peer": functools.partial(PEER, D, 16, **RETRIEVAL),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
IN_SEQUENCES = [name for name in LAYERS if "choice" in name or name == "soft moe"]
# float32 through three matrix products, in another order of the sums.
FP32 = 1e-5


def build(name, *, training=False, **options):
    layer = LAYERS[name](**options, rngs=nnx.Rngs(0))
    layer.train() if training else layer.eval()
    return layer


def transformer(**options):
    peer = functools.partial(PEER, num_experts=16, **RETRIEVAL)
    arguments = {"vocab_size": 16, "d_model": 8, "num_blocks": 2, "num_heads": 2, "ffw": Dense, "sparse_ffw": peer}
    return Transformer(**arguments | {"rngs": nnx.Rngs(0)} | options)


@functools.cache
def forward(name, **options):
    """The layer in evaluation as a compiled function of x, and the same uncompiled."""
    graph, state = nnx.split(build(name, **options))
    plain = lambda x: nnx.merge(graph, state, copy=True)(x)[0]  # noqa: E731
    return jax.jit(plain), plain


@functools.cache
def step(name):
    """(x, mask, weights) -> loss, metrics, gradients and the state after a call in training, compiled."""
    graph, params, rest = nnx.split(build(name, training=True), nnx.Param, ...)

    @jax.jit
    def run(x, mask, weights):
        def total(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            y, aux = layer(x, mask)
            return jnp.sum(jnp.where(weights == 0, 0, weights * y)) + aux.loss, (aux, nnx.state(layer, nnx.BatchStat))

        (loss, (aux, after)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return loss, aux, after, grads

    return run, nnx.state(build(name, training=True), nnx.BatchStat)


def draw(rng, shape=(B, S, D)):
    return rng.normal(size=shape).astype(np.float32)


# What a batch may hold.


@EVERY_LAYER
@pytest.mark.parametrize("tokens", [(0, S), (B, 0), (0, B, S)])
def test_a_batch_without_tokens_changes_nothing(name, tokens):
    run, before = step(name)
    x, mask = np.zeros((*tokens, D), np.float32), np.ones(tokens, bool)
    loss, aux, after, grads = run(x, mask, x)
    assert loss == 0
    assert all(value == 0 for value in jax.tree.leaves((aux.metrics, grads)) for value in np.ravel(value))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if build(name).routes:
        routing = build(name).route(jnp.asarray(x))
        assert routing.indices.shape[:-2] == routing.gates.shape[:-2] == tokens


@EVERY_LAYER
def test_a_batch_of_padding_alone_changes_nothing(name):
    run, before = step(name)
    x, mask = np.full((B, S, D), np.nan, np.float32), np.zeros((B, S), bool)
    loss, aux, after, grads = run(x, mask, np.zeros_like(x))
    assert loss == 0
    assert all(np.isfinite(value) for value in aux.metrics.values())
    assert all(value == 0 for value in jax.tree.leaves(grads) for value in np.ravel(value))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@EVERY_LAYER
def test_what_padding_holds_reaches_nothing(rng, name):
    x, mask = draw(rng), np.ones((B, S), bool)
    mask[0, 2] = mask[1, 3:] = False
    weights = np.where(mask[..., None], draw(rng), 0)
    run, _ = step(name)
    expected = run(np.where(mask[..., None], x, 0), mask, weights)
    for fill in (np.nan, np.inf, -1e30, 1e30):
        jax.tree.map(
            np.testing.assert_array_equal, run(np.where(mask[..., None], x, np.float32(fill)), mask, weights), expected
        )


@EVERY_LAYER
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_says_so(rng, name, value):
    """In its own output; other tokens stay finite, and unchanged where tokens don't compete."""
    x = draw(rng)
    bad = x.copy()
    bad[0, 1, 2] = value
    run, _ = forward(name)
    y, expected = np.array(run(bad)), np.array(run(x))
    assert np.isnan(y[0, 1]).any()
    y[0, 1] = expected[0, 1]
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], expected[1])
    if not build(name).mixes_tokens:
        np.testing.assert_array_equal(y, expected)


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_output_has_the_type_of_the_input(name, dtype):
    x = jax.ShapeDtypeStruct((B, S, D), dtype)
    assert jax.eval_shape(forward(name)[1], x).dtype == dtype
    assert jax.eval_shape(forward(name, dtype=jnp.bfloat16)[1], x).dtype == jnp.bfloat16


@EVERY_LAYER
def test_any_leading_axes(rng, name):
    x, (run, _) = jnp.asarray(draw(rng)), forward(name)
    expected = run(x)
    for a, b in ((x[0], expected[0]), (x[None], expected[None])):
        assert relative_error(run(a), b) < FP32
    if name not in IN_SEQUENCES:
        assert relative_error(run(x[0, 0]), expected[0, 0]) < FP32
    if build(name).routes:
        of_all, of_one = (build(name).route(a) for a in (x, x[0]))
        np.testing.assert_array_equal(of_one.indices, of_all.indices[0])
        assert relative_error(of_one.gates, of_all.gates[0]) < FP32


# Transformations.


@EVERY_LAYER
def test_vmap(rng, name):
    """Also of gradients, as gradients per example need it."""
    x, (run, plain) = draw(rng), forward(name)
    assert relative_error(jax.jit(jax.vmap(plain))(x), run(x)) < FP32
    grad = jax.grad(lambda x: jnp.sum(plain(x) ** 2))
    assert relative_error(jax.jit(jax.vmap(grad))(x), jax.jit(grad)(x)) < FP32


@EVERY_LAYER
def test_forward_mode(rng, name):
    """<w, J v> by ``jvp``, in x and the parameters, against reverse mode, whose rules are the ops' own."""
    options = {"implementation": "reference"} if name in ("pkm", "peer") else {}
    graph, params, rest = nnx.split(build(name, **options), nnx.Param, ...)
    default = nnx.graphdef(build(name))
    x, w = jnp.asarray(draw(rng)), draw(rng)
    v = jax.tree.map(lambda a: jnp.asarray(draw(rng, a.shape)), (params, x))

    def call(graph, params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)[0]

    _, pushed = jax.jit(lambda *p: jax.jvp(functools.partial(call, graph), p, v))(params, x)
    pulled = jax.jit(jax.grad(lambda *p: jnp.vdot(w, call(default, *p)), argnums=(0, 1)))(params, x)
    terms = [np.ravel(a * b) for a, b in zip(jax.tree.leaves(pulled), jax.tree.leaves(v), strict=True)]
    assert abs(np.vdot(w, pushed) - sum(map(np.sum, terms))) < FP32 * sum(np.abs(t).sum() for t in terms)
    jacobian = jax.jit(jax.jacfwd(lambda row: call(graph, params, x.at[0, 0].set(row))))(x[0, 0])
    assert jacobian.shape == (B, S, D, D)


@EVERY_LAYER
def test_hessian_vector_products(rng, name):
    """Forward over reverse, with every layer's default implementation, against differences of the gradient."""
    x, v, (_, plain) = draw(rng), draw(rng), forward(name)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(plain(x)))))
    product = jax.jit(lambda x: jax.jvp(grad, (x,), (v,))[1])(x)
    small = np.float32(1e-3)
    difference = (grad(x + small * v) - grad(x - small * v)) / (2 * small)
    assert relative_error(product, difference) < 1e-2


FORWARD_MODE = {
    "alone": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "of a compiled layer": lambda f: lambda x: jax.jvp(jax.jit(f), (x,), (x,)),
    "compiled": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,))),
    "for each example": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (x,))),
    "for each example, compiled": lambda f: jax.jit(jax.vmap(lambda x: jax.jvp(f, (x,), (x,)))),
    "linearized": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "in a loop": lambda f: lambda x: jax.jvp(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: f(x), x), (x,), (x,)),
    "with remat": lambda f: lambda x: jax.jvp(jax.checkpoint(f), (x,), (x,)),
    "Jacobian": lambda f: jax.jit(jax.jacfwd(f)),
}


@pytest.mark.parametrize("name", ["pkm", "peer"])
@pytest.mark.parametrize("how", FORWARD_MODE)
def test_forward_mode_of_the_default_implementation_says_what_to_do(rng, name, how):
    x = jnp.asarray(draw(rng))
    with pytest.raises(InputError, match="implementation='reference'"):
        FORWARD_MODE[how](forward(name, implementation="xla")[1])(x)


@pytest.mark.parametrize("name", ["expert_mix", "value_bag"])
def test_forward_mode_of_an_op_in_its_gates_says_what_to_do(rng, name):
    x, table = jnp.asarray(draw(rng, (3, D))), jnp.asarray(draw(rng, (16, D)))
    indices, gates = jnp.zeros((3, 1, 2), jnp.int32), jnp.ones((3, 1, 2))
    ops = {
        "expert_mix": lambda g: expert_mix(x, table, table, indices, g, jax.nn.gelu, implementation="xla"),
        "value_bag": lambda g: value_bag(table, indices, g, implementation="xla"),
    }
    with pytest.raises(InputError, match=f"^{name}: only implementation='reference'"):
        jax.jit(lambda g: jax.jvp(ops[name], (g,), (g,)))(gates)


@EVERY_LAYER
def test_tabulate(name):
    table = nnx.tabulate(build(name), jnp.zeros((B, S, D)))
    assert LAYERS[name].func.__name__ in table
    assert "Total Parameters" in table


def test_tabulate_of_a_transformer():
    model = transformer()
    table = nnx.tabulate(model, jnp.zeros((B, S), jnp.int32), console_kwargs={"width": 400})
    assert all(name in table for name in ("Transformer", "Attention", "PEER", "Dense", "BatchNorm"))


# Meshes whose axes are explicit. The parameters may be split, too.

SPLITS = {
    "batch": PartitionSpec("data"),
    "batch and sequence": PartitionSpec("data", "model"),
    "batch and width": PartitionSpec("data", None, "model"),
}


def on_explicit_mesh():
    """Relative errors of every layer's output, and gradients for the first of SPLITS, against those without a mesh."""
    rng = np.random.default_rng(0)
    x, w = draw(rng, (4, 4, D)), draw(rng, (4, 4, D))
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    errors = {}

    def placed(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    def by_columns(a):
        even = a.ndim > 1 and a.shape[-1] % 2 == 0
        return placed(a, PartitionSpec(*[None] * (a.ndim - 1), "model") if even else PartitionSpec())

    for name in LAYERS:
        graph, params, rest = nnx.split(build(name, training=True), nnx.Param, ...)

        def total(params, x, w, rest, graph=graph):
            y, aux = nnx.merge(graph, params, rest, copy=True)(x)
            return jnp.sum(y * w) + aux.loss, y

        grad, call = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True)), jax.jit(total)
        expected, y = grad(params, x, w, rest)
        with jax.set_mesh(mesh):
            for split, spec in SPLITS.items():
                arrays = placed(x, spec), placed(w, spec), rest
                errors[f"{name}: {split}"] = relative_error(call(params, *arrays)[1], y)
                if split == "batch":
                    found = jax.tree.leaves(grad(params, *arrays)[0])
                    pairs = zip(found, jax.tree.leaves(expected), strict=True)
                    errors[f"{name}: gradients"] = max(relative_error(a, b) for a, b in pairs)
                    split_params = jax.tree.map(by_columns, params)
                    errors[f"{name}: parameters"] = relative_error(call(split_params, *arrays)[1], y)
    graph, state = nnx.split(transformer())
    tokens = rng.integers(0, 16, (4, 4), np.int32)
    call = jax.jit(lambda tokens: nnx.merge(graph, state, copy=True)(tokens)[0])
    expected = call(tokens)
    with jax.set_mesh(mesh):
        errors["transformer"] = relative_error(call(placed(tokens, SPLITS["batch"])), expected)
    return {name: float(error) for name, error in errors.items()}


@pytest.mark.slow
def test_explicit_meshes():
    errors = eight_devices.measured("test_library_use", "on_explicit_mesh")
    assert len(errors) == len(LAYERS) * (len(SPLITS) + 2) + 1
    assert {name: error for name, error in errors.items() if not error < FP32} == {}
