"""linear_cross_entropy against float64, in one chunk and in several; and that no program holds all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import Dense
from peer_jax.models import Transformer
from peer_jax.ops import checked, cross_entropy
from peer_jax.ops.cross_entropy import linear_cross_entropy
from peer_jax.training.evaluate import _evaluate_batch
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

T, D, V = 13, 5, 11
FP32 = 2e-6  # sums of 13 and 11 numbers, some ten roundings of 6e-8
BF16 = 2**-7  # operands of the backward products are rounded to 2^-9


def case(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    x, kernel = scale * rng.normal(size=(T, D)), rng.normal(size=(D, V))
    floats = (jnp.asarray(a, jnp.float32) for a in (x, kernel, rng.choice([0.0, 1.0, 2.5], T)))
    x, kernel, weights = floats
    return x, kernel, jnp.asarray(rng.integers(V, size=T), jnp.int32), weights


def in_float64(x, kernel, targets, weights):
    """The loss and its gradients with respect to x, kernel and weights, token by token."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    total, dx, d_kernel, losses = 0.0, np.zeros_like(x), np.zeros_like(kernel), np.zeros(T)
    for t in range(T):
        logits = x[t] @ kernel
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses[t] = logits.max() + math.log(np.exp(logits - logits.max()).sum()) - logits[targets[t]]
        p[targets[t]] -= 1
        total += weights[t] * losses[t]
        dx[t] = weights[t] * (kernel @ p)
        d_kernel += weights[t] * np.outer(x[t], p)
    return total, dx, d_kernel, losses


def chunks_of(tokens, vocabulary, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_BUDGET", 4 * tokens * vocabulary)


@pytest.mark.parametrize("tokens", [T, 5, 1])
def test_loss_and_gradients_are_those_of_float64(tokens, monkeypatch):
    """In one chunk, in three, of which the last is padded, and in one for each token; times a cotangent of 0.5."""
    chunks_of(tokens, V, monkeypatch)
    x, kernel, targets, weights = case()
    assert -(-T // cross_entropy.tokens_at_once(T, V)) == {T: 1, 5: 3, 1: T}[tokens]
    gradient = jax.value_and_grad(lambda *a: 0.5 * linear_cross_entropy(*a), argnums=(0, 1, 3))
    expected = in_float64(x, kernel, targets, weights)
    loss, found = jax.jit(gradient)(x, kernel, targets, weights)
    for ours, theirs in zip((loss, *found), expected, strict=True):
        assert relative_error(ours, 0.5 * np.asarray(theirs)) < FP32
    assert relative_error(jax.jit(linear_cross_entropy)(x, kernel, targets, weights), expected[0]) < FP32


def test_large_logits_do_not_overflow():
    x, kernel, targets, weights = case(scale=1e4)
    loss, dx = jax.value_and_grad(linear_cross_entropy)(x, kernel, targets, weights)
    expected = in_float64(x, kernel, targets, weights)
    assert relative_error(loss, expected[0]) < FP32
    assert np.all(np.isfinite(dx))


def test_bfloat16_vectors_have_float32_logits_and_kernel_gradients(monkeypatch):
    chunks_of(5, V, monkeypatch)
    x, kernel, targets, weights = case()
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    loss, (dx, d_kernel) = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(x, kernel, targets, weights)
    expected = in_float64(x, kernel, targets, weights)
    assert (loss.dtype, dx.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert relative_error(loss, expected[0]) < FP32  # bfloat16 logits would be off by 2^-9
    assert relative_error(dx, expected[1]) < BF16
    assert relative_error(d_kernel, expected[2]) < BF16


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_outside_of_the_vocabulary_is_not_clipped(target):
    x, kernel, targets, weights = case()
    targets, weights = targets.at[3].set(target), weights.at[3].set(1.0)
    assert linear_cross_entropy(x, kernel, targets, weights) == math.inf
    with pytest.raises(InputError, match=rf"linear_cross_entropy: indices run from .* rows 0 to {V - 1}"):
        checked(linear_cross_entropy)(x, kernel, targets, weights)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("targets", jnp.zeros(T - 1, jnp.int32), "one entry for each token"),
        ("targets", jnp.zeros(T), "must hold integers"),
        ("kernel", jnp.zeros((D + 1, V)), "a row for each column of x"),
        ("weights", jnp.zeros((T, 1)), "one entry for each token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, value, words, unchecked_types):
    arguments = dict(zip(("x", "kernel", "targets", "weights"), case(), strict=True)) | {name: value}
    with pytest.raises(InputError, match=words):
        linear_cross_entropy(**arguments)


# Whole programs

ROWS, SEQ, PIECES = 8, 256, 32_768


def trainer(vocabulary, accumulation=1, **options):
    def build(*, rngs):
        return Transformer(vocabulary, 8, 1, 2, ffw=functools.partial(Dense, d_ff=8), **options, rngs=rngs)

    return Trainer(build, AdamW(learning_rate=1e-3), accumulation=accumulation)


def batch_of(rows, seq, vocabulary, seed=0):
    inputs, targets = jnp.asarray(np.random.default_rng(seed).integers(vocabulary, size=(2, rows, seq)), jnp.int32)
    return {"inputs": inputs, "targets": targets, "segment_ids": jnp.ones_like(inputs).at[0, seq // 2 :].set(0)}


def largest_array(compiled):
    """The number of elements of the largest array in a compiled program, buffers inside of fusions included."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("tied", [False, True])
def test_no_program_holds_all_logits(tied, monkeypatch):
    """Neither the training step, forward and backward, nor an evaluation. The same measure sees plain logits."""
    chunks_of(ROWS * SEQ // 16, PIECES, monkeypatch)
    made = trainer(PIECES, tie_embeddings=tied, remat=tied)
    state, batch = made.abstract_state(), batch_of(ROWS, SEQ, PIECES)
    with jax.numpy_dtype_promotion("standard"):
        step = made.compiled_step().lower(state, batch, made.optimizer.rates(made.labels, 0, 10)).compile()
    evaluation = _evaluate_batch.lower(*nnx.split(made.abstract_model), batch, {}).compile()
    logits = jax.jit(lambda *state: nnx.merge(made.graph, *state)(batch["inputs"])[0])
    plain = logits.lower(state.params, state.others).compile()
    every = ROWS * SEQ * PIECES
    assert largest_array(plain) == every
    for program in (step, evaluation):
        assert largest_array(program) == every // 16
        assert program.memory_analysis().temp_size_in_bytes < 4 * every // 4


@pytest.mark.slow
def test_chunks_change_a_step_by_rounding_only(monkeypatch):
    """Also with a tied embedding, remat, and accumulation, within whose loop the chunks are another one."""
    batch = batch_of(4, 6, 13)
    steps = []
    for tokens in (12, 5):
        chunks_of(tokens, 13, monkeypatch)
        made = trainer(13, accumulation=2, tie_embeddings=True, remat=True)
        with jax.numpy_dtype_promotion("standard"):
            state, metrics = made.compiled_step()(made.init(0), batch, made.optimizer.rates(made.labels, 0, 10))
        steps.append((state.optimizer.mu, metrics))
    pairs = zip(*map(jax.tree.leaves, steps), strict=True)
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 5e-6
