"""FLOPs against XLA's count and in closed form, parameters against their trees, steps against the budget."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, MuMoE, SoftMoE
from peer_jax.models import Transformer, ViT
from peer_jax.models.attention import Attention
from peer_jax.training.flops import steps_for, training_flops

B, S = 2, 16
V = 64


def abstract(build):
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def xla_flops(module, call, *inputs):
    """What XLA counts for a forward pass, compiled for the CPU."""
    graph, state = nnx.split(module)

    def forward(state, *inputs):
        return call(nnx.merge(graph, state, copy=True), *inputs)

    return jax.jit(forward).lower(state, *inputs).compile().cost_analysis()["flops"]


def layer_flops(build, width):
    layer = abstract(functools.partial(build, width))
    x = jax.ShapeDtypeStruct((B, S, width), jnp.float32)
    return xla_flops(layer, lambda layer, x: layer(x)[0], x), layer.flops_per_token(S) * B * S


def attention_flops(width):
    attention = abstract(functools.partial(Attention, width, 2))
    x = jax.ShapeDtypeStruct((B, S, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
    counted = xla_flops(attention, lambda attention, *inputs: attention(*inputs)[0], x, ids, ids)
    return counted, attention.flops_per_token(S) * B * S


def model_flops(layer, width):
    model = abstract(functools.partial(Transformer, V, width, 3, 2, ffw=Dense, sparse_ffw=layer))
    tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
    return xla_flops(model, lambda model, tokens: model(tokens)[0], tokens), model.flops_per_token(S) * B * S


def vit_flops(width):
    model = abstract(functools.partial(ViT, (8, 16, 3), 4, 10, width, 3, 2, ffw=Dense))
    images = jax.ShapeDtypeStruct((B, 8, 16, 3), jnp.float32)
    return xla_flops(model, lambda model, images: model(images)[0], images), model.flops_per_token(8) * B * 8


def retrieval(layer, **options):
    """Sizes whose projection, scores and retrieved rows are each a good part of the whole."""

    def build(width, **more):
        sizes = {"num_heads": 2, "top_k": 16, "d_key": width // 2, "implementation": "reference"}
        return layer(width, 32 * 32, **sizes, **options, **more)

    return build


def moe(**options):
    return lambda width, **more: MoE(width, 8, 16, **options, **more)


COUNTED = {
    "dense": functools.partial(layer_flops, lambda width, **more: Dense(width, 32, **more)),
    "swiglu": functools.partial(layer_flops, lambda width, **more: Dense(width, 32, activation="swiglu", **more)),
    "expert choice": functools.partial(layer_flops, moe()),
    "expert choice, uneven": functools.partial(layer_flops, moe(capacity_factor=1.2)),
    "token choice": functools.partial(layer_flops, moe(routing="token_choice", top_k=2)),
    "token choice, wide": functools.partial(
        layer_flops, moe(routing="token_choice", top_k=2, capacity_factor=1.3, activation="geglu")
    ),
    "soft moe": functools.partial(layer_flops, lambda width, **more: SoftMoE(width, 4, 16, slots_per_expert=8, **more)),
    "mumoe": functools.partial(layer_flops, lambda width, **more: MuMoE(width, 8, 32, rank=16, **more)),
    "mumoe, tr": functools.partial(
        layer_flops,
        lambda width, **more: MuMoE(width, 8, 32, form="TR", rank=8, ring_rank=2, second_level=2, **more),
    ),
    "pkm": functools.partial(layer_flops, retrieval(PKM)),
    "pkm, sub-keys a head": functools.partial(layer_flops, retrieval(PKM, share_sub_keys=False, query_norm=None)),
    "peer": functools.partial(layer_flops, retrieval(PEER)),
    "attention": attention_flops,
    "model": functools.partial(model_flops, retrieval(PEER)),
    "vit": vit_flops,
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_xla_s(name):
    """By the growth from one width to twice that: top-k, softmax over scores and what else no width enters cancel.

    We count no activations, norms, gates and rotations: up to a dozen operations an element, where the product that
    made the element spends 2 * 128 or more. So XLA counts up to 5 per cent more, and never less.
    """
    (xla_small, ours_small), (xla_large, ours_large) = COUNTED[name](128), COUNTED[name](256)
    ratio = (xla_large - xla_small) / (ours_large - ours_small)
    assert 1.0 <= ratio < 1.05, ratio


def test_dropless_flops_in_closed_form():
    """XLA's CPU form of ragged_dot computes every expert for every row, so its count says nothing here."""
    d, e, f, k = 16, 8, 32, 2
    options = {"routing": "token_choice", "top_k": k, "capacity_factor": None}
    plain, gated = (
        abstract(functools.partial(MoE, d, e, f, activation=activation, **options)) for activation in ("gelu", "swiglu")
    )
    assert plain.flops_per_token(S) == 2 * d * e + k * 2 * 2 * d * f
    assert gated.flops_per_token(S) == 2 * d * e + k * 3 * 2 * d * f


