"""Generation: the cache's tokens are those of recomputation and of a plain loop; sampling draws what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer, generate
from peer_jax.models.generate import sample

V, D, HEADS = 13, 8, 2
NEW = 8
RETRIEVAL = {"num_experts": 16, "num_heads": 2, "d_key": 4, "top_k": 4}
LAYERS = {
    "dense": functools.partial(Dense, d_ff=12),
    "dropless": functools.partial(
        MoE, num_experts=3, d_ff=5, routing="token_choice", top_k=2, capacity_factor=None, activation="swiglu"
    ),
    "pkm": functools.partial(PKM, **RETRIEVAL),
    "peer": functools.partial(PEER, **RETRIEVAL),
    "token choice": functools.partial(MoE, num_experts=3, d_ff=5, routing="token_choice"),
    "expert choice": functools.partial(MoE, num_experts=3, d_ff=5),
}
UNMIXED = ["dense", "dropless", "pkm", "peer"]
MIXING = ["token choice", "expert choice"]
RAGGED = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3, 5, 8, 9]]


@functools.cache
def build(kind):
    """Two blocks whose logits depend on the whole context and are far apart, so that tokens vary and don't tie."""
    model = Transformer(V, D, 2, HEADS, ffw=LAYERS[kind], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params))
    statistics = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), s.dtype), statistics))
    model.eval()
    return model


@functools.cache
def logits_of(kind):
    graph, state = nnx.split(build(kind))
    return jax.jit(lambda tokens, segment_ids=None: nnx.merge(graph, state)(tokens, segment_ids)[0])


def greedy_loop(kind, prompt, new):
    """Calls the model on the text so far, appends the most probable token, and again."""
    text = list(prompt)
    for _ in range(new):
        row = np.zeros((1, 16), np.int32)  # causal: what follows the text is not seen
        row[0, : len(text)] = text
        text.append(int(np.argmax(logits_of(kind)(row)[0, len(text) - 1])))
    return text[len(prompt) :]


HOW = {
    "greedy": {},
    "temperature": {"temperature": 1.5},
    "top_p": {"temperature": 2.0, "top_p": 0.8},
}


@pytest.mark.parametrize("kind", UNMIXED)
@pytest.mark.parametrize("how", HOW)
def test_cached_tokens_equal_recomputed_ones(kind, how):
    model = build(kind)
    options = {**HOW[how], "key": jax.random.key(11)}
    cached = generate(model, RAGGED, NEW, **options)
    assert cached == generate(model, RAGGED, NEW, use_cache=False, **options)
    assert [len(row) for row in cached] == [NEW] * len(RAGGED)
    assert len({token for row in cached for token in row}) > 4
    if how != "greedy":
        assert cached != generate(model, RAGGED, NEW, **HOW[how], key=jax.random.key(12))


@pytest.mark.parametrize("kind", UNMIXED)
def test_greedy_tokens_equal_a_plain_loop(kind):
    assert generate(build(kind), RAGGED, NEW) == [greedy_loop(kind, prompt, NEW) for prompt in RAGGED]


@pytest.mark.parametrize("prompts", [[[3]], [[3], [5]], [[2], [4, 4, 1, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]]])
@pytest.mark.parametrize("new", [1, 6])
def test_prompts_of_any_length(prompts, new):
    expected = [greedy_loop("dense", prompt, new) for prompt in prompts]
    assert generate(build("dense"), prompts, new) == expected


def test_a_model_that_recomputes_without_segment_ids_agrees():
    """The loop once with no padding at all: the model called on exactly the text so far."""
    graph, state = nnx.split(build("peer"))
    text = list(RAGGED[1])
    for _ in range(3):
        logits, _ = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))(np.array([text], np.int32))
        text.append(int(np.argmax(logits[0, -1])))
    assert generate(build("peer"), RAGGED, NEW)[1][:3] == text[6:]


@pytest.mark.parametrize("kind", MIXING)
def test_layers_that_mix_tokens_refuse_the_cache(kind):
    model = build(kind)
    with pytest.raises(InputError, match="use_cache=False"):
        generate(model, RAGGED, 2)
    new = generate(model, RAGGED, 2, use_cache=False)
    # The plain loop, over rows of the same size, for the experts' capacity depends on it.
    tokens = np.zeros((3, 8), np.int32)
    for row, prompt in zip(tokens, RAGGED, strict=True):
        row[: len(prompt)] = prompt
    for index in range(2, 7):
        seen = np.tile((np.arange(8) <= index).astype(np.int32), (3, 1))
        chosen = np.argmax(logits_of(kind)(tokens, seen)[:, index], -1)
        for row, prompt, token in zip(tokens, RAGGED, chosen, strict=True):
            if index + 1 >= len(prompt):
                row[index + 1] = token
    expected = [row[len(prompt) : len(prompt) + 2].tolist() for row, prompt in zip(tokens, RAGGED, strict=True)]
    assert new == expected


