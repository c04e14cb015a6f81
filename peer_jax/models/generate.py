"""Sampling from a transformer, with a key-value cache or by full recomputation.

b  batch     p  prompt     s  prompt and new tokens     V  vocabulary
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from peer_jax import memory
from peer_jax.errors import InputError
from peer_jax.models.model import Model
from peer_jax.models.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    key: Array | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continues each prompt by up to ``max_new_tokens`` tokens; prompts may differ in length.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, at least one per prompt (the id that begins a document, if nothing else).
        max_new_tokens: length at which a continuation ends, unless ``eos_id`` ends it earlier.
        temperature: temperature of the softmax; 0 is greedy.
        top_p: sample among the most probable tokens whose probabilities add up to this (nucleus sampling).
        eos_id: token that ends a continuation and is not part of it.
        key: random key for sampling, required if temperature > 0.
        use_cache: whether to use a key-value cache. Without it the whole sequence is computed again for every token,
            which gives the same tokens.

    Returns:
        The new tokens of each prompt.

    Raises:
        InputError: if a value is out of range, or ``use_cache`` is True and a layer mixes tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
        raise InputError("prompts must hold at least one token each")
    if bad := [token for prompt in prompts for token in prompt if not 0 <= token < model.vocab_size]:
        raise InputError(f"prompts hold the token {bad[0]}, but ids run from 0 to {model.vocab_size - 1}")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError(
            f"temperature={temperature} must be finite and at least 0, top_p={top_p} above 0 and at most 1"
        )
    if temperature > 0 and key is None:
        raise InputError(f"temperature={temperature} samples, which needs a key")
    if use_cache and model.mixes_tokens:
        raise InputError("a layer of this model mixes tokens, so a cache can't be used: pass use_cache=False")

    size = max(lengths) + max_new_tokens
    _check_memory(model, len(prompts), size, min(lengths) if use_cache else size, use_cache=use_cache)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    key = jax.random.key(0) if key is None else key
    how = (jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32))
    split = nnx.split(model)
    if use_cache:
        out = _with_cache(*split, tokens, np.array(lengths), key, *how, prefill=min(lengths))
    else:
        out = _by_recomputation(*split, tokens, np.array(lengths), key, *how)
    new = [list(row[n : n + max_new_tokens]) for row, n in zip(np.asarray(out).tolist(), lengths, strict=True)]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in new]


def lower(model: Model, size: int, prefill: int) -> jax.stages.Lowered:
    """The program by which ``generate`` continues one prompt of ``prefill`` tokens to ``size``, of a model without
    values; with a cache, if the model can have one.

    Raises:
        InputError: if the model is of no text.
    """
    if not isinstance(model, Transformer):
        raise InputError(f"a {type(model).__name__} generates no text: leave the program of generation out")
    arguments = np.zeros((1, size), np.int32), np.array([prefill]), jax.eval_shape(lambda: jax.random.key(0))
    how = np.float32(0), np.float32(1)
    if model.mixes_tokens:
        return _by_recomputation.lower(*nnx.split(model), *arguments, *how)
    return _with_cache.lower(*nnx.split(model), *arguments, *how, prefill=prefill)


def _check_memory(model: Transformer, rows: int, size: int, at_once: int, *, use_cache: bool) -> None:
    """An InputError if no device can hold the cache, and the attention scores of the longest pass over tokens."""
    element = jnp.dtype(model.dtype).itemsize
    cache = 2 * len(model.blocks) * size * model.d_model if use_cache else 0
    scores = model.num_heads * at_once * size
    memory.check(
        element * rows * (cache + scores),
        f"generating up to {size} tokens, {at_once} of them at once,",
        "give a shorter prompt or fewer new tokens",
        "max_new_tokens" if size > 2 * at_once else "prompt",
    )


def sample(
    logits: Float[Array, "b V"], key: Array, temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float
) -> Int[Array, " b"]:
    """A token per row: the most probable one if temperature is 0, else one of the smallest set that holds ``top_p``."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, order, axis=-1) / jnp.maximum(temperature, 1e-6)
    probability = jax.nn.softmax(scaled)
    before = jnp.cumsum(probability, axis=-1) - probability
    drawn = jax.random.categorical(key, jnp.where(before < top_p, scaled, -jnp.inf))
    rank = jnp.where(temperature > 0, drawn, 0)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def _place(tokens: Array, lengths: Array, index: Array, logits: Array, key: Array, *how: Array) -> Array:
    """Writes the token after position ``index`` in the rows whose prompt ends before it."""
    new = sample(logits, jax.random.fold_in(key, index), *how)
    given = index + 1 < lengths
    return tokens.at[:, index + 1].set(jnp.where(given, tokens[:, index + 1], new))


@functools.partial(jax.jit, static_argnums=0, static_argnames="prefill")
def _with_cache(graph, state, tokens, lengths, key, temperature, top_p, *, prefill):
    model = nnx.merge(graph, state)
    b, size = tokens.shape
    logits, cache = model.decode(tokens[:, :prefill], model.init_cache(b, size))
    tokens = _place(tokens, lengths, jnp.asarray(prefill - 1), logits[:, -1], key, temperature, top_p)

    def step(carry, index):
        tokens, cache = carry
        current = jax.lax.dynamic_slice_in_dim(tokens, index, 1, axis=1)
        logits, cache = model.decode(current, cache)
        return (_place(tokens, lengths, index, logits[:, 0], key, temperature, top_p), cache), None

    (tokens, _), _ = jax.lax.scan(step, (tokens, cache), jnp.arange(prefill, size - 1))
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def _by_recomputation(graph, state, tokens, lengths, key, temperature, top_p):
    size = tokens.shape[1]

    def step(tokens, index):
        seen = jnp.broadcast_to(jnp.arange(size) <= index, tokens.shape).astype(jnp.int32)
        logits, _ = nnx.merge(graph, state, copy=True)(tokens, seen)
        return _place(tokens, lengths, index, logits[:, index], key, temperature, top_p), None

    tokens, _ = jax.lax.scan(step, tokens, jnp.arange(size - 1))
    return tokens
