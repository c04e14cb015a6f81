"""The training step: accumulation, donation, padding, rates; and loss falls for every layer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

V, D, B, S = 13, 8, 8, 6
RETRIEVAL = {"num_experts": 16, "num_heads": 2, "d_key": 4, "top_k": 4}
LAYERS = {
    "dense": functools.partial(Dense, d_ff=12),
    "moe": functools.partial(
        MoE, num_experts=3, d_ff=6, routing="token_choice", balance_loss_weight=0.5, z_loss_weight=0.1
    ),
    "pkm": functools.partial(PKM, **RETRIEVAL),
    "peer": functools.partial(PEER, **RETRIEVAL),
    "pkm, layer norm": functools.partial(PKM, **RETRIEVAL, query_norm="layer"),
    "peer, layer norm": functools.partial(PEER, **RETRIEVAL, query_norm="layer"),
}
# A large eps makes Adam's update a smooth function of the gradient: with the usual one the sign of a gradient that is
# rounding alone decides. Then parameters move by some tenths in three steps, and another order of the sums over 40
# tokens, a dozen roundings of 6e-8, is all that may differ.
SMOOTH = AdamW(learning_rate=0.3, table_learning_rate=0.5, warmup_steps=1, eps=0.1, clip_norm=0.5, table_clip_norm=0.05)
EQUAL = 5e-6


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax's bias correction raises a float to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def trainer(name, accumulation=1):
    def build(*, rngs):
        layers = [LAYERS[part] for part in name.split(" and ")]
        options = {"ffw": layers[0], "sparse_ffw": layers[-1], "embed_init": nnx.initializers.normal(1.0)}
        return Transformer(V, D, len(layers), 2, **options, rngs=rngs)

    made = Trainer(build, SMOOTH, accumulation=accumulation)
    donating = jax.jit(made.step, donate_argnums=0)

    def step(state, batch, rates):
        return donating(jax.tree.map(jnp.copy, state), batch, rates)

    step.donating = donating
    return made, step


@functools.cache
def initial(name):
    return trainer(name)[0].init(0)


def ragged(seed=0):
    """Rows with 6, 1, 4, 2, ... real tokens and one with two documents, so parts of the batch hold unlike numbers."""
    rng = np.random.default_rng(seed)
    lengths = np.array([6, 1, 4, 2, 6, 5, 3, 1])
    segment_ids = (np.arange(S) < lengths[:, None]).astype(np.int32)
    segment_ids[4, 3:] = 2
    inputs, targets = rng.integers(V, size=(2, B, S)).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids}


def rates_of(made, step=0, steps=10):
    return made.optimizer.rates(made.labels, step, steps)


def run(name, steps=3, accumulation=1):
    """The state and metrics after some steps from seed 0, and the state before."""
    made, step = trainer(name, accumulation)
    state = before = initial(name)
    metrics = []
    for index in range(steps):
        state, measured = step(state, ragged(index), rates_of(made, index))
        metrics.append(measured)
    return state, metrics, before


def differences(actual, expected):
    """The largest deviation of parameters, statistics, optimiser state and metrics, each leaf relative to its size."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(relative_error(a, e) for a, e in pairs)


def assert_moved(before, after):
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert np.max(np.abs(np.asarray(new) - np.asarray(old))) > 1e-3


# The loss


def test_the_step_s_loss_is_the_mean_over_real_tokens():
    """In float64 from the logits; it does not depend on the padding. Norms are of parameters and of their change."""
    made, step = trainer("dense")
    batch, state = ragged(), initial("dense")
    after, metrics = step(state, batch, rates_of(made))
    logits, _ = jax.jit(lambda state, batch: made.model(state)(batch["inputs"], batch["segment_ids"]))(state, batch)
    logits, padding = np.asarray(logits, np.float64), batch["segment_ids"] == 0
    likelihood = np.take_along_axis(np.exp(logits), batch["targets"][..., None], -1)[..., 0] / np.exp(logits).sum(-1)
    assert np.sum(~padding) == 28
    assert relative_error(metrics["loss"], -np.mean(np.log(likelihood[~padding]))) < 1e-6
    other = {name: np.where(padding, (ids + 5) % V, ids).astype(np.int32) for name, ids in batch.items()}
    other["segment_ids"] = batch["segment_ids"]
    assert differences(step(state, other, rates_of(made)), (after, metrics)) < EQUAL

    def norm(leaves):
        return math.sqrt(sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in leaves))

    old, new = jax.tree.leaves(state.params), jax.tree.leaves(after.params)
    assert relative_error(metrics["param_norm"], norm(new)) < 1e-5
    moved = [np.asarray(n, np.float64) - np.asarray(o, np.float64) for n, o in zip(new, old, strict=True)]
    assert relative_error(metrics["update_norm"], norm(moved)) < 1e-5
    assert int(after.step) == 1


