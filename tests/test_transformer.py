"""The whole decoder: against a NumPy one, causality, packing, padding, remat, types, block placement, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.models.model import sparse_block_indices

V, D, HEADS, BLOCKS = 11, 8, 2, 2
B, S = 2, 9
# float32 against float64 through some 15 products, 11 wide at most; partial sums are of the results' size, and RMSNorm
# brings every block's input back to size 1. About 15 * 11**0.5 roundings of 6e-8, with room for cancellation.
FP32 = 2e-5
# A leak moves logits by their own size; another order of the same sums moves them by a few roundings per block.
UNCHANGED = 5e-6

LOSSES = {"balance_loss_weight": 0.5, "z_loss_weight": 0.25}
RETRIEVAL = {"num_experts": 16, "num_heads": 2, "d_key": 4, "top_k": 4}
KINDS = {
    "dense": (Dense, {"d_ff": 12}),
    "expert choice": (MoE, {"num_experts": 3, "d_ff": 5, "routing": "expert_choice"}),
    "token choice": (
        MoE,
        {"num_experts": 3, "d_ff": 5, "routing": "token_choice", "top_k": 2, "capacity_factor": 0.8, **LOSSES},
    ),
    "dropless": (
        MoE,
        {"num_experts": 3, "d_ff": 5, "routing": "token_choice", "top_k": 2, "capacity_factor": None, **LOSSES},
    ),
    "pkm": (PKM, RETRIEVAL),
    "peer": (PEER, RETRIEVAL),
}
CAUSAL = [kind for kind in KINDS if kind != "expert choice"]


def build(kind, **options):
    """Every second block has the layer, the others a dense one; parameters and statistics are all random."""
    layer, sizes = KINDS[kind]
    sparse = {"sparse_ffw": functools.partial(layer, **sizes), "sparse_blocks": "every 2"}
    options = {"ffw": functools.partial(Dense, d_ff=12), **sparse, **options}
    model = nnx.eval_shape(lambda: Transformer(V, D, BLOCKS, HEADS, **options, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)

    def draw(path, variable):
        spread = rng.normal(size=variable.shape)
        if isinstance(variable, nnx.BatchStat):
            spread = rng.uniform(0.5, 1.5, variable.shape)
        elif variable.ndim == 1:
            spread = 1 + 0.2 * spread
        elif path[-1] == "kernel" or (variable.ndim == 3 and path[-1] != "sub_keys"):
            spread *= variable.shape[-2] ** -0.5  # keeps the size of what it multiplies
        return variable.replace(jnp.asarray(spread, variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@functools.cache
def compiled(kind, training=False, **options):
    """The model, its parameters, the rest of its state, and jitted

    evaluating, (params, rest, tokens, segment_ids) -> logits, loss, the rest of the state;
    training, (params, rest, tokens, segment_ids, weights) -> that of sum(weights * logits) + loss, and gradients.
    """
    model = build(kind, **options)
    if not training:
        model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, rest, tokens, segment_ids):
        model = nnx.merge(graph, params, rest, copy=True)
        logits, aux = model(tokens, segment_ids)
        return logits, aux.loss, nnx.state(model, nnx.Not(nnx.Param))

    def total(params, rest, tokens, segment_ids, weights):
        results = run(params, rest, tokens, segment_ids)
        return jnp.sum(results[0] * weights) + results[1], results

    return model, params, rest, jax.jit(jax.grad(total, has_aux=True) if training else run)


def evaluate(kind, tokens, segment_ids):
    """Logits and loss in evaluation mode. Rows are filled up to S with padding, so that a kind is compiled once."""
    _, params, rest, run = compiled(kind)
    rows, size = tokens.shape
    fill = ((0, 0), (0, S - size))
    tokens, segment_ids = np.pad(tokens, fill, constant_values=7), np.pad(segment_ids, fill)
    spread = np.resize(np.arange(rows), S)  # a batch of S rows always
    logits, loss, rest_after = run(params, rest, tokens[spread], segment_ids[spread])
    jax.tree.map(np.testing.assert_array_equal, rest_after, rest)  # evaluation changes no state
    return np.asarray(logits)[:rows, :size], loss


def packed(rng):
    """Tokens, and segment ids with two documents and padding in the first row, padding first in the second."""
    tokens = rng.integers(V, size=(B, S)).astype(np.int32)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32)
    return tokens, segment_ids


# An independent decoder, in float64.


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x, position, theta=10_000.0):
    """One head's vector: the pair (i, i + c/2) as a complex number, turned by position * theta^(-2i/c)."""
    half = x.shape[-1] // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attention(kernel, out, x, segments):
    """One row [S, D]: every token over those before it in its document, positions counted within it."""
    width = D // HEADS
    query, key, value = (a.reshape(-1, HEADS, width) for a in np.split(x @ kernel, 3, axis=-1))
    y = np.zeros_like(x)
    for t, head in np.ndindex(len(x), HEADS):
        seen = [s for s in range(t + 1) if segments[s] == segments[t] and len(set(segments[s : t + 1])) == 1]
        scores = [rope(query[t, head], t - seen[0]) @ rope(key[s, head], s - seen[0]) for s in seen]
        weights = np.exp(np.array(scores) / math.sqrt(width))
        mixed = sum(w * value[s, head] for w, s in zip(weights / weights.sum(), seen, strict=True))
        y[t, head * width : (head + 1) * width] = mixed
    return y @ out


