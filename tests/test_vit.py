"""The vision transformer against NumPy: patches, attention without causality, the whole model and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from peer_jax.errors import InputError
from peer_jax.layers import PEER, Dense, MoE
from peer_jax.models import Transformer, ViT
from peer_jax.models.attention import Attention
from peer_jax.models.vit import patches_of
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

B, H, W, C, P, D, HEADS, CLASSES = 3, 4, 6, 2, 2, 8, 2, 5
S = (H // P) * (W // P)
LAYERS = {
    "dense": Dense,
    "peer": functools.partial(PEER, num_experts=16, num_heads=2, top_k=4, d_key=4),
    "moe": functools.partial(MoE, num_experts=4, d_ff=8),
}


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (B, H, W, C)).astype(np.uint8)


def build(layer="dense", blocks=2, **options):
    return ViT((H, W, C), P, CLASSES, D, blocks, HEADS, ffw=LAYERS[layer], **options, rngs=nnx.Rngs(0))


def by_patch(images):
    """[b, s, p * p * c], by loops."""
    found = np.zeros((len(images), S, P * P * C), images.dtype)
    for b in range(len(images)):
        for s in range(S):
            top, left = P * (s // (W // P)), P * (s % (W // P))
            values = [images[b, top + y, left + x, c] for y in range(P) for x in range(P) for c in range(C)]
            found[b, s] = values
    return found


def test_patches(images):
    np.testing.assert_array_equal(patches_of(jnp.asarray(images), P), by_patch(images))


# Attention


def attention(kernels, x, segment_ids):
    """Attention of every token to all tokens of its segment, without rotation, by loops in float64; x [b, s, d]."""
    b, s, d = x.shape
    width = d // HEADS
    qkv, mixed = x @ kernels["query_key_value.kernel"], np.zeros_like(x)
    for row in range(b):
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            query, key, value = (qkv[row, :, third * d :][:, part] for third in range(3))
            for i in range(s):
                seen = [j for j in range(s) if segment_ids is None or segment_ids[row, j] == segment_ids[row, i]]
                weights = np.exp([query[i] @ key[j] / np.sqrt(width) for j in seen])
                mixed[row, i, part] = weights / weights.sum() @ value[seen]
    return mixed @ kernels["out.kernel"]


@pytest.mark.parametrize("segmented", [True, False])
def test_attention_without_causality(rng, params_of, segmented):
    """Forward in float32 against float64, and the gradient along a direction against a difference quotient."""
    layer = Attention(D, HEADS, causal=False, rope_theta=None, rngs=nnx.Rngs(0))
    x, direction, dy = rng.normal(size=(3, 2, 7, D))
    ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7]) if segmented else None
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    oracle = functools.partial(attention, params_of(layer), segment_ids=ids)

    def run(x):
        return layer(x, positions, None if ids is None else jnp.asarray(ids, jnp.int32))[0]

    y, pullback = jax.vjp(run, jnp.asarray(x, jnp.float32))
    assert reference.relative_error(y, oracle(x)) < 1e-6
    step = 1e-5
    slope = np.sum(dy * (oracle(x + step * direction) - oracle(x - step * direction))) / (2 * step)
    assert np.sum(np.asarray(pullback(jnp.asarray(dy, jnp.float32))[0]) * direction) == pytest.approx(slope, rel=1e-4)


def test_a_cache_needs_causality():
    layer = Attention(D, HEADS, causal=False, rngs=nnx.Rngs(0))
    model = Transformer(9, D, 1, HEADS, ffw=Dense, rngs=nnx.Rngs(0))
    positions = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(InputError, match="a cache needs causal attention"):
        layer(jnp.zeros((1, 1, D)), positions, None, model.init_cache(1, 4)[0])


# The model


def forward(params, images, blocks):
    """Logits [b, classes] of a model of dense layers, in float64."""

    def norm(name, x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params[f"{name}.scale"]

    x = (by_patch(images) / 127.5 - 1) @ params["embed.linear.kernel"] + params["embed.positions"]
    for block in range(blocks):
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in params.items()}
        kernels = {name: own[f"attention.{name}"] for name in ("query_key_value.kernel", "out.kernel")}
        x = x + attention(kernels, norm(f"blocks.{block}.attention_norm", x), None)
        layer = {name: own[f"ffw.{name}"] for name in ("up.kernel", "down.kernel")}
        x = x + reference.dense(layer, norm(f"blocks.{block}.ffw_norm", x))
    return norm("final_norm", x).mean(axis=1) @ params["head.kernel"]


def test_the_whole_model(images, params_of):
    model = build()
    params, labels = params_of(model), np.array([0, 4, 2], np.int32)
    wanted = forward(params, images, 2)
    logits, aux = model(jnp.asarray(images))
    assert logits.shape == (B, CLASSES)
    assert aux.loss == 0
    # Some 30 sums of up to 32 terms, one after another, each rounded to 2^-24.
    assert reference.relative_error(logits, wanted) < 1e-5

    nll = np.log(np.exp(wanted).sum(axis=1)) - wanted[range(B), labels]
    ids = np.array([1, 0, 1], np.int32)
    summed, _ = model.cross_entropy(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(ids))
    assert float(summed) == pytest.approx(nll[0] + nll[2], rel=1e-5)
    hits = wanted.argmax(axis=1) == labels
    right = np.where(hits, labels, wanted.argmax(axis=1)).astype(np.int32)
    right[0] = (right[0] + 1) % CLASSES  # one that counts is wrong, one that counts is right, one does not count
    scores = model.scores(jnp.asarray(images), jnp.asarray(right), jnp.asarray(ids))
    assert scores["accuracy"] == 1


def test_gradients_of_the_embedding(images, params_of):
    model, labels = build(blocks=1), np.array([0, 4, 2], np.int32)
    params = params_of(model)
    grads = params_of(nnx.grad(lambda model: model.cross_entropy(jnp.asarray(images), jnp.asarray(labels))[0])(model))
    draw = np.random.default_rng(1)
    for name in ("embed.linear.kernel", "embed.positions", "head.kernel", "blocks.0.attention.query_key_value.kernel"):
        direction = draw.normal(size=params[name].shape)

        def loss(step, name=name, direction=direction):
            logits = forward(params | {name: params[name] + step * direction}, images, 1)
            return np.sum(np.log(np.exp(logits).sum(axis=1)) - logits[range(B), labels])

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert np.sum(grads[name] * direction) == pytest.approx(slope, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("layer", LAYERS)
def test_patches_moved_with_their_positions_change_nothing(images, layer, rng):
    """Without causality and rotation, positions are all that tells patches apart."""
    model = build(layer)
    model.eval()
    order = rng.permutation(S)
    moved = by_patch(images)[:, order].reshape(B, H // P, W // P, P, P, C).transpose(0, 1, 3, 2, 4, 5)
    moved = jnp.asarray(moved.reshape(images.shape))
    before, alone = model(jnp.asarray(images))[0], model(moved)[0]
    model.embed.positions[...] = model.embed.positions[...][order]
    np.testing.assert_allclose(model(moved)[0], before, atol=1e-5)
    assert np.abs(np.asarray(alone - before)).max() > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_that_fill_a_batch_up_reach_nothing(images, layer):
    """Neither the loss, nor gradients, nor statistics over the batch depend on what they hold."""
    ids, labels = jnp.asarray([1, 0, 1], jnp.int32), jnp.asarray([0, 4, 2], jnp.int32)
    found = []
    for filling in (images[1], np.zeros_like(images[1])):
        model = build(layer)
        whole = jnp.asarray(np.stack([images[0], filling, images[2]]))
        loss, grads = nnx.value_and_grad(lambda model, whole=whole: sum_of(model, whole, labels, ids))(model)
        found.append([loss, *jax.tree.leaves(grads), *jax.tree.leaves(nnx.state(model, nnx.BatchStat))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def sum_of(model, *batch):
    loss, aux = model.cross_entropy(*batch)
    return loss + aux.loss


def test_a_label_that_is_no_class_makes_the_loss_infinite(images):
    for label in (-1, CLASSES):
        summed, _ = build().cross_entropy(jnp.asarray(images), jnp.asarray([0, label, 1], jnp.int32))
        assert summed == jnp.inf


def test_steps_with_accumulation_remat_and_another_type(images):
    """Two micro-batches and repeated blocks give the same update; bfloat16 trains, and its loss is near."""
    batch = {"inputs": images[:2], "targets": np.array([3, 1], np.int32), "segment_ids": np.array([1, 1], np.int32)}

    def losses(accumulation=1, **options):
        trainer = Trainer(
            lambda *, rngs: ViT((H, W, C), P, CLASSES, D, 2, HEADS, ffw=Dense, **options, rngs=rngs),
            AdamW(learning_rate=0.01, warmup_steps=1),
            accumulation=accumulation,
        )
        state, found, step = trainer.init(0), [], jax.jit(trainer.step)
        with jax.numpy_dtype_promotion("standard"):
            for number in range(3):
                state, metrics = step(state, batch, trainer.optimizer.rates(trainer.labels, number, 10))
                found.append(float(metrics["loss"]))
        return found

    plain = losses()
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(losses(accumulation=2, remat=True), plain, rtol=2e-5)
    np.testing.assert_allclose(losses(dtype=jnp.bfloat16), plain, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((4, 6, 2), 3, 5), r"patch_size=3 does not divide images of 4 x 6"),
        (((4, 6), 2, 5), r"image_shape=\(4, 6\) must be height, width and channels"),
        (((4, 6, 2), 2, 0), r"num_classes=0"),
    ],
)
def test_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        ViT(*arguments, D, 1, HEADS, ffw=Dense, rngs=nnx.Rngs(0))


def test_images_of_another_shape_are_refused(images):
    with pytest.raises(InputError, match=r"shape \[batch, 4, 6, 2\], not \[3, 6, 4, 2\]"):
        build()(jnp.asarray(images).transpose(0, 2, 1, 3))
