"""Bad arguments of layers and ops in Python: one sentence that names them, at construction where it can be known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_library_use import EVERY_LAYER, IN_SEQUENCES, RETRIEVAL, B, D, S, build, transformer

from peer_jax import memory
from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, MuMoE, SoftMoE
from peer_jax.models.attention import Attention
from peer_jax.ops import expert_mix, product_key_top_k, value_bag


def dense(d_model=8, **options):
    return Dense(d_model, **{"rngs": nnx.Rngs(0)} | options)


def moe(d_model=8, num_experts=4, d_ff=None, **options):
    return MoE(d_model, num_experts, d_ff, **{"routing": "token_choice", "rngs": nnx.Rngs(0)} | options)


def soft_moe(d_model=8, num_experts=4, d_ff=None, **options):
    return SoftMoE(d_model, num_experts, d_ff, **{"rngs": nnx.Rngs(0)} | options)


def mumoe(d_model=8, num_experts=4, d_ff=None, **options):
    return MuMoE(d_model, num_experts, d_ff, **{"rngs": nnx.Rngs(0)} | options)


def peer(d_model=8, num_experts=16, layer=PEER, **options):
    return layer(d_model, num_experts, **{"rngs": nnx.Rngs(0)} | RETRIEVAL | options)


pkm = functools.partial(peer, layer=PKM)

# Values that no argument of a kind takes, and a word of the sentence.
SIZES = {"a": "whole number", 2.5: "whole number", 2.0: "whole number", True: "whole number", -1: "above zero"}
NUMBERS = {"a": "number", np.inf: "number", np.nan: "number"}
TYPES = {"foo": "floating-point type", jnp.int32: "floating-point type", 3: "floating-point type"}
FUNCTIONS = {"lecun": "function"}
FLAGS = {"no": "True or False", 1: "True or False"}
CHOICES = {"foo": "not one of", (): "not one of"}
RNGS = {0: "nnx.Rngs"}
EVERY = {"d_model": SIZES, "dtype": TYPES, "param_dtype": TYPES, "rngs": RNGS}
OF_RETRIEVAL = EVERY | {
    **dict.fromkeys(("num_experts", "num_heads", "top_k", "d_key"), SIZES),
    **dict.fromkeys(("query_norm", "score_activation", "implementation"), CHOICES),
    "share_sub_keys": FLAGS,
    "query_init": FUNCTIONS,
}
ARGUMENTS = {
    dense: EVERY | {"d_ff": SIZES, "activation": CHOICES, "kernel_init": FUNCTIONS},
    moe: EVERY
    | {
        **dict.fromkeys(("num_experts", "d_ff", "top_k"), SIZES),
        **dict.fromkeys(("capacity_factor", "balance_loss_weight", "z_loss_weight", "router_noise"), NUMBERS),
        **dict.fromkeys(("routing", "activation"), CHOICES),
        **dict.fromkeys(("kernel_init", "router_init"), FUNCTIONS),
    },
    soft_moe: EVERY
    | {
        **dict.fromkeys(("num_experts", "d_ff", "slots_per_expert"), SIZES),
        "activation": CHOICES,
        **dict.fromkeys(("kernel_init", "key_init"), FUNCTIONS),
    },
    mumoe: EVERY
    | {
        **dict.fromkeys(("num_experts", "d_ff", "rank", "match", "ring_rank", "second_level"), SIZES),
        **dict.fromkeys(("form", "gate_norm", "activation"), CHOICES),
    },
    pkm: OF_RETRIEVAL | {"value_init": FUNCTIONS},
    peer: OF_RETRIEVAL | {"activation": CHOICES, "down_init": FUNCTIONS, "up_init": FUNCTIONS},
    transformer: EVERY
    | {
        **dict.fromkeys(("vocab_size", "num_blocks", "num_heads"), SIZES),
        **dict.fromkeys(("ffw", "sparse_ffw", "embed_init"), FUNCTIONS),
        **dict.fromkeys(("tie_embeddings", "remat"), FLAGS),
        "rope_theta": NUMBERS,
        "sparse_blocks": {"foo": "'middle'", 3: "'middle'", (0.5,): "'middle'", (7,): "block 7"},
    },
}
BAD_ARGUMENTS = [
    (make, argument, value, said)
    for make, arguments in ARGUMENTS.items()
    for argument, values in arguments.items()
    for value, said in values.items()
]


RETRIEVED = {
    "x": jnp.ones((3, 4)),
    "down": jnp.ones((5, 4)),
    "up": jnp.ones((5, 4)),
    "indices": jnp.zeros((3, 1, 2), jnp.int32),
    "gates": jnp.ones((3, 1, 2)),
    "activation": jax.nn.gelu,
}
BAD_ARRAYS = [
    *((expert_mix, {"x": x}, "x ") for x in (jnp.ones(()), jnp.ones((3, 4), int), [[1.0]], None, "a")),
    *((expert_mix, {"down": table}, "down ") for table in (jnp.ones(5), jnp.ones((5, 4, 1)), jnp.ones((5, 4), int))),
    (expert_mix, {"up": jnp.ones((5, 4), bool)}, "up is bool"),
    (expert_mix, {"gates": jnp.ones((3, 1, 2), int)}, "gates is int32"),
    *((expert_mix, {"indices": i}, "indices ") for i in (jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2), bool), 3)),
    (expert_mix, {"activation": "gelu"}, "activation='gelu'"),
    *((value_bag, {"values": v}, "values ") for v in (jnp.ones(()), jnp.ones(5), jnp.ones((5, 4), int), [[1.0]])),
    (value_bag, {"indices": jnp.ones((3, 1, 2))}, "indices is float32"),
    (value_bag, {"indices": jnp.zeros(2, int), "gates": jnp.ones(2)}, "gates must have the shape"),
    *((product_key_top_k, {"queries": q}, "queries ") for q in (jnp.ones(4), jnp.ones((3, 1, 4), int), None)),
    *((product_key_top_k, {"sub_keys": s}, "sub_keys") for s in (jnp.ones((4, 2)), jnp.ones((3, 4, 2)), "a")),
    *((product_key_top_k, {"k": k}, f"k={k!r}") for k in (2.0, True, "a", None, 0, 17)),
]


@pytest.mark.usefixtures("unchecked_types")
def test_bad_arrays_of_ops_are_named():
    bag = {"values": RETRIEVED["up"], "indices": RETRIEVED["indices"], "gates": RETRIEVED["gates"]}
    keys = {"queries": jnp.ones((3, 1, 4)), "sub_keys": jnp.ones((2, 4, 2)), "k": 2}
    given = {expert_mix: RETRIEVED, value_bag: bag, product_key_top_k: keys}
    for op, bad, said in BAD_ARRAYS:
        with pytest.raises(InputError) as error:
            op(**given[op] | bad)
        assert said in str(error.value), (op, bad, str(error.value))
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("initialiser", "said"),
    [
        (lambda key, shape, dtype: jnp.zeros((3, 3)), "not an array of the shape [3, 3]"),
        (lambda *_: None, "not NoneType"),
        (lambda key: None, "(key, shape, dtype)"),
        (dict, "(key, shape, dtype)"),
    ],
)
def test_an_initialiser_makes_what_it_is_asked_for(initialiser, said):
    makers = (
        (dense, "kernel_init"),
        (moe, "kernel_init"),
        (pkm, "value_init"),
        (peer, "query_init"),
        (peer, "up_init"),
    )
    for make, argument in makers:
        with pytest.raises(InputError) as error:
            make(**{argument: initialiser})
        assert said in str(error.value), (make, argument, str(error.value))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rngs": nnx.Rngs(dropout=0)}, "'params'"),
        ({"rngs": jax.random.key_data(jax.random.key(0))}, "nnx.Rngs"),
        ({"param_dtype": jnp.float8_e4m3fn}, "16 bits or more"),
        ({"activation": np.ones(3)}, "activation"),
    ],
)
def test_more_bad_arguments_are_named(options, said):
    for make in (dense, peer):
        with pytest.raises(InputError) as error:
            make(**options)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_a_layer_that_does_not_route_says_so():
    with pytest.raises(InputError, match="Dense does not route tokens"):
        build("dense").route(jnp.ones((B, S, D)))


@pytest.mark.usefixtures("unchecked_types")
def test_bad_arguments_are_named():
    for make, argument, value, said in BAD_ARGUMENTS:
        with pytest.raises(InputError) as error:
            make(**{argument: value})
        message = str(error.value)
        assert argument in message, (make, argument, value, message)
        assert said in message, (make, argument, value, message)
        assert "\n" not in message
    assert len(BAD_ARGUMENTS) > 150


@EVERY_LAYER
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "mask", "said"),
    [
        (np.zeros((B, S, D + 1), np.float32), None, r"d_model=6.*\[2, 5, 7\]"),
        (np.zeros((), np.float32), None, r"d_model=6.*\[\]"),
        (np.zeros((B, S, D), np.int32), None, "int32"),
        (np.zeros((B, S, D), bool), None, "bool"),
        ("text", None, "takes arrays"),
        (None, None, "takes arrays"),
        (np.zeros((B, S, D), np.float32), np.ones((B, S), np.int32), "int32.*mask > 0"),
        (np.zeros((B, S, D), np.float32), np.ones((B, S + 1), bool), r"\[2, 6\].*\[2, 5\]"),
        (np.zeros((B, S, D), np.float32), np.ones((B, S, 1), bool), r"\[2, 5, 1\].*\[2, 5\]"),
    ],
)
def test_bad_input_is_named(name, x, mask, said):
    layer = build(name)
    calls = [layer, layer.route] if layer.routes else [layer]
    for call in calls:
        with pytest.raises(InputError, match=said):
            call(x, mask)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", IN_SEQUENCES)
def test_tokens_that_compete_need_a_sequence(name):
    with pytest.raises(InputError, match=r"\[\.\.\., seq, 6\], not \[6\]"):
        build(name)(np.zeros(D, np.float32))


@pytest.mark.usefixtures("unchecked_types")
def test_bad_tokens_are_named():
    model = transformer()
    ids = np.zeros((B, S), np.int32)
    for arguments, said in [
        ((ids[0],), r"tokens .*\[batch, seq\], not \[5\]"),
        ((ids.astype(np.float32),), "tokens .*integers, not float32"),
        (("text",), "tokens .*integers, not str"),
        ((ids, ids[:, 1:]), r"segment_ids .*\[2, 5\], not \[2, 4\]"),
        ((ids, ids > 0), "segment_ids .*integers, not bool"),
    ]:
        for call in (model, model.route):
            with pytest.raises(InputError, match=said):
                call(*arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dense(10**7),
        lambda: dense(64, d_ff=10**12),
        lambda: moe(10**4, 10**6),
        lambda: moe(8, 10**12),
        lambda: peer(10**6, 46340**2),
        lambda: pkm(10**6, 46340**2),
        lambda: peer(8, 16, num_heads=10**12),
        lambda: transformer(d_model=10**7),
        lambda: transformer(vocab_size=10**13),
        lambda: transformer(num_blocks=10**12),
        lambda: transformer(num_blocks=10**9, sparse_blocks="all"),
    ],
)
def test_a_size_that_no_memory_holds_is_refused_before_it_is_taken(make):
    with pytest.raises(InputError, match=r"=\d{3,}.* takes at least [\d.e+]+ [GT]iB of memory, and there are"):
        make()


def test_the_blocks_of_a_transformer_are_counted_together(monkeypatch):
    """Each of its layers would fit, but not all of them."""
    one = dense(8, d_ff=4096).num_params() * 4
    monkeypatch.setattr(memory, "of_device", lambda: 3 * one)
    transformer(ffw=functools.partial(Dense, d_ff=4096), sparse_ffw=None)
    with pytest.raises(InputError, match="num_blocks=4"):
        transformer(ffw=functools.partial(Dense, d_ff=4096), sparse_ffw=None, num_blocks=4)


def test_sizes_are_free_where_nothing_is_made():
    """A model that is planned, or that is split over many devices when it is made, is not limited by this one."""
    assert nnx.eval_shape(lambda: peer(4096, 16384**2)).num_params() > 2**41


def test_more_experts_than_can_be_numbered():
    with pytest.raises(InputError, match=r"2\^31"):
        nnx.eval_shape(lambda: peer(8, 46341**2))


def test_attention_takes_sizes():
    with pytest.raises(InputError, match="num_heads=0"):
        Attention(8, 0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("width", "dtype", "implementation", "named"),
    [
        (8, jnp.bfloat16, "flash", "'flash' is not one of"),
        (8, jnp.bfloat16, "cudnn", "an NVIDIA GPU, not 'cpu'"),
        (8, jnp.bfloat16, "splash", "sequences of a multiple of 128 tokens, not 4"),
        (8, jnp.float32, "cudnn", "bfloat16 or float16, not float32"),
        (6, jnp.bfloat16, "cudnn", "not 6 and 4"),
    ],
)
def test_attention_says_what_its_implementation_needs(width, dtype, implementation, named):
    x = jnp.zeros((1, 4, 2 * width), dtype)
    with pytest.raises(InputError, match=named):
        Attention(2 * width, 2, implementation=implementation, dtype=dtype, rngs=nnx.Rngs(0))(
            x, jnp.arange(4)[None], None
        )
