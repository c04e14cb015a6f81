"""Multilinear mixtures: equal to their whole tensors, gates, published parameter counts, rank by match, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
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
from peer_jax.layers import Dense, MuMoE, Routing

# name: experts of each level, options
CASES = {
    "cp": ((5,), {"rank": 4}),
    "cp, one expert, rank 1": ((1,), {"rank": 1}),
    "cp, two levels, batch norm": ((3, 2), {"rank": 3, "gate_norm": "batch", "activation": "relu"}),
    "tr": ((4,), {"form": "TR", "rank": 3, "ring_rank": 2, "gate_norm": "batch"}),
    "tr, ranks 1": ((4,), {"form": "TR", "rank": 1, "ring_rank": 1, "gate_norm": None}),
    "tr, two levels": ((2, 3), {"form": "TR", "rank": 2, "ring_rank": 3}),
}


def build(name, **more):
    levels, options = CASES[name]
    sizes = {"num_experts": int(np.prod(levels)), "second_level": levels[1] if len(levels) > 1 else 1}
    return MuMoE(D, d_ff=5, **sizes, **options, **more, rngs=nnx.Rngs(0))


@functools.cache
def compiled(name):
    return Compiled(build(name))


def gate_options(name, running):
    levels, options = CASES[name]
    gate_norm = options.get("gate_norm", "layer")
    if running is not None:
        running = [[running[f"gate_norms.{n}.{what}"] for what in ("mean", "var")] for n in range(len(levels))]
    return {"levels": levels, "gate_norm": gate_norm, "running": running}


def oracle(name, params, x, mask, running=None):
    options = {key: value for key, value in CASES[name][1].items() if key in ("activation", "ring_rank")}
    return reference.mumoe(params, x, mask, **options, **gate_options(name, running)), 0.0


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_whole_tensor_s(rng, params_of, name):
    """Outputs and gradients, in training and evaluation; the oracle makes the tensors and sums over their experts."""
    check_training(compiled(name), functools.partial(oracle, name), rng, params_of)
    check_evaluation(compiled(name), functools.partial(oracle, name), rng, params_of)
    check_padding(compiled(name), rng)


@pytest.mark.parametrize("name", ["cp", "tr", "cp, two levels, batch norm"])
def test_it_is_causal_in_evaluation_and_mixes_nothing(rng, name):
    case = compiled(name)
    x, *_ = draw(rng)
    assert (case.layer.is_causal, case.layer.mixes_tokens) == (True, False)
    assert max(np.delete(changes(case, x, slice(t, t + 1), rng), t).max() for t in range(S)) < UNCHANGED


@pytest.mark.parametrize("name", ["cp", "tr, two levels", "cp, two levels, batch norm"])
def test_route_has_the_gates_of_all_experts(rng, params_of, name):
    """Experts of two levels are numbered as in the tensor; running statistics stay as they are."""
    case = compiled(name)
    x, mask, weights = draw(rng)
    rest = case.train(case.params, x, mask, weights)[2]

    @jax.jit
    def route(params, rest, x, mask):
        layer = nnx.merge(case.graph, params, rest, copy=True)
        return layer.route(x, mask), nnx.state(layer, nnx.Not(nnx.Param))

    (indices, gates), after = route(case.params, rest, x, mask)
    jax.tree.map(np.testing.assert_array_equal, after, rest)
    experts = case.layer.num_experts
    assert indices.shape == gates.shape == (B, S, 1, experts)
    assert (np.asarray(indices) == np.arange(experts)).all()
    expected = reference.mumoe_gates(params_of(case.params), x.astype(np.float64), mask, **gate_options(name, None))
    assert relative_error(np.asarray(gates)[mask][:, 0], expected[mask]) < FP32
    assert (expected[mask] == 0).any()  # some experts are not used


# What it tells of its experts


@pytest.mark.parametrize("name", CASES)
def test_it_mixes_any_experts_with_any_gates(rng, params_of, name):
    """Gates that are no product of levels, of experts in any order, of which one is listed twice."""
    layer = build(name)
    x = rng.normal(size=(2, 3, D)).astype(np.float32)
    indices = rng.integers(layer.num_experts, size=(2, 3, 2, 3))
    indices[..., 1, 0] = indices[..., 0, 2]
    weights = rng.normal(size=indices.shape)
    gates = np.zeros((2, 3, layer.num_experts))
    for at in np.ndindex(indices.shape):
        gates[(*at[:2], indices[at])] += weights[at]
    routing = Routing(jnp.asarray(indices, jnp.int32), jnp.asarray(weights, jnp.float32))
    options = {key: value for key, value in CASES[name][1].items() if key in ("activation", "ring_rank")}
    expected = reference.mumoe_mix(params_of(layer), x.astype(np.float64), gates, **options)
    assert relative_error(layer.mix(jnp.asarray(x), routing), expected) < FP32


@pytest.mark.parametrize("name", CASES)
def test_matrices_of_experts_are_slices_of_the_tensor(params_of, name):
    layer, ring_rank = build(name), CASES[name][1].get("ring_rank")
    params, experts = params_of(layer), np.arange(layer.num_experts)[::-2]
    rows = layer.expert_matrices(jnp.asarray(experts, jnp.int32))
    for of, found in (("first", np.swapaxes(rows["up"], 1, 2)), ("second", rows["down"])):
        tensor = reference.mumoe_tensor(params, of, ring_rank)[experts]
        assert relative_error(found, tensor[:, :-1]) < FP32  # without the row of biases
        whole = getattr(layer, of).weights(jnp.asarray(experts, jnp.int32))
        assert relative_error(whole, tensor) < FP32


def test_keys_of_experts_are_the_columns_of_their_levels(rng):
    layer = build("tr, two levels")
    layer.gate.kernel[...] = jnp.asarray(rng.normal(size=(D, 5)), jnp.float32)
    kernel = np.asarray(layer.gate.kernel[...])
    keys = layer.expert_keys(jnp.asarray([0, 4], jnp.int32))  # experts (0, 0) and (1, 1) of 2 times 3
    expected = [np.concatenate([kernel[:, 0], kernel[:, 2]]), np.concatenate([kernel[:, 1], kernel[:, 3]])]
    np.testing.assert_array_equal(keys, expected)


# At construction


def test_many_experts_are_not_listed():
    """A million of them train like any others, but an array of [tokens, N] gates would fill the memory."""

    def build():
        return MuMoE(4, 1024**2, second_level=1024, rank=2, rngs=nnx.Rngs(0))

    layer = nnx.eval_shape(build)
    assert not layer.routes
    with pytest.raises(InputError, match="num_experts=1048576 is more than 1024, whose gates can be listed"):
        layer.route(jnp.ones((3, 4)))
    nothing = Routing(jnp.zeros((3, 1, 1), jnp.int32), jnp.zeros((3, 1, 1)))
    assert layer.mix(jnp.ones((3, 4)), nothing) is None
    assert nnx.eval_shape(lambda: build()(jnp.ones((3, 4)))[0]).shape == (3, 4)


def test_experts_begin_equal_and_near_a_linear_map(rng):
    """The gate is uniform whatever x is, and factors have the paper's distributions."""
    layer = MuMoE(16, 64, rank=32, rngs=nnx.Rngs(0))
    gates = layer.route(jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)).gates
    np.testing.assert_allclose(gates, 1 / 64, rtol=1e-5)
    a = np.asarray(layer.first.experts[0].kernel[...])
    # 2048 draws: means and deviations within 4 standard errors.
    assert abs(a.mean() - 1) < 4 / np.sqrt(a.size)
    assert abs(a.std() - 1) < 4 / np.sqrt(2 * a.size)
    for kernel, bound in (
        (layer.first.input.kernel, 16**-0.5),
        (layer.first.bias, 16**-0.5),
        (layer.first.output.kernel, 32**-0.5),
        (layer.second.input.kernel, 64**-0.5),
    ):
        values = np.abs(kernel[...])
        assert 0.85 * bound < values.max() <= bound
    assert relative_error(np.std(layer.first.output.kernel[...]), 32**-0.5 / np.sqrt(3)) < 0.05