def test_eos_ends_a_continuation_and_is_not_part_of_it():
    model = build("dense")
    whole = generate(model, RAGGED, NEW)
    eos_id = whole[0][3]
    expected = [row[: row.index(eos_id)] if eos_id in row else row for row in whole]
    assert len(expected[0]) <= 3
    for use_cache in (True, False):
        assert generate(model, RAGGED, NEW, eos_id=eos_id, use_cache=use_cache) == expected
    absent = next(token for token in range(V) if all(token not in row for row in whole))
    assert generate(model, RAGGED, NEW, eos_id=absent) == whole
    # In a prompt it ends nothing.
    assert generate(model, [[eos_id, 1, 2, 3]], 1) == generate(model, [[eos_id, 1, 2, 3]], 1, eos_id=absent)


def test_a_tiny_nucleus_or_temperature_is_greedy():
    model = build("dense")
    greedy = generate(model, RAGGED, NEW)
    assert generate(model, RAGGED, NEW, temperature=2.0, top_p=1e-6, key=jax.random.key(1)) == greedy
    assert generate(model, RAGGED, NEW, temperature=1e-4, key=jax.random.key(1)) == greedy


def test_the_key_decides():
    draws = [
        generate(build("dense"), RAGGED, NEW, temperature=2.0, key=jax.random.key(seed)) for seed in (0, 0, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[2] != draws[0] != draws[3] != draws[2]


# What is drawn

DRAWS = 20_000
PROBABILITY = np.array([0.05, 0.4, 0.02, 0.3, 0.08, 0.15])


def assert_frequencies(tokens, probability):
    """Each count within 5 standard deviations of the binomial: 1 in 10^6 by chance, and the key is fixed."""
    tokens, n = np.asarray(tokens), np.size(tokens)
    for token, p in enumerate(probability):
        count = np.sum(tokens == token)
        assert abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p)), (token, count / n, p)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_p", "kept"),
    # The smallest set that holds top_p, by temperature 1: 0.4, 0.7, 0.85, 0.93, 0.98, 1.
    [(1.0, 6), (0.9, 4), (0.6, 2), (0.1, 1)],
)
def test_sampling_frequencies(temperature, top_p, kept):
    logits = jnp.asarray(np.log(PROBABILITY) + 7, jnp.float32)  # softmax takes no notice of a constant
    tokens = sample(jnp.tile(logits, (DRAWS, 1)), jax.random.key(0), jnp.asarray(temperature), jnp.asarray(top_p))
    p = PROBABILITY ** (1 / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    nucleus, mass = [], 0.0
    for token in order:
        nucleus.append(token)
        mass += p[token]
        if mass >= top_p:
            break
    if temperature == 1.0:
        assert len(nucleus) == kept
    cut = np.zeros_like(p)
    cut[nucleus] = p[nucleus] / mass
    assert_frequencies(tokens, cut)


def test_rows_are_drawn_apart_and_zero_is_greedy():
    logits = jnp.asarray(np.log(np.stack([PROBABILITY, PROBABILITY[::-1]])), jnp.float32)
    many = jnp.tile(logits, (DRAWS // 2, 1))
    tokens = np.asarray(sample(many, jax.random.key(3), 1.0, 1.0)).reshape(-1, 2)
    assert_frequencies(tokens[:, 0], PROBABILITY)
    assert_frequencies(tokens[:, 1], PROBABILITY[::-1])
    # Independent: a pair's probability is the product.
    assert_frequencies(tokens[:, 0] * 6 + tokens[:, 1], np.outer(PROBABILITY, PROBABILITY[::-1]).reshape(-1))
    np.testing.assert_array_equal(sample(logits, jax.random.key(3), 0.0, 1.0), [1, 4])
    np.testing.assert_array_equal(sample(jnp.zeros((1, 4)), jax.random.key(3), 0.0, 1.0), [0])


def test_generated_tokens_have_the_model_s_probabilities():
    prompt, temperature = [3, 1], 4.0
    new = generate(build("dense"), [prompt] * 4000, 1, temperature=temperature, key=jax.random.key(5))
    logits = np.asarray(logits_of("dense")(np.array([prompt], np.int32))[0, -1], np.float64) / temperature
    p = np.exp(logits - logits.max())
    assert_frequencies(np.array(new)[:, 0], p / p.sum())


@pytest.mark.parametrize(
    ("prompts", "new", "options", "named"),
    [
        ([], 2, {}, "at least one token"),
        ([[1], []], 2, {}, "at least one token"),
        ([[1]], 0, {}, "max_new_tokens=0"),
        ([[1]], 2, {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], 2, {"temperature": 1.0}, "temperature=1.0.*key"),
        ([[1]], 2, {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], 2, {"top_p": 1.5}, "top_p=1.5"),
        ([[1, V]], 2, {}, f"{V}"),
        ([[1], [-1]], 2, {}, "-1"),
    ],
)
def test_values_out_of_range_are_named(prompts, new, options, named):
    with pytest.raises(InputError, match=named):
        generate(build("dense"), prompts, new, **options)