# Accumulation


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [("dense", 8), ("moe", 4), ("pkm, layer norm", 2), ("peer, layer norm", 4)],
)
def test_accumulated_gradients_equal_the_large_batch(name, accumulation):
    state, metrics, before = run(name)
    accumulated, accumulated_metrics, _ = run(name, accumulation=accumulation)
    assert_moved(before, state)
    assert differences(accumulated, state) < EQUAL
    for ours, whole in zip(accumulated_metrics, metrics, strict=True):
        assert ours.keys() == whole.keys()
        for metric in ("loss", "aux_loss", "grad_norm", "update_norm", "param_norm"):
            assert relative_error(ours[metric], whole[metric]) < EQUAL, metric


def test_gradients_of_bfloat16_parameters_add_up_in_float32(monkeypatch):
    """The optimiser is given float32 sums, and leaves types as they are."""

    def build(*, rngs):
        return Transformer(V, D, 1, 2, ffw=LAYERS["dense"], param_dtype=jnp.bfloat16, rngs=rngs)

    given, update = [], AdamW.update
    monkeypatch.setattr(
        AdamW,
        "update",
        lambda self, labels, params, grads, *rest: given.append(grads) or update(self, labels, params, grads, *rest),
    )
    made = Trainer(build, SMOOTH, accumulation=8)
    state = made.abstract_state()
    after, _ = jax.eval_shape(made.step, state, jax.tree.map(jnp.asarray, ragged()), rates_of(made))
    assert {g.dtype.name for g in jax.tree.leaves(given)} == {"float32"}
    assert [a.dtype for a in jax.tree.leaves(after)] == [a.dtype for a in jax.tree.leaves(state)]
    assert {p.dtype.name for p in jax.tree.leaves(after.params)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_accumulation_with_batch_norm_is_refused_with_the_reason(name):
    with pytest.raises(InputError, match=r"accumulation=2.*batch-norm.*whole batch.*query_norm"):
        trainer(name, accumulation=2)


def test_a_micro_batch_of_padding_only_adds_nothing():
    """It changes neither the update nor, as NaN, the logged metrics."""
    made, step = trainer("peer, layer norm")
    batch = ragged()
    batch["segment_ids"][:2] = 0
    state = initial("peer, layer norm")
    expected, _ = step(state, batch, rates_of(made))
    accumulating, micro_step = trainer("peer, layer norm", accumulation=4)
    actual, metrics = micro_step(state, batch, rates_of(accumulating))
    assert differences(actual, expected) < EQUAL
    assert {name for name, value in metrics.items() if not np.isfinite(value)} == set()


# One compiled step


def test_the_state_is_donated_and_rates_do_not_recompile():
    made, step = trainer("dense")
    state = jax.tree.map(jnp.copy, initial("dense"))
    for index in range(3):
        before = jax.tree.leaves(state)
        pointers = {leaf.unsafe_buffer_pointer() for leaf in before}
        state, _ = step.donating(state, ragged(index), rates_of(made, index, steps=7))
        assert all(leaf.is_deleted() for leaf in before)
        # Not only gone: the new state lies where the old one lay.
        reused = sum(leaf.unsafe_buffer_pointer() in pointers for leaf in jax.tree.leaves(state))
        assert reused > 0.9 * len(before)
    assert step.donating._cache_size() == 1
    assert int(state.step) == 3


def test_rates_set_the_size_of_an_update():
    """A group with rate zero does not change; the updates of the others are in proportion to their rates."""
    _, step = trainer("peer, layer norm")
    state = initial("peer, layer norm")

    def moved(**rates):
        after, _ = step(state, ragged(), {label: rates.get(label, 0.0) for label in ("backbone", "down", "up")})
        flat = nnx.to_flat_state(jax.tree.map(lambda new, old: new - old, after.params, state.params))
        return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}

    tables = {"blocks.0.ffw.down", "blocks.0.ffw.up"}
    once, twice = moved(up=0.25), moved(up=0.5, backbone=0.1)
    assert {name for name, change in once.items() if np.any(change)} == {"blocks.0.ffw.up"}
    assert {name for name, change in twice.items() if np.any(change)} == set(twice) - {"blocks.0.ffw.down"}
    assert relative_error(twice["blocks.0.ffw.up"], 2 * once["blocks.0.ffw.up"]) < 1e-5
    assert tables < once.keys()


@pytest.mark.parametrize("name", ["dense", "moe", "pkm, layer norm", "peer"])
def test_loss_falls_on_a_repeated_batch(name):
    """The loss falls from that of a guess, or worse, to less than half in 30 steps."""
    made, step = trainer(name)
    state, batch, losses = initial(name), ragged(), []
    for _ in range(30):
        state, metrics = step(state, batch, dict.fromkeys(rates_of(made), 0.1))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.8 * math.log(V)
    assert losses[-1] < 0.5 * losses[0]
    assert np.isfinite(losses).all()