def feed_forward(kind, params, x, mask, running):
    layer, sizes = KINDS[kind]
    sizes = {name: size for name, size in sizes.items() if name not in ("routing", "d_ff", "d_key", "num_experts")}
    if layer is Dense:
        return reference.dense(params, x, **sizes), 0.0
    if kind == "expert choice":
        return reference.moe_expert_choice(params, x, mask, **sizes)[0], 0.0
    if layer is MoE:
        return reference.moe_token_choice(params, x, mask, **sizes)[:2]
    return {PKM: reference.pkm, PEER: reference.peer}[layer](params, x, mask, running=running, **sizes), 0.0


def decoder(kind, params, tokens, segments, running=None, ffw_inputs=None):
    """Logits and the auxiliary loss; `ffw_inputs` collects the inputs of the feed-forward layers."""

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}

    x, loss, mask = params["embed.embedding"][tokens], 0.0, segments > 0
    for index in range(BLOCKS):
        p = part(f"blocks.{index}.")
        normed = rms_norm(x, p["attention_norm.scale"])
        kernels = p["attention.query_key_value.kernel"], p["attention.out.kernel"]
        x = x + np.stack([attention(*kernels, row, ids) for row, ids in zip(normed, segments, strict=True)])
        normed = rms_norm(x, p["ffw_norm.scale"])
        if ffw_inputs is not None:
            ffw_inputs.append(normed)
        block_kind = kind if index % 2 == 1 else "dense"
        y, aux_loss = feed_forward(block_kind, part(f"blocks.{index}.ffw."), normed, mask, running)
        x, loss = x + y, loss + aux_loss
    x = rms_norm(x, params["final_norm.scale"])
    return x @ (params["head.kernel"] if "head.kernel" in params else params["embed.embedding"].T), loss


def running_of(rest):
    flat = {path[-1]: np.asarray(variable.get_value(), np.float64) for path, variable in nnx.to_flat_state(rest)}
    return (flat["mean"], flat["var"]) if "mean" in flat else None


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_the_numpy_decoder(rng, params_of, kind):
    _, params, rest, _ = compiled(kind)
    tokens, segments = packed(rng)
    repeated = np.resize(np.arange(B), S)  # what `evaluate` fills the batch with: the loss is a mean over rows
    logits, loss = evaluate(kind, tokens, segments)
    assert logits.dtype == np.float32
    expected, expected_loss = decoder(kind, params_of(params), tokens[repeated], segments[repeated], running_of(rest))
    real = segments > 0
    assert relative_error(logits[real], expected[:B][real]) < FP32
    assert relative_error(loss, expected_loss) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_training_forward_and_gradient_equal_those_of_the_numpy_decoder(rng, params_of, kind):
    model, params, rest, gradient = compiled(kind, training=True)
    tokens, segments = packed(rng)
    real = segments > 0
    weights = np.where(real[..., None], rng.normal(size=(B, S, V)), 0).astype(np.float32)
    grads, (logits, loss, rest_after) = gradient(params, rest, tokens, segments, weights)
    params, grads = params_of(params), params_of(grads)
    assert model.num_params() == sum(p.size for p in params.values())
    ffw_inputs = []
    expected, expected_loss = decoder(kind, params, tokens, segments, ffw_inputs=ffw_inputs)
    assert relative_error(np.asarray(logits)[real], expected[real]) < FP32
    assert relative_error(loss, expected_loss) < FP32

    def total(params):
        logits, loss = decoder(kind, params, tokens, segments)
        return np.sum(logits * np.asarray(weights, np.float64)) + loss

    assert grads.keys() == params.keys()
    for name, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        slope = reference.directional_derivative(total, params, name, direction)
        terms = grad * direction
        # Against the size of the terms, since their sum may cancel.
        assert abs(terms.sum() - slope) < FP32 * max(np.abs(terms).sum(), abs(slope)), name

    if (before := running_of(rest)) is not None:
        kernel = params["blocks.1.ffw.query_proj.kernel"]
        batch = reference.batch_statistics(ffw_inputs[1] @ kernel, real)
        for old, new, after in zip(before, batch, running_of(rest_after), strict=True):
            assert relative_error(after, 0.9 * old + 0.1 * new) < FP32


