"""Generation: cache, recomputation and a plain loop give the same tokens; sampling follows the probabilities."""

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
DENSE = functools.partial(Dense, d_ff=12)
DROPLESS = functools.partial(
    MoE, num_experts=3, d_ff=5, routing="token_choice", top_k=2, capacity_factor=None, activation="swiglu"
)
# The feed-forward layers of a model's blocks.
MODELS = {
    "every layer that can use a cache": (
        functools.partial(PKM, **RETRIEVAL),
        DENSE,
        functools.partial(PEER, **RETRIEVAL),
        DROPLESS,
    ),
    "dense": (DENSE,),
    "token choice": (functools.partial(MoE, num_experts=3, d_ff=5, routing="token_choice"),),
    "both choices": (
        functools.partial(MoE, num_experts=3, d_ff=5),
        functools.partial(MoE, num_experts=3, d_ff=5, routing="token_choice"),
    ),
}
EVERY = "every layer that can use a cache"
RAGGED = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3, 5, 8, 9]]


@functools.cache
def build(name):
    """Weights and statistics all random, so that logits depend on the whole context and tokens vary."""
    layers = iter(MODELS[name])

    def ffw(*args, **kwargs):
        return next(layers)(*args, **kwargs)

    model = nnx.eval_shape(lambda: Transformer(V, D, len(MODELS[name]), HEADS, ffw=ffw, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)

    def draw(variable):
        if isinstance(variable, nnx.BatchStat):
            return variable.replace(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), variable.dtype))
        return variable.replace(jnp.asarray(rng.normal(size=variable.shape), variable.dtype))

    nnx.update(model, jax.tree.map(draw, nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable)))
    model.eval()
    return model


@functools.cache
def logits_of(name):
    graph, state = nnx.split(build(name))
    return jax.jit(lambda tokens, segment_ids=None: nnx.merge(graph, state)(tokens, segment_ids)[0])


def greedy_loop(name, prompt, new):
    """Calls the model on the text so far, appends the most probable token, and again."""
    text = list(prompt)
    for _ in range(new):
        row = np.zeros((1, 16), np.int32)  # causal: what follows the text is not seen
        row[0, : len(text)] = text
        text.append(int(np.argmax(logits_of(name)(row)[0, len(text) - 1])))
    return text[len(prompt) :]


HOW = {
    "greedy": {},
    "temperature": {"temperature": 1.5},
    "top_p": {"temperature": 2.0, "top_p": 0.8},
}


@pytest.mark.parametrize("how", HOW)
def test_cached_tokens_equal_recomputed_ones(how):
    model = build(EVERY)
    assert not model.mixes_tokens
    options = {**HOW[how], "key": jax.random.key(11)}
    cached = generate(model, RAGGED, NEW, **options)
    assert cached == generate(model, RAGGED, NEW, use_cache=False, **options)
    assert [len(row) for row in cached] == [NEW] * len(RAGGED)
    assert len({token for row in cached for token in row}) > 4
    if how == "greedy":
        assert cached == [greedy_loop(EVERY, prompt, NEW) for prompt in RAGGED]


@pytest.mark.parametrize(
    ("prompts", "new"),
    [([[3]], 6), ([[2], [4, 4, 1, 7]], 5), ([[5, 1, 2], [6, 1, 3]], 1)],
)
def test_prompts_of_any_length(prompts, new):
    assert generate(build("dense"), prompts, new) == [greedy_loop("dense", prompt, new) for prompt in prompts]


def test_layers_that_mix_tokens_refuse_the_cache():
    for name in ("token choice", "both choices"):
        with pytest.raises(InputError, match="use_cache=False"):
            generate(build(name), RAGGED, 2)
    model = build("both choices")
    new = generate(model, RAGGED, 2, use_cache=False)
    # The plain loop, over rows of the same size, for the experts' capacity depends on it.
    tokens = np.zeros((3, 8), np.int32)
    for row, prompt in zip(tokens, RAGGED, strict=True):
        row[: len(prompt)] = prompt
    for index in range(2, 7):
        seen = np.tile((np.arange(8) <= index).astype(np.int32), (3, 1))
        chosen = np.argmax(logits_of("both choices")(tokens, seen)[:, index], -1)
        for row, prompt, token in zip(tokens, RAGGED, chosen, strict=True):
            if index + 1 >= len(prompt):
                row[index + 1] = token
    assert new == [row[len(prompt) : len(prompt) + 2].tolist() for row, prompt in zip(tokens, RAGGED, strict=True)]


def test_eos_ends_a_continuation_and_is_not_part_of_it():
    """Whichever token it is: a new one, one that only the prompts have, or one that never comes."""
    whole = generate(build(EVERY), RAGGED, NEW)
    lengths = set()
    for eos_id in range(V):
        expected = [row[: row.index(eos_id)] if eos_id in row else row for row in whole]
        assert generate(build(EVERY), RAGGED, NEW, eos_id=eos_id) == expected
        lengths |= {len(row) for row in expected}
    assert {0, NEW} < lengths
    assert generate(build(EVERY), RAGGED, NEW, eos_id=whole[0][0], use_cache=False)[0] == []


def test_a_tiny_nucleus_or_temperature_is_greedy():
    model = build(EVERY)
    greedy = generate(model, RAGGED, NEW)
    assert generate(model, RAGGED, NEW, temperature=2.0, top_p=1e-6, key=jax.random.key(1)) == greedy
    assert generate(model, RAGGED, NEW, temperature=1e-4, key=jax.random.key(1)) == greedy


def test_the_key_decides():
    draws = [generate(build(EVERY), RAGGED, NEW, temperature=2.0, key=jax.random.key(seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[2] != draws[0] != draws[3] != draws[2]


# What is drawn

DRAWS = 20_000
draw = jax.jit(sample)
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
    tokens = draw(jnp.tile(logits, (DRAWS, 1)), jax.random.key(0), temperature, top_p)
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
    tokens = np.asarray(draw(many, jax.random.key(3), 1.0, 1.0)).reshape(-1, 2)
    assert_frequencies(tokens[:, 0], PROBABILITY)
    assert_frequencies(tokens[:, 1], PROBABILITY[::-1])
    # Independent: a pair's probability is the product.
    assert_frequencies(tokens[:, 0] * 6 + tokens[:, 1], np.outer(PROBABILITY, PROBABILITY[::-1]).reshape(-1))
    np.testing.assert_array_equal(draw(logits, jax.random.key(3), 0.0, 1.0), [1, 4])
    np.testing.assert_array_equal(draw(jnp.zeros((1, 4)), jax.random.key(3), 0.0, 1.0), [0])


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
