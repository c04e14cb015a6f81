"""Analyses of coarse experts: mean outputs, weights by label, large matrices; and of layers that do not route."""

import functools
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import train
from test_analyse import D, V, halves, model
from test_experts import every_expert, labelled, random_trace, traced

from peer_jax import config as configs
from peer_jax.analysis.experts import ablations, gates, look, matrices, mean_outputs, pages, passes, similarity, write
from peer_jax.analysis.experts.trace import UNKNOWN, Trace
from peer_jax.cli.app import kept_config
from peer_jax.data.pipeline import Batch, shift_right
from peer_jax.data.vocabulary import ByteVocabulary
from peer_jax.layers import PEER, Dense, MoE, MuMoE, Routing, SoftMoE
from peer_jax.training.restore import restore_model

pytestmark = pytest.mark.usefixtures("trains")

LAYERS = {
    "top 1": functools.partial(MoE, num_experts=4, d_ff=6, routing="token_choice", top_k=1, shared_d_ff=3),
    "top 2": functools.partial(MoE, num_experts=4, d_ff=6, routing="token_choice", top_k=2, activation="geglu"),
    "expert choice": functools.partial(MoE, num_experts=4, d_ff=6, capacity_factor=1.5),
    "mumoe": functools.partial(MuMoE, num_experts=6, d_ff=6, second_level=2, rank=3),
    "peer": functools.partial(PEER, num_experts=16, num_heads=2, top_k=4, d_key=4),
}


@pytest.fixture(scope="module")
def rows():
    """Five rows of 12 tokens, the last of which ends with padding."""
    targets = np.random.default_rng(0).integers(3, V, size=(5, 12)).astype(np.int32)
    segment_ids = np.ones((5, 12), np.int32)
    targets[4, 7:], segment_ids[4, 7:] = 0, 0
    batch = Batch(inputs=shift_right(targets, segment_ids), targets=targets, segment_ids=segment_ids)
    return passes.Rows(batch, np.zeros(5, int))


def built_with(name):
    """A model and its layer, whose router chooses: the gate of muMoE is zero at first."""
    built = model(LAYERS[name])
    layer = built.blocks[1].ffw
    if name == "mumoe":
        kernel = 3 * np.random.default_rng(0).normal(size=layer.gate.kernel.shape)
        layer.gate.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return built, layer


# Mean outputs


@pytest.mark.parametrize("name", LAYERS)
def test_mean_outputs_are_those_of_loops_over_all_uses(rows, name):
    built, layer = built_with(name)
    run = passes.Passes(built, rows, 2)
    _, (trace,) = passes.collect(run, seed=0)  # keeps the inputs of all tokens, which are few
    t, x = len(trace.vectors), jnp.asarray(trace.vectors)
    assert t == int(rows.real.sum())
    found = mean_outputs.mean_outputs(run, 1, [3, 0, 2])
    nothing = layer.mix(x, Routing(jnp.zeros((t, 1, 1), jnp.int32), jnp.zeros((t, 1, 1))))
    for place, expert in enumerate([3, 0, 2]):
        routing = Routing(jnp.full((t, 1, 1), expert, jnp.int32), jnp.ones((t, 1, 1)))
        alone = np.asarray(layer.mix(x, routing) - nothing, np.float64)
        uses = ((trace.indices == expert) & (trace.gates > 0)).sum(axis=(1, 2))
        assert uses.sum() > 0
        np.testing.assert_allclose(found.directions[place], uses @ alone / uses.sum(), atol=2e-6)
        assert found.norms[place] == pytest.approx(uses @ np.linalg.norm(alone, axis=1) / uses.sum(), rel=1e-4)


def test_an_expert_that_no_token_uses_has_no_mean_output(rows):
    built, layer = built_with("top 1")
    layer.router.kernel[...] = jnp.zeros_like(layer.router.kernel[...])  # all tokens choose the first expert
    found = mean_outputs.mean_outputs(passes.Passes(built, rows, 5), 1, [0, 2])
    assert found.norms[0] > 0
    assert not found.directions[1].any()
    assert found.norms[1] == 0