def test_second_levels_begin_as_one_and_rings_as_diagonals():
    cp, tr = (MuMoE(8, 12, second_level=3, rank=2, form=form, ring_rank=4, rngs=nnx.Rngs(0)) for form in ("CP", "TR"))
    np.testing.assert_array_equal(cp.first.experts[1].kernel[...], np.ones((3, 2)))
    first, second = (np.asarray(factor.kernel[...]).reshape(-1, 4, 4) for factor in tr.first.experts)
    np.testing.assert_array_equal(second, np.tile(np.eye(4, dtype=np.float32), (3, 1, 1)))
    assert not first[:, ~np.eye(4, dtype=bool)].any()
    assert first[:, np.eye(4, dtype=bool)].std() > 0.5
    bound = (4 * 2) ** -0.5
    assert 0.85 * bound < np.abs(tr.first.output.kernel[...]).max() <= bound


# Counts

GPT2 = 768


@pytest.mark.parametrize(
    ("form", "experts", "rank"), [("CP", 64, 599), ("CP", 256, 556), ("TR", 64, 153), ("TR", 256, 149)]
)
def test_parameters_of_the_published_gpt2_blocks(form, experts, rank):
    """The ranks in the authors' code, int(768 * 0.78), 0.725, 0.2 and 0.195, whose counts come within 2% of the dense.

    Their counts are R (N + I + 1 + O), and N R1 R2 + R2 (I + 1) R3 + R3 O R1, for each map, and I N for the gate.
    """
    layer = nnx.eval_shape(lambda: MuMoE(GPT2, experts, rank=rank, form=form, rngs=nnx.Rngs(0)))
    maps = ((GPT2, 4 * GPT2), (4 * GPT2, GPT2))
    if form == "CP":
        factors = sum(rank * (experts + i + 1 + o) for i, o in maps)
        flops = sum(2 * rank * (experts + i + o) for i, o in maps)
    else:
        factors = sum(4 * experts * 4 + 4 * (i + 1) * rank + rank * o * 4 for i, o in maps)
        flops = sum(2 * (4 * i * rank + 4 * experts * 4 + 4 * 4 * rank + 4 * o * rank) for i, o in maps)
    assert layer.num_params() == layer.num_active_params() == factors + GPT2 * experts
    assert layer.flops_per_token(1024) == flops + 2 * GPT2 * experts
    dense = nnx.eval_shape(lambda: Dense(GPT2, rngs=nnx.Rngs(0))).num_params()
    assert abs(layer.num_params() / dense - 1) < 0.02