def test_tied_embeddings(rng, params_of):
    """The gradient of the table is the sum of the gradients of lookup and logits."""
    model, params, rest, gradient = compiled("dense", training=True, tie_embeddings=True)
    tokens, segments = packed(rng)
    weights = np.where((segments > 0)[..., None], rng.normal(size=(B, S, V)), 0).astype(np.float32)
    grads, (logits, _, _) = gradient(params, rest, tokens, segments, weights)
    params, grad = params_of(params), params_of(grads)["embed.embedding"]
    assert "head.kernel" not in params
    assert model.num_params() == compiled("dense", training=True)[0].num_params() - V * D
    expected, _ = decoder("dense", params, tokens, segments)
    real = segments > 0
    assert relative_error(np.asarray(logits)[real], expected[real]) < FP32

    def total(params):
        return np.sum(decoder("dense", params, tokens, segments)[0] * np.asarray(weights, np.float64))

    direction = rng.normal(size=grad.shape)
    slope = reference.directional_derivative(total, params, "embed.embedding", direction)
    assert abs(np.sum(grad * direction) - slope) < FP32 * np.abs(grad * direction).sum()


def test_route_gives_the_routing_of_every_routed_block(rng, params_of):
    model, params, rest, _ = compiled("peer")
    tokens, segments = packed(rng)
    routings = nnx.jit(lambda model, tokens, segments: model.route(tokens, segments))(model, tokens, segments)
    assert list(routings) == [1]
    ffw_inputs = []
    params = params_of(params)
    decoder("peer", params, tokens, segments, running_of(rest), ffw_inputs)
    layer = {name.removeprefix("blocks.1.ffw."): value for name, value in params.items() if "blocks.1.ffw." in name}
    options = {"num_heads": 2, "top_k": 4, "running": running_of(rest)}
    indices, gates = reference.route(layer, ffw_inputs[1], segments > 0, **options)
    real = (segments > 0).reshape(-1)
    np.testing.assert_array_equal(np.asarray(routings[1].indices).reshape(indices.shape)[real], indices[real])
    assert relative_error(np.asarray(routings[1].gates).reshape(gates.shape)[real], gates[real]) < FP32


# What a token may see


def changed_by_the_future(kind, rng):
    """For t = 1 ... S-1: by how much logits before t, and at t, move when the tokens from t on are others."""
    tokens = np.tile(rng.integers(V, size=S).astype(np.int32), (S, 1))
    for t in range(1, S):
        tokens[t, t:] = (tokens[t, t:] + rng.integers(1, V, size=S - t)) % V
    logits, _ = evaluate(kind, tokens, np.ones_like(tokens))
    size = np.abs(logits).max()
    before = [np.abs(logits[t, :t] - logits[0, :t]).max() / size for t in range(1, S)]
    at = [np.abs(logits[t, t] - logits[0, t]).max() / size for t in range(1, S)]
    return before, at


@pytest.mark.parametrize("kind", CAUSAL)
def test_no_token_sees_the_future(rng, kind):
    before, at = changed_by_the_future(kind, rng)
    assert compiled(kind)[0].is_causal
    assert max(before) < UNCHANGED
    assert min(at) > 1e-2