def test_the_lens_of_a_planted_mean_output(rows):
    """Whatever an expert reads, it puts out a positive multiple of the direction of "z", and of noise beside it."""
    built = model(functools.partial(MoE, num_experts=4, d_ff=6, routing="token_choice", top_k=1, activation="relu"))
    layer, kernel = built.blocks[1].ffw, built.head.kernel[...]
    built.head.kernel[...] = kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)
    z = built.head.kernel[...][:, ByteVocabulary().encode("z")[0]]
    layer.down[...] = layer.down[...].at[2].set(jnp.tile(z, (6, 1)))
    layer.router.kernel[...] = jnp.zeros((D, 4)).at[:, 2].set(1e-6).at[:, 1].set(-1e-6)
    run = passes.Passes(built, rows, 5)
    text, (trace,) = passes.collect(run, seed=0)
    means = mean_outputs.mean_outputs(run, 1, [2])
    (page,) = pages.pages(built, trace, text, {2: ["random"]}, ByteVocabulary(), means)
    assert page["uses"] > 5
    assert page["promotes"][0][0] == "z"
    assert page["norm"] == pytest.approx(page["mean_norm"])  # all outputs have the same direction
    assert page["mean_norm"] > 0
    (unknown,) = pages.pages(built, trace, text, {2: ["random"]}, ByteVocabulary())
    assert (unknown["promotes"], unknown["norm"], unknown["mean_norm"]) == (None, None, None)


# Layers of the other systems


def test_mumoe_is_changed_like_any_layer(rows):
    built, layer = built_with("mumoe")
    run = passes.Passes(built, rows, 5)
    text, (trace,) = passes.collect(run, seed=0)
    assert 0 < np.count_nonzero(trace.gates) < trace.gates.size
    nothing = run.losses("nothing", {1: passes.unchanged(6)})
    np.testing.assert_allclose(nothing, text.losses, atol=2e-6)
    found = {one.name: one for one in ablations.ablate(run, text, trace, halves(text), seed=0)}
    assert set(ablations.EXPLAINED) - set(found) <= {"most specialised knocked out"}
    assert min(abs(one.cost) for one in found.values()) > 0
    compared = similarity.static(layer, trace, seed=0)
    assert set(compared.similar) == {"up", "up, mean neuron", "down", "down, mean neuron"}
    assert compared.keys is not None
    assert similarity.dynamic(layer, trace, seed=0).others is not None


def test_a_layer_that_does_not_route_is_zeroed(rows):
    """It costs what a layer costs whose experts put out nothing."""
    built = model(functools.partial(SoftMoE, num_experts=2, slots_per_expert=2, d_ff=5))
    run = passes.Passes(built, rows, 2)
    text, traces = passes.collect(run, seed=0)
    assert traces == []
    found = ablations.zero(run, text, 1)
    layer = built.blocks[1].ffw
    layer.down[...] = jnp.zeros_like(layer.down[...])
    assert found.cost == pytest.approx((run.losses("", {}) - text.losses).mean(), abs=1e-6)
    assert abs(found.cost) > 1e-4


@pytest.mark.slow
def test_the_page_of_soft_moe_says_what_is_unknown(tiny, tmp_path, run_cli):
    train(tiny, tmp_path / "run", "Run.steps=3", layer="soft_moe")
    status, printed, _ = run_cli("analyse", "--workdir", tmp_path / "run", "--tokens", 500)
    assert status == 0
    sentence = "does not route tokens to experts: use, specialisation, outputs and pages of its experts are unknown."
    assert "Block 1: SoftMoE" in printed
    assert sentence in printed
    page = (tmp_path / "run" / "analysis.html").read_text()
    assert sentence in page
    assert 'id="usage"' not in page
    assert "Without the layer, the loss is" in page
    (only,) = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())["unrouted"]
    assert (only["block"], only["zeroed"]["name"]) == (1, "zeroed")


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["mumoe", "moe_token_choice"])
def test_the_pages_of_coarse_experts_have_a_lens(tiny, tmp_path, layer):
    train(tiny, tmp_path / "run", "Run.steps=3", layer=layer)
    run = configs.load_kept(kept_config(str(tmp_path / "run")))
    _, built = restore_model(run, tmp_path / "run", "last")
    found = look(built, [run.task], tokens=500, batch_size=8)
    (of,) = found.blocks
    assert all(page["promotes"] and page["mean_norm"] >= page["norm"] > 0 for page in of.pages)
    assert {one.kind for one in of.gates} == {"token", "next token", "position"}
    write(found, layer, tmp_path)
    assert (tmp_path / "analysis" / "gates_by_next_token.svg").exists()
    (values,) = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["blocks"]
    assert np.shape(values["gates"][0]["weights"]) == of.gates[0].weights.shape


