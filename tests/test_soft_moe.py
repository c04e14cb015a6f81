"""Soft MoE: against its oracle, its leak and who says so, counts, and what it refuses."""

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
from peer_jax.layers import Dense, MoE, SoftMoE
from peer_jax.layers.interface import DeviceLoad
from peer_jax.models import Transformer

# name: sizes, options
CASES = {
    "one expert, one slot": ((D, 1, 5), {}),
    "slots": ((D, 3, 5), {"slots_per_expert": 2}),
    "one slot each, gated": ((D, 4, 5), {"activation": "swiglu"}),
    "more slots than tokens": ((D, 2, 3), {"slots_per_expert": 9, "activation": "geglu"}),
}


def build(name, **more):
    sizes, options = CASES[name]
    return SoftMoE(*sizes, **options, **more, rngs=nnx.Rngs(0))


@functools.cache
def compiled(name):
    return Compiled(build(name))


def oracle(name, params, x, mask, running=None):
    return reference.soft_moe(params, x, mask, activation=CASES[name][1].get("activation", "gelu")), 0.0


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracle(rng, params_of, name):
    check_training(compiled(name), functools.partial(oracle, name), rng, params_of)
    check_evaluation(compiled(name), functools.partial(oracle, name), rng, params_of)
    check_padding(compiled(name), rng)


def test_padding_gets_nothing(rng):
    case = compiled("slots")
    x, mask, _ = draw(rng)
    assert not np.any(np.asarray(case.evaluate(case.params, case.rest, x, mask)[0])[~mask])


def test_a_later_token_changes_earlier_outputs_and_the_model_says_so(rng):
    case = compiled("slots")
    x, *_ = draw(rng)
    assert (case.layer.is_causal, case.layer.mixes_tokens) == (False, True)
    assert min(changes(case, x, slice(t, None), rng)[:t].max() for t in range(1, S)) > 1e-2
    layer = functools.partial(SoftMoE, num_experts=2)
    model = nnx.eval_shape(lambda: Transformer(13, 8, 3, 2, ffw=Dense, sparse_ffw=layer, rngs=nnx.Rngs(0)))
    assert (model.is_causal, model.mixes_tokens, model.method.routes) == (False, True, False)


def test_sequences_are_groups(rng):
    """A token of one sequence changes nothing in another one."""
    case = compiled("slots")
    x, *_ = draw(rng)
    moved = x.copy()
    moved[0] *= 3
    y, after = (case.evaluate(case.params, case.rest, a, np.ones((B, S), bool))[0] for a in (x, moved))
    assert relative_error(after[1], y[1]) < UNCHANGED
    assert relative_error(after[0], y[0]) > 1e-2


def test_directions_of_tokens_and_keys_decide_and_the_scale_says_how_much(rng):
    """In closed form: a scale of zero averages; a large one has each token read the slot with the nearest key."""
    layer = build("one slot each, gated", dtype=jnp.float32)
    x = rng.normal(size=(1, S, D)).astype(np.float32)
    run = nnx.jit(lambda layer, x: layer(x))
    layer.scale.set_value(jnp.zeros(()))
    y, aux = run(layer, x)
    assert relative_error(y, np.broadcast_to(y[:, :1], y.shape)) < FP32
    assert float(aux.metrics["top_slot"]) == pytest.approx(1 / 4)
    layer.scale.set_value(jnp.full((), 1e4))
    y, aux = run(layer, x)
    assert float(aux.metrics["top_slot"]) > 0.99
    directions, keys = x[0] / np.linalg.norm(x[0], axis=-1, keepdims=True), np.asarray(layer.keys[...])[..., 0]
    nearness = directions @ (keys / np.linalg.norm(keys, axis=0))
    params = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("up", "gate", "down")}
    for t, e in enumerate(np.argmax(nearness, axis=1)):
        read = x[0, np.argmax(nearness[:, e])].astype(np.float64)
        assert relative_error(y[0, t], reference.expert(params, e, read, "swiglu")) < 1e-2


def test_bfloat16(rng, params_of):
    """As in test_layers: a result has gone through some values rounded to 8 bits."""
    layer = build("slots", dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.bfloat16)
    y, _ = nnx.jit(lambda layer, x: layer(x))(layer, x)
    expected, _ = oracle("slots", params_of(layer), np.asarray(x, np.float64), np.ones((B, S), bool))
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected) < 2**-6


def test_counts():
    layer = nnx.eval_shape(lambda: SoftMoE(16, 4, 8, slots_per_expert=6, activation="swiglu", rngs=nnx.Rngs(0)))
    expert = 3 * 16 * 8
    assert layer.num_params() == layer.num_active_params() == 4 * expert + 16 * 24 + 1
    # Per token: logits, slots and outputs, and 24 slots' MLPs for 32 tokens.
    assert layer.flops_per_token(32) == 3 * 2 * 16 * 24 + 24 / 32 * 2 * expert
    # As many slots as tokens: the experts cost what one dense layer costs.
    same, dense = (nnx.eval_shape(lambda f=f: f(rngs=nnx.Rngs(0))) for f in (
        functools.partial(SoftMoE, 16, 4, slots_per_expert=8), functools.partial(Dense, 16)))  # fmt: skip
    assert same.flops_per_token(32) - 6 * 16 * 32 == dense.flops_per_token(32)


def test_what_is_sent_is_what_expert_choice_sends_for_as_many_places():
    load = DeviceLoad(tokens=64, seq_len=32, expert=4, copies=2, tables="rows", size=4, remat=False)
    soft, hard = (nnx.eval_shape(lambda f=f: f(rngs=nnx.Rngs(0))) for f in (
        functools.partial(SoftMoE, 16, 4, slots_per_expert=8), functools.partial(MoE, 16, 4)))  # fmt: skip
    assert soft.exchanged(load) == hard.exchanged(load)
    assert soft.exchanged(load).all_to_all == 4 * 4 * 64 * 16


def test_labels_and_routes():
    layer = build("slots")
    assert layer.label == "SoftMoE (d_ff=5, slots_per_expert=2)"
    assert layer.num_experts == 3
    with pytest.raises(InputError, match="SoftMoE does not route"):
        layer.route(jnp.zeros((B, S, D)))
    assert jax.tree.leaves(nnx.state(layer, nnx.Param))[0].dtype == jnp.float32