def test_expert_choice_sees_the_future_and_says_so(rng):
    before, _ = changed_by_the_future("expert choice", rng)
    assert not compiled("expert choice")[0].is_causal
    assert max(before) > 1e-2


def test_flags_are_those_of_any_block():
    assert {kind for kind in KINDS if compiled(kind)[0].mixes_tokens} == {"expert choice", "token choice"}
    # Placed nowhere, the layer says nothing.
    assert build("expert choice", sparse_blocks=()).is_causal


@pytest.mark.parametrize("kind", ["dense", "dropless", "pkm", "peer"])
def test_packed_documents_equal_documents_alone(rng, kind):
    tokens = rng.integers(V, size=(1, 8)).astype(np.int32)
    packed, _ = evaluate(kind, tokens, np.array([[4, 4, 4, 2, 2, 9, 9, 9]], np.int32))
    for start, stop in [(0, 3), (3, 5), (5, 8)]:
        alone, _ = evaluate(kind, tokens[:, start:stop], np.ones((1, stop - start), np.int32))
        assert relative_error(packed[:, start:stop], alone) < UNCHANGED


def test_without_segment_ids_a_row_is_one_document(rng):
    _, params, rest, run = compiled("dense")
    tokens = rng.integers(V, size=(S, S)).astype(np.int32)
    logits, _, _ = run(params, rest, tokens, None)
    assert relative_error(logits, evaluate("dense", tokens, np.ones_like(tokens))[0]) < UNCHANGED


@pytest.mark.parametrize("kind", KINDS)
def test_padding_s_contents_touch_nothing(rng, kind):
    """Neither logits of real tokens, nor losses, gradients or statistics."""
    _, params, rest, gradient = compiled(kind, training=True)
    tokens, segments = packed(rng)
    real = segments > 0
    weights = np.where(real[..., None], rng.normal(size=(B, S, V)), 0).astype(np.float32)
    other = np.where(real, tokens, (tokens + 3) % V).astype(np.int32)
    grads, (first, *rest_of_first) = gradient(params, rest, tokens, segments, weights)
    other_grads, (second, *rest_of_second) = gradient(params, rest, other, segments, weights)
    assert relative_error(np.asarray(second)[real], np.asarray(first)[real]) < UNCHANGED
    pairs = zip(jax.tree.leaves((grads, rest_of_first)), jax.tree.leaves((other_grads, rest_of_second)), strict=True)
    assert all(relative_error(new, old) < UNCHANGED for old, new in pairs)


@pytest.mark.parametrize("kind", ["expert choice", "dropless", "peer"])
def test_remat_changes_nothing(rng, kind):
    """The recomputed block is the same one: its loss, gradients and batch-norm statistics, updated once."""
    tokens, segments = packed(rng)
    weights = np.where((segments > 0)[..., None], rng.normal(size=(B, S, V)), 0).astype(np.float32)
    results = []
    for remat in ({}, {"remat": True}):
        _, params, rest, gradient = compiled(kind, training=True, **remat)
        results.append(gradient(params, rest, tokens, segments, weights))
    for old, new in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        assert relative_error(new, old) < UNCHANGED