# Weights by label


def test_weights_by_label_are_those_of_loops(rng, monkeypatch):
    monkeypatch.setattr(gates, "EXPERTS", 5)
    monkeypatch.setattr(gates, "LABELS", 3)
    trace, of = random_trace(rng, tokens=80), rng.integers(-1, 5, size=80)
    found = gates.gate_map(trace, labelled(of))
    known = of != UNKNOWN
    sizes = [(of == label).sum() for label in range(5)]
    assert [int(name) for name in found.labels] == sorted(sorted(range(5), key=lambda one: (-sizes[one], one))[:3])
    assert found.tokens.tolist() == [sizes[int(name)] for name in found.labels]

    def mean(expert, tokens):
        return sum(trace.gates[t][trace.indices[t] == expert].sum() for t in np.flatnonzero(tokens)) / tokens.sum()

    means = [mean(expert, known) for expert in range(9)]
    assert found.experts.tolist() == sorted(range(9), key=lambda expert: -means[expert])[:5]
    np.testing.assert_allclose(found.mean, [means[expert] for expert in found.experts], rtol=1e-6)
    for row, name in zip(found.weights, found.labels, strict=True):
        np.testing.assert_allclose(row, [mean(expert, of == int(name)) for expert in found.experts], rtol=1e-6)
    np.testing.assert_allclose(found.times, found.weights / found.mean)


def test_planted_weights_by_label():
    """Expert 0 is used by all tokens with the weight 0.5, experts 1 and 2 by those of one label each."""
    of = np.arange(90) % 3 == 0
    trace = traced(np.stack([np.zeros(90), np.where(of, 1, 2)], -1)[:, None], np.full((90, 1, 2), 0.5), 8)
    found = gates.gate_map(trace, labelled(of.astype(int)))
    assert found.experts.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.times, [[1, 1.5, 0], [1, 0, 3]])
    assert gates.gate_map(trace, labelled(np.zeros(90, int))) is None
    unused = Trace(0, 8, trace.indices, np.zeros_like(trace.gates), trace.sample, trace.vectors)
    assert gates.gate_map(unused, labelled(of.astype(int))) is None


# Large matrices


class Large(Dense):
    """Two matrices of 64 KiB for each expert, made when they are asked for; ``most`` is how many were asked for."""

    num_experts, most = 40, 0

    def expert_matrices(self, experts):
        self.most = max(self.most, len(experts))
        rows = [np.random.default_rng(int(e)).normal(size=(2, 128, 128)).astype(np.float32) for e in experts]
        up, down = np.swapaxes(rows, 0, 1)
        return {"up": up + np.float32(0.1), "down": down}


def peak(of):
    tracemalloc.start()
    found = of()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, most


def test_large_experts_are_read_in_parts_and_give_the_same_numbers(monkeypatch):
    whole, parts = Large(4, rngs=nnx.Rngs(0)), Large(4, rngs=nnx.Rngs(0))
    expected = similarity.static(whole, every_expert(40), seed=0)
    _, at_once = peak(matrices.Matrices(whole, np.arange(40)).products)
    monkeypatch.setattr(matrices, "PART", 3 * 2**17)
    monkeypatch.setattr(matrices, "DOUBLE", 2**14)
    found = similarity.static(parts, every_expert(40), seed=0)
    _, apart = peak(matrices.Matrices(parts, np.arange(40)).products)
    assert (whole.most, parts.most) == (40, 3)
    rows = whole.expert_matrices(np.arange(40))["up"].reshape(40, -1).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(found.similar["up"], unit @ unit.T, atol=1e-12)
    assert list(found.similar) == ["up", "up, mean neuron", "down", "down, mean neuron"]
    for name, cosines in found.similar.items():
        np.testing.assert_allclose(cosines, expected.similar[name], atol=1e-12, err_msg=name)
    assert found.matchings == expected.matchings
    for one, other in zip(found.components, expected.components, strict=True):
        np.testing.assert_array_equal(one, other)
    # Of 40 experts in parts of three, two parts are held, and a third of one as it is made.
    assert apart < at_once / 4