def test_model_s_flops_by_part():
    d, f, n, h, k, d_key = 16, 24, 8, 2, 4, 4
    layer = functools.partial(PEER, num_experts=n * n, num_heads=h, top_k=k, d_key=d_key)
    model = abstract(functools.partial(Transformer, V, d, 3, 2, ffw=functools.partial(Dense, d_ff=f), sparse_ffw=layer))
    assert model.flops_by_part(S) == {
        "attention": 3 * (2 * 4 * d * d + 2 * 2 * S * d),
        "Dense": 2 * (2 * 2 * d * f),
        "PEER": 2 * d * h * d_key + 2 * h * n * d_key + 2 * 2 * h * k * d,
        "logits": 2 * d * V,
    }
    assert model.flops_per_token(S) == sum(model.flops_by_part(S).values())
    vit = abstract(functools.partial(ViT, (8, 8, 3), 2, 10, d, 3, 2, ffw=functools.partial(Dense, d_ff=f)))
    assert vit.flops_by_part(16) == {  # per patch; the logits of an image are shared by its 16 patches
        "patches": 2 * 12 * d,
        "attention": 3 * (2 * 4 * d * d + 2 * 2 * 16 * d),
        "logits": 2 * d * 10 / 16,
        "Dense": 3 * (2 * 2 * d * f),
    }
    assert vit.num_params() == 12 * d + 16 * d + 3 * (4 * d * d + 2 * d * f + 2 * d) + d + 10 * d
    tied = abstract(functools.partial(Transformer, V, d, 1, 2, ffw=Dense, tie_embeddings=True))
    assert tied.flops_by_part(S)["logits"] == 2 * d * V
    assert training_flops(model, 1000, S) == 3 * 1000 * model.flops_per_token(S)


# Parameters


D, F, E, N, H, K, D_KEY = 16, 24, 6, 64, 2, 4, 4
ROUTER, EXPERT = D * E, 2 * D * F
RETRIEVAL = {"num_heads": H, "top_k": K, "d_key": D_KEY}
QUERIES, SUB_KEYS = D * H * D_KEY, 2 * 8 * D_KEY // 2
PARAMS = {
    # layer: all, active
    "dense": (functools.partial(Dense, D, F), EXPERT, EXPERT),
    "swiglu": (functools.partial(Dense, D, F, activation="swiglu"), 3 * D * F, 3 * D * F),
    "default width": (functools.partial(Dense, D), 8 * D * D, 8 * D * D),
    "expert choice": (functools.partial(MoE, D, E, F), ROUTER + E * EXPERT, ROUTER + EXPERT),
    "expert choice, 1.5": (
        functools.partial(MoE, D, E, F, capacity_factor=1.5),
        ROUTER + E * EXPERT,
        ROUTER + EXPERT * 3 // 2,
    ),
    "expert choice, more than all": (
        functools.partial(MoE, D, E, F, capacity_factor=2.0 * E),
        ROUTER + E * EXPERT,
        ROUTER + E * EXPERT,
    ),
    "token choice": (
        functools.partial(MoE, D, E, F, routing="token_choice", top_k=2, capacity_factor=1.5, activation="geglu"),
        ROUTER + E * 3 * D * F,
        ROUTER + 2 * 3 * D * F,
    ),
    "dropless": (
        functools.partial(MoE, D, E, F, routing="token_choice", top_k=2, capacity_factor=None),
        ROUTER + E * EXPERT,
        ROUTER + 2 * EXPERT,
    ),
    "pkm": (
        functools.partial(PKM, D, N, **RETRIEVAL),
        QUERIES + 2 * H * D_KEY + SUB_KEYS + N * D,
        QUERIES + 2 * H * D_KEY + SUB_KEYS + H * K * D,
    ),
    "peer": (
        functools.partial(PEER, D, N, **RETRIEVAL),
        QUERIES + 2 * H * D_KEY + SUB_KEYS + 2 * N * D,
        QUERIES + 2 * H * D_KEY + SUB_KEYS + 2 * H * K * D,
    ),
    "peer, sub-keys a head": (
        functools.partial(PEER, D, N, **RETRIEVAL, share_sub_keys=False, query_norm="layer"),
        QUERIES + 2 * D_KEY + H * SUB_KEYS + 2 * N * D,
        QUERIES + 2 * D_KEY + H * SUB_KEYS + 2 * H * K * D,
    ),
    "peer, more retrieved than there are": (
        functools.partial(PEER, D, 4, num_heads=2, top_k=4, d_key=D_KEY, query_norm=None),
        QUERIES + 2 * 2 * D_KEY // 2 + 2 * 4 * D,
        QUERIES + 2 * 2 * D_KEY // 2 + 2 * 4 * D,
    ),
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_in_closed_form(name):
    build, everything, active = PARAMS[name]
    layer = abstract(build)
    tree = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert layer.num_params() == everything == sum(math.prod(p.shape) for p in tree)
    assert layer.num_active_params() == active

    def sparse(d_model, *, dtype, param_dtype, rngs):
        return build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    # In a model, between two dense blocks.
    model = abstract(
        functools.partial(Transformer, V, D, 3, 2, ffw=functools.partial(Dense, d_ff=F), sparse_ffw=sparse)
    )
    rest = 2 * V * D + 3 * (4 * D * D + 2 * D) + D + 2 * EXPERT
    assert model.num_params() == rest + everything
    assert model.num_active_params() == rest + active


# Steps


@functools.cache
def small_model():
    return abstract(functools.partial(Transformer, V, D, 2, 2, ffw=Dense))


@settings(deadline=None)
@given(st.floats(1, 1e6), st.integers(1, 64), st.integers(1, 512))
def test_steps_come_within_half_a_step_of_the_budget(ratio, batch_size, seq_len):
    step = 3 * small_model().flops_per_token(seq_len) * batch_size * seq_len
    steps = steps_for(ratio * step, small_model(), batch_size, seq_len)
    assert steps >= 1
    assert abs(steps * step - ratio * step) <= 0.5 * step * (1 + 1e-9)


def test_a_budget_below_one_step_is_named():
    step = training_flops(small_model(), 4 * S, S)
    assert steps_for(step, small_model(), 4, S) == 1
    with pytest.raises(InputError, match=r"training_flops=.*batch_size=4"):
        steps_for(0.999 * step, small_model(), 4, S)
    with pytest.raises(InputError, match=r"training_flops=.* more than 2147483647: lower it"):
        steps_for(3e9 * step, small_model(), 4, S)