@pytest.mark.parametrize("options", [{}, {"form": "TR"}, {"second_level": 4}, {"form": "TR", "second_level": 8}])
@pytest.mark.parametrize("match", [None, 300])
def test_the_rank_is_that_of_a_dense_layer_s_parameters(options, match):
    """No other rank comes closer."""

    def params(**more):
        return nnx.eval_shape(lambda: MuMoE(64, 32, **options, **more, rngs=nnx.Rngs(0))).num_params()

    layer = nnx.eval_shape(lambda: MuMoE(64, 32, match=match, **options, rngs=nnx.Rngs(0)))
    rank = layer.first.output.in_features // (4 if layer.form == "TR" else 1)
    dense = 2 * 64 * (match or 256)
    best = abs(layer.num_params() - dense)
    assert layer.num_params() == params(rank=rank)
    assert all(abs(params(rank=other) - dense) >= best for other in (rank - 1, rank + 1))
    assert layer.options() == {**options, **({"match": match} if match else {})}


def test_labels_do_not_depend_on_the_size():
    labels = {
        nnx.eval_shape(lambda d=d: MuMoE(d, 8, second_level=2, form="TR", rngs=nnx.Rngs(0))).label for d in (32, 64)
    }
    assert labels == {"MuMoE (TR, second_level=2)"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_experts": 9, "second_level": 2}, r"num_experts=9 is not a multiple of second_level=2"),
        ({"rank": 3, "match": 10}, r"rank=3 and match=10 both"),
        ({"num_experts": 1000}, r"num_experts=1000: .* width 32 with d_model=8: choose fewer"),
        ({"match": 1}, r"width 1 with"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        MuMoE(8, **{"num_experts": 4} | arguments, rngs=nnx.Rngs(0))


def test_batch_norm_needs_the_whole_batch():
    assert MuMoE(8, 4, gate_norm="batch", rngs=nnx.Rngs(0)).needs_whole_batch[0] == "batch-norm of the gate"
    assert MuMoE(8, 4, rngs=nnx.Rngs(0)).needs_whole_batch is None
