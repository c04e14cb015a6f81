"""What every layer owes: the oracle's outputs and gradients, padding, causality, routes, counts, errors with names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import Mesh
from layer_cases import (
    FP32,
    UNCHANGED,
    B,
    Compiled,
    D,
    S,
    changes,
    check_evaluation,
    check_padding,
    check_training,
    draw,
)
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, retrieval
from peer_jax.sharding import AXES, Placement, use

LOSSES = {"balance_loss_weight": 0.5, "z_loss_weight": 0.25}
RETRIEVAL = {"num_heads": 2, "d_key": 4}  # of N = 16 experts, n = 4

# name: layer, sizes, options
CASES = {
    "dense gelu": (Dense, (D, 10), {"activation": "gelu"}),
    "dense swiglu": (Dense, (D, 10), {"activation": "swiglu"}),
    "dense geglu": (Dense, (D, 10), {"activation": "geglu"}),
    "expert choice": (MoE, (D, 3, 5), {"routing": "expert_choice"}),
    "expert choice, wide, gated": (
        MoE,
        (D, 3, 5),
        {"routing": "expert_choice", "capacity_factor": 2.0, "activation": "swiglu"},
    ),
    "expert choice, all": (MoE, (D, 3, 5), {"routing": "expert_choice", "capacity_factor": 4.0}),
    "token choice, top 1": (MoE, (D, 3, 5), {"routing": "token_choice", **LOSSES}),
    "token choice, tight, gated": (
        MoE,
        (D, 3, 5),
        {"routing": "token_choice", "top_k": 2, "capacity_factor": 0.6, "activation": "geglu", **LOSSES},
    ),
    "token choice, dropless, top 1": (MoE, (D, 3, 5), {"routing": "token_choice", "capacity_factor": None, **LOSSES}),
    "token choice, dropless, gated": (
        MoE,
        (D, 3, 5),
        {"routing": "token_choice", "top_k": 2, "capacity_factor": None, "activation": "swiglu", **LOSSES},
    ),
    "token choice, dropless, all": (
        MoE,
        (D, 3, 5),
        {"routing": "token_choice", "top_k": 3, "capacity_factor": None, **LOSSES},
    ),
    "expert choice, shared": (MoE, (D, 3, 5), {"routing": "expert_choice", "activation": "swiglu", "shared_d_ff": 4}),
    "fine-grained, shared of 1": (
        MoE,
        (D, 6, 2),
        {"routing": "token_choice", "top_k": 3, "capacity_factor": None, "shared_d_ff": 1, **LOSSES},
    ),
    "pkm k=1": (PKM, (D, 16), {**RETRIEVAL, "top_k": 1, "query_norm": "layer", "score_activation": "sigmoid"}),
    "pkm k=n": (PKM, (D, 16), {**RETRIEVAL, "top_k": 4}),
    "pkm k=N": (PKM, (D, 16), {**RETRIEVAL, "top_k": 16, "query_norm": None, "share_sub_keys": False}),
    "pkm gated, k=1, d_key=2": (
        PKM,
        (D, 16),
        {"num_heads": 1, "d_key": 2, "top_k": 1, "query_norm": None, "score_activation": "sigmoid", "gated": True},
    ),
    "memory plus": (
        PKM,
        (D, 16),
        {**RETRIEVAL, "top_k": 4, "query_norm": "qk", "gated": True, "share_sub_keys": False},
    ),
    "peer k=1": (PEER, (D, 16), {**RETRIEVAL, "top_k": 1, "score_activation": "relu", "share_sub_keys": False}),
    "peer k=n": (PEER, (D, 16), {**RETRIEVAL, "top_k": 4}),
    "peer k=n, reference": (PEER, (D, 16), {**RETRIEVAL, "top_k": 4, "implementation": "reference"}),
    "peer k=n, layer norm": (PEER, (D, 16), {**RETRIEVAL, "top_k": 4, "query_norm": "layer", "activation": "relu"}),
    "peer without activation": (PEER, (D, 16), {**RETRIEVAL, "top_k": 4, "query_norm": "qk", "activation": "identity"}),
    "peer k=N": (PEER, (D, 16), {**RETRIEVAL, "top_k": 16, "query_norm": None, "score_activation": "sigmoid"}),
}
ONE_OF_EACH = [
    "dense gelu",
    "expert choice",
    "token choice, tight, gated",
    "token choice, dropless, gated",
    "pkm k=n",
    "peer k=n",
]
SPARSE = ONE_OF_EACH[1:]
LEAKY = [name for name in CASES if name.startswith("expert choice")]
MIXING = [*LEAKY, "token choice, top 1", "token choice, tight, gated"]


def oracle(name, params, x, mask, running=None):
    """y and the auxiliary loss, in float64."""
    layer, _, options = CASES[name]
    if layer is Dense:
        return reference.dense(params, x, **options), 0.0
    seen_in_parameters = ("share_sub_keys", "gated", "shared_d_ff")
    told = ("routing", "implementation", *seen_in_parameters)
    options = {key: value for key, value in options.items() if key not in told}
    if name in LEAKY:
        return reference.moe_expert_choice(params, x, mask, **options)[0], 0.0
    if layer is MoE:
        return reference.moe_token_choice(params, x, mask, **options)[:2]
    del options["d_key"]
    if running is not None:
        running = running["query_norm.mean"], running["query_norm.var"]
    return {PKM: reference.pkm, PEER: reference.peer}[layer](params, x, mask, running=running, **options), 0.0


def build(name, seed=0, **more):
    layer, sizes, options = CASES[name]
    return layer(*sizes, **options, **more, rngs=nnx.Rngs(seed))


@functools.cache
def compiled(name):
    return Compiled(build(name))


@pytest.mark.parametrize("name", CASES)
def test_training_forward_and_gradient(rng, params_of, name):
    check_training(compiled(name), functools.partial(oracle, name), rng, params_of)


@pytest.mark.parametrize("name", CASES)
def test_evaluation(rng, params_of, name):
    check_evaluation(compiled(name), functools.partial(oracle, name), rng, params_of)


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(rng, name):
    check_padding(compiled(name), rng)


@pytest.mark.parametrize("name", ["expert choice", "token choice, tight, gated", "peer k=n"])
def test_no_mask_means_all_tokens_are_real(rng, name):
    case = compiled(name)
    x, *_ = draw(rng)
    expected, expected_loss, *_ = case.evaluate(case.params, case.rest, x, np.ones((B, S), bool))
    y, aux = jax.jit(lambda params, x: nnx.merge(case.eval_graph, params, case.rest, copy=True)(x))(case.params, x)
    assert relative_error(y, expected) < UNCHANGED
    assert relative_error(aux.loss, expected_loss) < UNCHANGED


@pytest.mark.parametrize("name", CASES)
def test_causality_is_as_the_layer_says(rng, name):
    case = compiled(name)
    x, *_ = draw(rng)
    assert case.layer.is_causal is (name not in LEAKY)
    earlier = [changes(case, x, slice(t, None), rng)[:t].max() for t in range(1, S)]
    if case.layer.is_causal:
        assert max(earlier) < UNCHANGED
    elif name != "expert choice, all":  # where every expert takes every token there is nothing to compete for
        assert max(earlier) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_mixing_is_as_the_layer_says(rng, name):
    case = compiled(name)
    x, *_ = draw(rng)
    assert case.layer.mixes_tokens is (name in MIXING)
    others = max(np.delete(changes(case, x, slice(t, t + 1), rng), t).max() for t in range(S))
    if not case.layer.mixes_tokens:
        assert others < UNCHANGED
    elif name != "expert choice, all":
        assert others > 1e-2


@pytest.mark.parametrize(("name", "mode"), [*((name, "evaluate") for name in SPARSE), ("peer k=n", "train")])
def test_route_is_the_forward_s_and_has_no_side_effects(rng, params_of, name, mode):
    case = compiled(name)
    x, mask, weights = draw(rng)
    graph = case.graph if mode == "train" else case.eval_graph

    @jax.jit
    def route(params, x, mask):
        layer = nnx.merge(graph, params, case.rest, copy=True)
        routing = layer.route(x, mask)
        return routing.indices, routing.gates, nnx.state(layer, nnx.Not(nnx.Param))

    indices, gates, rest = route(case.params, x, mask)
    jax.tree.map(np.testing.assert_array_equal, rest, case.rest)
    if mode == "train":
        y = case.train(case.params, x, mask, weights)[0]
    else:
        y = case.evaluate(case.params, case.rest, x, mask)[0]

    layer, _, options = CASES[name]
    params = params_of(case.params)
    slots = {PKM: (2, 4), PEER: (2, 4)}.get(layer) or (1, 3 if name in LEAKY else options["top_k"])
    assert indices.shape == gates.shape == (B, S, *slots)
    assert jnp.issubdtype(indices.dtype, jnp.integer)
    assert gates.dtype == jnp.float32
    x, indices, gates = x.astype(np.float64)[mask], np.asarray(indices)[mask], np.asarray(gates, np.float64)[mask]
    if layer is PKM:
        expected = reference.value_bag(params["values"], indices, gates)
    elif layer is PEER:
        expected = reference.expert_mix(x, params["down"], params["up"], indices, gates, "gelu")
    else:
        expected = np.zeros_like(x)
        for at in np.ndindex(gates.shape):
            out = reference.expert(params, indices[at], x[at[0]], options.get("activation", "gelu"))
            expected[at[0]] += gates[at] * out
    assert relative_error(np.asarray(y)[mask], expected) < FP32


@pytest.mark.parametrize("name", CASES)
def test_parameter_counts(name):
    layer = compiled(name).layer
    kind, sizes, options = CASES[name]
    leaves = {".".join(map(str, path)): leaf.size for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert layer.num_params() == sum(leaves.values())
    if kind is Dense:
        active = sum(leaves.values())
    elif kind is MoE:
        # The average number of experts that compute a token: its own choices, or the experts that choose it.
        slots = min(options.get("capacity_factor", 1.0), 3) if name in LEAKY else options.get("top_k", 1)
        neuron = (3 if options.get("activation", "gelu") != "gelu" else 2) * D
        active = leaves["router.kernel"] + (slots * sizes[2] + options.get("shared_d_ff", 0)) * neuron
    else:
        tables = {PEER: 2, PKM: 1}[kind] * D
        routing = sum(size for path, size in leaves.items() if path not in ("down", "up", "values"))
        used = min(options["num_heads"] * options["top_k"], 16)  # a row that two heads retrieve is one row
        active = routing + used * tables
    assert layer.num_active_params() == active


@pytest.mark.parametrize(
    ("layer", "sizes", "options", "expected"),
    [
        (Dense, (16,), {}, 4 * 16 * 64),
        (Dense, (16, 24), {"activation": "swiglu"}, 6 * 16 * 24),
        (PEER, (16, 81), {"num_heads": 3, "top_k": 5, "d_key": 10}, 2 * 16 * 30 + 2 * 3 * 9 * 10 + 4 * 15 * 16),
        (PKM, (16, 81), {"num_heads": 3, "top_k": 5, "d_key": 10}, 2 * 16 * 30 + 2 * 3 * 9 * 10 + 2 * 15 * 16),
        # Two projections for the gated output.
        (
            PKM,
            (16, 81),
            {"num_heads": 3, "top_k": 5, "d_key": 10, "gated": True},
            2 * 16 * 30 + 2 * 3 * 9 * 10 + 2 * 15 * 16 + 2 * 2 * 16 * 16,
        ),
        # Granularity 4: three experts a quarter as wide as the dense layer, and a shared one.
        (
            MoE,
            (16, 32, 16),
            {"routing": "token_choice", "top_k": 3, "capacity_factor": None, "shared_d_ff": 16},
            2 * 16 * 32 + 4 * 16 * 64,
        ),
        (MoE, (16, 4, 8), {"routing": "expert_choice"}, 2 * 16 * 4 + 4 * 16 * 8),
        # ceil(32 * 1.1 / 4) = 9 tokens of 32 per expert
        (MoE, (16, 4, 8), {"routing": "expert_choice", "capacity_factor": 1.1}, 2 * 16 * 4 + 4 * 9 / 32 * 4 * 16 * 8),
        (MoE, (16, 4, 8), {"routing": "expert_choice", "capacity_factor": 9.0}, 2 * 16 * 4 + 4 * 4 * 16 * 8),
        (
            MoE,
            (16, 4, 8),
            {"routing": "token_choice", "top_k": 2, "capacity_factor": None},
            2 * 16 * 4 + 2 * 4 * 16 * 8,
        ),
        # ceil(32 * 2 * 1.1 / 4) = 18 slots per expert and 32 tokens
        (
            MoE,
            (16, 4, 8),
            {"routing": "token_choice", "top_k": 2, "capacity_factor": 1.1, "activation": "swiglu"},
            2 * 16 * 4 + 4 * 18 / 32 * 6 * 16 * 8,
        ),
    ],
)
def test_flops(layer, sizes, options, expected):
    abstract = nnx.eval_shape(lambda: layer(*sizes, **options, rngs=nnx.Rngs(0)))
    assert abstract.flops_per_token(32) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["dense swiglu", "expert choice", "token choice, dropless, all", "pkm k=N", "peer k=N"]
)
def test_bfloat16_compute_keeps_float32_parameters(rng, params_of, name):
    """Where every expert is taken, or a float32 router of exact inputs chooses, no rounding can change the choice.

    A result has gone through three or four values rounded to 8 bits (2^-9 each), of sums of terms rounded as often.
    """
    layer = build(name, dtype=jnp.bfloat16)
    layer.eval()
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.bfloat16)
    y, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert y.dtype == jnp.bfloat16
    assert aux.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype("float32")}
    expected, _ = oracle(name, params_of(layer), np.asarray(x, np.float64), np.ones((B, S), bool))
    assert relative_error(y, expected) < 2**-6


def test_param_dtype():
    options = {"num_heads": 1, "top_k": 2, "d_key": 4, "param_dtype": jnp.bfloat16}
    layer = nnx.eval_shape(lambda: PEER(4, 16, **options, rngs=nnx.Rngs(0)))
    dtypes = {".".join(map(str, path)): leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert {dtypes[name] for name in ("query_proj.kernel", "sub_keys", "down", "up")} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_seeds_at_construction(params_of, name):
    """The same seed gives the same parameters, another seed others; all are finite and none constant."""
    first, again, other = (params_of(build(name, seed=seed)) for seed in (0, 0, 1))
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
        if not path.startswith("query_norm"):
            assert np.isfinite(value).all()
            assert value.std() > 0
            assert np.abs(value - other[path]).max() > 0


@pytest.mark.parametrize("meshed", [False, True])
def test_a_large_table_is_made_in_blocks_of_rows(monkeypatch, meshed):
    """Each from a key of its own, one after another on a CPU and at once on a mesh: the same but for XLA's rounding."""
    monkeypatch.setattr(retrieval, "MOST_AT_ONCE", 150)
    initialiser = nnx.initializers.variance_scaling(1.0, "fan_out", "normal")
    mesh = Mesh(np.full((1, 1, 1), jax.devices()[0]), AXES)
    with use(Placement(mesh, "rows") if meshed else None):
        table = retrieval.initial_table(initialiser, jax.random.key(3), (64, 6), jnp.float32)[...]
    keys = jax.random.split(jax.random.key(3), 4)  # three blocks would do, but don't divide 64 rows
    expected = np.concatenate([initialiser(key, (16, 6), jnp.float32) for key in keys])
    np.testing.assert_allclose(table, expected, rtol=3e-7)  # two roundings; measured: one
    monkeypatch.undo()
    whole = retrieval.initial_table(initialiser, jax.random.key(3), (64, 6), jnp.float32)[...]
    np.testing.assert_array_equal(whole, initialiser(jax.random.key(3), (64, 6), jnp.float32))