def calls(jaxpr, names):
    """How often a program and those within it call the primitives of these names."""
    inner = (getattr(leaf, "jaxpr", leaf) for equation in jaxpr.eqns for leaf in jax.tree.leaves(equation.params))
    found = sum(equation.primitive.name in names for equation in jaxpr.eqns)
    return found + sum(calls(leaf, names) for leaf in inner if hasattr(leaf, "eqns"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_remat_repeats_no_routing(rng, kind):
    """Sorts, top-k and places in queues are those of a step without remat; but other products are repeated."""
    tokens, segments = packed(rng)
    weights = np.ones((B, S, V), np.float32)
    counts = []
    for remat in ({}, {"remat": True}):
        _, params, rest, gradient = compiled(kind, training=True, **remat)
        program = gradient.trace(params, rest, tokens, segments, weights).jaxpr.jaxpr
        counts.append([calls(program, names) for names in (("top_k", "sort", "cumsum"), ("dot_general",))])
    (routing, products), (routing_again, products_again) = counts
    assert routing == routing_again > 0
    assert products_again > products


def test_remat_draws_router_noise_once(rng):
    """Noise that the backward pass drew anew would give the gradient of another function."""
    layer = functools.partial(MoE, num_experts=3, d_ff=5, router_noise=9.0)
    tokens = jnp.asarray(rng.integers(V, size=(B, S)), jnp.int32)

    def run(remat):
        def split():
            return nnx.split(Transformer(V, D, 1, HEADS, ffw=layer, remat=remat, rngs=nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, rest):
            return jnp.sum(jnp.sin(nnx.merge(split()[0], params, rest, copy=True)(tokens)[0]))

        @jax.jit
        def at_the_start():
            return jax.value_and_grad(loss)(*split()[1:])

        return at_the_start()

    for old, new in zip(jax.tree.leaves(run(False)), jax.tree.leaves(run(True)), strict=True):
        assert relative_error(new, old) < UNCHANGED


# Types


@pytest.mark.parametrize("kind", ["token choice", "peer"])
def test_bfloat16_computes_on_float32_parameters(rng, kind):
    tokens, segments = packed(rng)
    real = segments > 0
    weights = np.where(real[..., None], np.ones((B, S, V)), 0).astype(np.float32)
    # Flax's norms promote bfloat16 to float32 themselves.
    with jax.numpy_dtype_promotion("standard"):
        _, params, rest, gradient = compiled(kind, training=True, dtype=jnp.bfloat16)
        grads, (logits, loss, _) = gradient(params, rest, tokens, segments, weights)
    assert {p.dtype for p in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}
    assert logits.dtype == loss.dtype == jnp.float32
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    _, params, rest, gradient = compiled(kind, training=True)
    expected = np.asarray(gradient(params, rest, tokens, segments, weights)[1][0])[real]
    # Tokens that choose the same experts are off by some ten roundings of 2^-9, and that is most of them.
    error = np.abs(np.asarray(logits)[real] - expected).max(-1) / np.abs(expected).max()
    assert 1e-5 < np.median(error) < 10 * 2**-9


# Sizes and places


def test_sparse_block_indices():
    assert [sparse_block_indices("middle", n) for n in (1, 2, 3, 4, 12)] == [(0,), (1,), (1,), (2,), (6,)]
    assert sparse_block_indices("all", 3) == (0, 1, 2)
    assert sparse_block_indices("every 1", 3) == (0, 1, 2)
    assert sparse_block_indices("every 2", 5) == (1, 3)
    assert sparse_block_indices("every 4", 4) == (3,)
    assert sparse_block_indices([2, 0], 3) == (2, 0)
    assert sparse_block_indices([], 3) == ()


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ("sometimes", "'sometimes'"),
        ("every", "'every'"),
        ("every two", "'every two'"),
        ("every 0", "'every 0'"),
        ("every 5", "num_blocks=4"),
        ("every -1", "'every -1'"),
        ("every \N{SUPERSCRIPT TWO}", "every"),
        ([0, 4], "block 4.*0 to 3"),
        ([-1], "block -1"),
    ],
)
def test_blocks_that_do_not_exist(blocks, named):
    with pytest.raises(InputError, match=named):
        sparse_block_indices(blocks, 4)


@pytest.mark.parametrize(
    ("blocks", "sparse"), [("middle", {2}), ("all", {0, 1, 2, 3}), ("every 2", {1, 3}), ([0, 3], {0, 3})]
)
def test_the_named_blocks_carry_the_sparse_layer(blocks, sparse):
    options = {"ffw": Dense, "sparse_ffw": functools.partial(PKM, **RETRIEVAL), "sparse_blocks": blocks}
    model = nnx.eval_shape(lambda: Transformer(V, D, 4, HEADS, **options, rngs=nnx.Rngs(0)))
    assert {index for index, block in enumerate(model.blocks) if isinstance(block.ffw, PKM)} == sparse
    assert all(isinstance(block.ffw, (PKM, Dense)) for block in model.blocks)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((0, 8, 1, 2), "vocab_size=0"),
        ((11, -8, 1, 2), "d_model=-8"),
        ((11, 8, 0, 2), "num_blocks=0"),
        ((11, 8, 1, 0), "num_heads=0"),
        ((11, 10, 1, 4), "d_model=10.*num_heads=4.*multiple of 8"),
        ((11, 6, 1, 2), "d_model=6.*num_heads=2.*multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, named):
    with pytest.raises(InputError, match=named):
        Transformer(*sizes, ffw=Dense, rngs=nnx.Rngs(0))
