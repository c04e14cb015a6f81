"""Splash attention, simulated on CPU, against a softmax written out in float64; and which programs get it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Device

from peer_jax.layers import Dense
from peer_jax.models import Transformer, splash
from peer_jax.sharding import compiled_for
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

B, S, H, C = 2, 256, 2, 32


def by_hand(query, key, value, segments, causal):
    """[b, s, h, c] in the type of the inputs; each token sees those of its segment, and only earlier ones if causal."""
    scores = jnp.einsum("bshc,bShc->bhsS", query, key) / np.sqrt(C)
    seen = np.tril(np.ones((S, S), bool), k=0 if causal else S)[None] & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhsS,bShc->bshc", weights, value)


@pytest.mark.parametrize(("packed", "causal"), [(True, True), (False, True), (True, False), (False, False)])
def test_outputs_and_gradients(rng, packed, causal):
    """The softmax of at most 256 scores and sums of 256 values in float32: errors of some 256 roundings of 2^-24."""
    arrays = [rng.normal(size=(B, S, H, C)) for _ in range(4)]
    # Documents that begin within a block of 128 keys and at its border, and padding at the end.
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [100, 28, 100, 28], axis=1) if packed else np.ones((B, S), int)

    def run(attend, dtype):
        *inputs, dy = (jnp.asarray(a, dtype) for a in arrays)
        y, pullback = jax.vjp(attend, *inputs)
        return [np.asarray(a) for a in (y, *pullback(dy))]

    ids = jnp.asarray(segments, jnp.int32) if packed else None
    found = run(functools.partial(splash.attend, segment_ids=ids, causal=causal, interpret=True), jnp.float32)
    with jax.enable_x64(True):
        wanted = run(functools.partial(by_hand, segments=segments, causal=causal), jnp.float64)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=256 * 2**-24 * np.abs(b).max())


def lowered(platform, implementation=None, seq_len=S):
    build = functools.partial(
        Transformer, 64, H * C, 1, H, ffw=Dense, attention_implementation=implementation, dtype=jnp.bfloat16
    )
    trainer = Trainer(build, AdamW(learning_rate=1e-3))
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), jax.ShapeDtypeStruct((B, seq_len), jnp.int32))
    state, rates = trainer.abstract_state(), jax.tree.map(jnp.asarray, trainer.optimizer.rates(trainer.labels, 0, 10))
    with compiled_for(Device(platform)), jax.numpy_dtype_promotion("standard"):
        step = jax.jit(trainer.step).trace(state, batch, rates)
        return step.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("implementation", "seq_len", "takes_it"), [(None, S, True), ("xla", S, False), (None, S - 1, False)]
)
def test_none_is_splash_on_tpus(implementation, seq_len, takes_it):
    """Forward and backward are kernels, and no [b, h, s, s] array is in the program."""
    text = lowered("tpu", implementation, seq_len)
    assert ("splash" in text) == takes_it
    assert (f"{B}x{H}x{seq_len}x{seq_len}x" in text) != takes_it