def test_default_width_is_four_times_the_model():
    assert nnx.eval_shape(lambda: Dense(6, rngs=nnx.Rngs(0))).num_params() == 2 * 6 * 24
    assert nnx.eval_shape(lambda: MoE(6, 2, rngs=nnx.Rngs(0))).num_params() == 6 * 2 + 2 * 2 * 6 * 24


SMALL = {"num_heads": 1, "top_k": 2, "d_key": 4}


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda r: PEER(8, 15, **SMALL, rngs=r), "15"),
        (lambda r: PKM(8, 15, **SMALL, rngs=r), "15"),
        (lambda r: PEER(8, 0, **SMALL, rngs=r), "0"),
        (lambda r: PEER(8, 16, **SMALL | {"top_k": 17}, rngs=r), "17"),
        (lambda r: PKM(8, 16, **SMALL | {"top_k": 0}, rngs=r), "0"),
        (lambda r: PEER(8, 16, **SMALL | {"d_key": 7}, rngs=r), "7"),
        (lambda r: PEER(8, 16, **SMALL | {"num_heads": 0}, rngs=r), "0"),
        (lambda r: PEER(8, 16, **SMALL, query_norm="abacus", rngs=r), "abacus"),
        (lambda r: PKM(8, 16, **SMALL, score_activation="abacus", rngs=r), "abacus"),
        (lambda r: PEER(8, 16, **SMALL, activation="abacus", rngs=r), "abacus"),
        (lambda r: PEER(8, 16, **SMALL, implementation="abacus", rngs=r), "abacus"),
        (lambda r: Dense(8, activation="abacus", rngs=r), "abacus"),
        (lambda r: Dense(0, rngs=r), "0"),
        (lambda r: MoE(8, 4, activation="abacus", rngs=r), "abacus"),
        (lambda r: MoE(8, 4, routing="abacus", rngs=r), "abacus"),
        (lambda r: MoE(8, 0, rngs=r), "0"),
        (lambda r: MoE(8, 4, routing="token_choice", top_k=5, rngs=r), "5"),
        (lambda r: MoE(8, 4, routing="token_choice", top_k=0, rngs=r), "0"),
        (lambda r: MoE(8, 4, routing="expert_choice", capacity_factor=None, rngs=r), "None"),
        (lambda r: MoE(8, 4, capacity_factor=-1.5, rngs=r), r"-1\.5"),
        (lambda r: MoE(8, 4, shared_d_ff=0, rngs=r), "shared_d_ff=0"),
    ],
)
def test_a_size_that_cannot_be_is_an_error_that_names_it(build, named):
    with pytest.raises(InputError, match=rf"(?<!\w){named}\b"):
        build(nnx.Rngs(0))
