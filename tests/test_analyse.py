"""Analyses of models whose answer is known, and ``peer-jax analyse`` from a run to the page in a browser."""

import contextlib
import csv
import dataclasses
import functools
import html
import io
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import refused, train, write_text
from test_report import BROWSER, Page, browse

from peer_jax import cli
from peer_jax import config as configs
from peer_jax.analysis.experts import ablations, look, pages, passes, similarity, write
from peer_jax.analysis.experts.trace import Labels, Text, Trace
from peer_jax.cli.app import kept_config
from peer_jax.data.pipeline import Batch, shift_right
from peer_jax.data.vocabulary import ByteVocabulary
from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE, Routing
from peer_jax.models import Transformer
from peer_jax.training.restore import restore_model

pytestmark = pytest.mark.usefixtures("trains")

D, N, V = 8, 16, 259
RETRIEVAL = {"num_heads": 2, "top_k": 4, "d_key": 4}
LAYERS = {
    "peer": functools.partial(PEER, num_experts=N, **RETRIEVAL),
    "pkm": functools.partial(PKM, num_experts=N, share_sub_keys=False, **RETRIEVAL),
    "expert choice": functools.partial(MoE, num_experts=4, d_ff=6, capacity_factor=1.5),
    "token choice": functools.partial(
        MoE, num_experts=4, d_ff=6, routing="token_choice", top_k=2, capacity_factor=0.6, activation="geglu"
    ),
}


class OnlyRoutes(Dense):
    """A layer of one's own that routes and says nothing else."""

    num_experts = 3

    def route(self, x, mask=None):
        indices = jnp.broadcast_to(jnp.argmax(x[..., :3], axis=-1)[..., None, None], (*x.shape[:-1], 1, 1))
        return Routing(indices, jnp.ones(indices.shape))


def model(layer, seed=0, **how):
    built = Transformer(V, D, 2, 2, ffw=Dense, sparse_ffw=layer, rngs=nnx.Rngs(seed), **how)
    built.eval()
    return built


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    targets = rng.integers(3, V, size=(5, 12)).astype(np.int32)
    segment_ids = np.repeat(np.array([[1] * 5 + [2] * 7, [1] * 12, [1] * 4 + [2] * 3 + [0] * 5]), [2, 2, 1], axis=0)
    segment_ids = segment_ids.astype(np.int32)
    targets[segment_ids == 0] = 0
    inputs = shift_right(targets, segment_ids)
    return passes.Rows(Batch(inputs=inputs, targets=targets, segment_ids=segment_ids), np.zeros(5, int))


@pytest.fixture(scope="module")
def peer(rows):
    """A model with PEER, what it saw of the rows, and what it did."""
    built = model(LAYERS["peer"])
    run = passes.Passes(built, rows, 2)
    return built, run, *passes.collect(run, seed=0, sampled=20)


# What layers tell of themselves


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_given_its_own_routing_is_itself(name, rng):
    layer = LAYERS[name](D, rngs=nnx.Rngs(0))
    layer.eval()
    x = jnp.asarray(rng.normal(size=(2, 9, D)), jnp.float32)
    mask = jnp.asarray(np.arange(9) < np.array([[9], [6]]))
    x = jnp.where(mask[..., None], x, 0.0)
    y = np.asarray(layer(x, mask)[0])
    mixed = np.asarray(layer.mix(x, layer.route(x, mask)))
    np.testing.assert_allclose(mixed[np.asarray(mask)], y[np.asarray(mask)], atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_of_single_experts_add_up_to_the_layers_output(name, rng):
    layer = LAYERS[name](D, rngs=nnx.Rngs(0))
    layer.eval()
    x = jnp.asarray(rng.normal(size=(1, 9, D)), jnp.float32)
    y, (indices, gates) = np.asarray(layer(x)[0][0]), layer.route(x)
    experts, weights = (np.asarray(a[0]).reshape(9, -1) for a in (indices, gates))
    each = similarity.outputs(layer, np.asarray(x[0]), experts)
    np.testing.assert_allclose(np.einsum("tr,trd->td", weights, each), y, atol=1e-5)
    directions = layer.expert_outputs(jnp.arange(4, dtype=jnp.int32))
    assert (directions is None) == (name in ("expert choice", "token choice"))


def test_what_layers_tell_of_their_experts():
    experts = jnp.asarray([0, 5, 15], jnp.int32)
    peer, moe = LAYERS["peer"](D, rngs=nnx.Rngs(0)), LAYERS["token choice"](D, rngs=nnx.Rngs(0))
    rows = peer.expert_matrices(experts)
    assert {name: a.shape for name, a in rows.items()} == {"down": (3, 1, D), "up": (3, 1, D)}
    np.testing.assert_array_equal(rows["up"][1, 0], peer.up[...][5])
    keys = np.asarray(peer.sub_keys[...])
    np.testing.assert_array_equal(peer.expert_keys(experts)[1], np.concatenate([keys[0, 1], keys[1, 1]]))
    own = LAYERS["pkm"](D, rngs=nnx.Rngs(0))
    assert own.expert_keys(experts).shape == (3, 2 * 4)
    scored = LAYERS["peer"](D, query_norm="qk", rngs=nnx.Rngs(0)).expert_keys(experts).reshape(3, 2, 2)
    np.testing.assert_allclose(jnp.mean(scored**2, axis=-1), 1.0, rtol=0.01)  # scores have normalised sub-keys
    rows = moe.expert_matrices(experts[:2] % 4)
    assert {name: a.shape for name, a in rows.items()} == dict.fromkeys(("up", "down", "gate"), (2, 6, D))
    np.testing.assert_array_equal(rows["up"][1], moe.up[...][1].T)
    np.testing.assert_array_equal(moe.expert_keys(experts[:2] % 4)[1], moe.router.kernel[...][:, 1])
    quiet = OnlyRoutes(D, rngs=nnx.Rngs(0))
    assert quiet.expert_matrices(experts) == {}
    x = jnp.ones((1, D))
    assert quiet.expert_keys(experts) is quiet.expert_outputs(experts) is quiet.mix(x, quiet.route(x)) is None


# What a pass keeps


def test_losses_and_routing_are_those_of_the_model(peer, rows):
    built, run, text, (trace,) = peer
    given = jnp.asarray(rows.batch["inputs"]), jnp.asarray(rows.batch["segment_ids"])
    logits = np.asarray(built(*given)[0], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, rows.batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(text.losses, (log_z - target)[rows.real], atol=1e-5)
    routing = built.route(*given)[1]
    np.testing.assert_array_equal(trace.indices, np.asarray(routing.indices)[rows.real])
    np.testing.assert_allclose(trace.gates, np.asarray(routing.gates)[rows.real], atol=1e-6)
    assert (trace.block, trace.num_experts, len(text.inputs)) == (1, N, int(rows.real.sum()))
    again = built.blocks[1].ffw.route(jnp.asarray(trace.vectors))
    np.testing.assert_array_equal(np.asarray(again.indices), trace.indices[trace.sample])
    assert isinstance(built.blocks[1].ffw, PEER)  # the model is as it was


def test_documents_and_positions(peer):
    _, _, text, _ = peer
    assert text.pieces.tolist() == [0] * 5 + [1] * 7 + [2] * 5 + [3] * 7 + [4] * 12 + [5] * 12 + [6] * 4 + [7] * 3
    assert text.positions[:12].tolist() == [*range(5), *range(7)]
    pieces = passes.pieces(text)
    assert [len(piece) for piece in pieces] == [5, 7, 5, 7, 12, 12, 4, 3]
    assert np.concatenate(pieces).tolist() == text.targets.tolist()


# Ablations


def changed_tables(built, change):
    """A copy of a model with other tables in its sparse layer."""
    copy = nnx.clone(built)
    layer = copy.blocks[1].ffw
    layer.down[...], layer.up[...] = change(layer.down[...], layer.up[...])
    return copy


def test_ablations_are_models_with_other_tables(peer, rows):
    built, run, text, (trace,) = peer
    knocked, moved = np.array([1, 4, 9]), np.random.default_rng(1).permutation(N)
    kept = np.ones(N, np.float32)
    kept[knocked] = 0
    cases = {
        "nothing": (passes.unchanged(N), lambda down, up: (down, up)),
        "zeroed": (passes.unchanged(N, scale=0.0), lambda down, up: (down, jnp.zeros_like(up))),
        "knocked out": (passes.unchanged(N, kept=kept), lambda down, up: (down, up.at[knocked].set(0.0))),
        "permuted": (
            passes.unchanged(N, instead=moved.astype(np.int32)),
            lambda down, up: (down[moved], up[moved]),
        ),
    }
    for name, (change, tables) in cases.items():
        losses = run.losses(name, {1: change})
        other = passes.Passes(changed_tables(built, tables), rows, 2)
        np.testing.assert_allclose(losses, other.losses(name, {}), atol=2e-5, err_msg=name)
        assert (np.abs(losses - text.losses).max() > 1e-4) == (name != "nothing"), name


def test_changed_routings(rng):
    gates = rng.random((50, 2, 4)) * (rng.random((50, 2, 4)) < 0.7)
    routing = Routing(jnp.asarray(rng.integers(N, size=gates.shape), jnp.int32), jnp.asarray(gates, jnp.float32))
    alone = passes.changed(routing, passes.unchanged(N, alone=True))
    np.testing.assert_allclose(np.sum(alone.gates, -1), gates.sum(-1), rtol=1e-6)
    assert np.count_nonzero(alone.gates) == np.count_nonzero(gates.sum(-1))
    assert (np.argmax(alone.gates, -1) == np.argmax(gates, -1))[gates.sum(-1) > 0].all()
    shuffled = np.asarray(passes.changed(routing, passes.unchanged(N, shuffled=True)).gates)
    np.testing.assert_array_equal(np.sort(shuffled, -1), np.sort(gates.astype(np.float32), -1))
    np.testing.assert_array_equal(shuffled > 0, gates > 0)
    several = (gates > 0).sum(-1) > 2
    # With three or four weights, an order stays as it is in a sixth of the heads at most.
    assert 0.5 < (shuffled != gates.astype(np.float32)).any(-1)[several].mean() < 1


def halves(text):
    """Labels that change from token to token."""
    return Labels("half", ("even", "odd"), np.arange(len(text.inputs)) % 2)


def test_costs_are_means_of_the_differences_by_domain(peer):
    _, run, text, (trace,) = peer
    text = dataclasses.replace(text, domains=(halves(text),), documents=text.pieces // 2)
    found = {one.name: one for one in ablations.ablate(run, text, trace, text.domains[0], seed=0)}
    assert set(found) | {"most specialised knocked out"} == set(ablations.EXPLAINED)
    more = run.losses("zeroed", {1: passes.unchanged(N, scale=0.0)}) - text.losses
    assert found["zeroed"].cost == pytest.approx(more.mean())
    assert found["zeroed"].by_domain == {"half": pytest.approx({"even": more[::2].mean(), "odd": more[1::2].mean()})}
    means = [more[text.documents == document] - more.mean() for document in range(4)]
    variance = sum(one.sum() ** 2 for one in means) * 4 / 3
    assert found["zeroed"].error == pytest.approx(np.sqrt(variance) / len(more))
    masses = trace.masses()
    assert found["most used knocked out"].experts == 1
    assert found["most used knocked out"].mass == pytest.approx(masses.max() / masses.sum())


def test_a_layer_that_only_routes_is_zeroed_and_has_no_other_answers(rows):
    built = model(OnlyRoutes)
    run = passes.Passes(built, rows, 5)
    text, (trace,) = passes.collect(run, seed=0)
    (only,) = ablations.ablate(run, text, trace, halves(text), seed=0)
    assert (only.name, only.cost != 0) == ("zeroed", True)
    layer = built.blocks[1].ffw
    assert similarity.dynamic(layer, trace, seed=0) is None
    found = similarity.static(layer, trace, seed=0)
    assert (found.similar, found.keys, found.regressions, found.components) == ({}, None, {}, None)
    (page,) = pages.pages(built, trace, text, {0: ["random"]}, ByteVocabulary())
    assert (page["promotes"], page["norm"]) == (None, None)


# Similarity of a layer's experts


def test_norms_that_follow_weights_are_found(peer):
    """Every expert's output is as long as its mass is large: the router then prefers long outputs."""
    built, _, _, (trace,) = peer
    layer = LAYERS["pkm"](D, rngs=nnx.Rngs(0))
    order = np.argsort(np.argsort(trace.masses())) + 1.0
    directions = np.random.default_rng(0).normal(size=(N, D))
    values = directions / np.linalg.norm(directions, axis=1, keepdims=True) * order[:, None]
    layer.values[...] = jnp.asarray(values, jnp.float32)
    found = similarity.dynamic(layer, trace, seed=0)
    assert found.larger > 0.5 + 4 * found.larger_error
    norms = np.array([order[e] for e in trace.indices[trace.sample].ravel()])
    np.testing.assert_allclose(np.sort(found.norms), np.sort(norms), rtol=1e-5)
    cosines = similarity.cosines(values)
    first = similarity.static(layer, trace, seed=0)
    np.testing.assert_allclose(first.similar["values"], cosines[np.ix_(first.experts, first.experts)], atol=1e-6)


# Pages


def spelled(words):
    """A text of bytes, each document one word."""
    vocabulary = ByteVocabulary()
    targets = np.array([i for word in words for i in vocabulary.encode(word)], np.int32)
    documents = np.repeat(np.arange(len(words)), [len(word) for word in words])
    positions = np.concatenate([np.arange(len(word)) for word in words])
    kinds = Labels("task", ("a", "b"), documents % 2, by_document=True)
    return Text(targets, targets, positions, documents, documents, np.zeros(len(targets)), (kinds,))


def test_a_page_says_what_fires_an_expert():
    text = spelled(["x=1;y=2", "x=3", "q"])
    fired = np.array([chr(i - 3) == "=" for i in text.inputs])
    indices = np.where(fired, 5, 2).astype(np.int32)[:, None, None]
    gates = np.ones(indices.shape, np.float32)
    gates[text.documents == 1] = 2.0
    trace = Trace(1, N, indices, gates, np.arange(0), np.zeros((0, D), np.float32))
    built = model(LAYERS["peer"])
    kernel = built.head.kernel[...]
    built.head.kernel[...] = kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)
    z = ByteVocabulary().encode("z")[0]
    built.blocks[1].ffw.up[...] = built.blocks[1].ffw.up[...].at[5].set(3 * built.head.kernel[...][:, z])
    (page,) = pages.pages(built, trace, text, {5: ["random"]}, ByteVocabulary())
    assert page["inputs"] == [("=", 1.0)]
    assert (page["uses"], page["largest_weight"], page["norm"]) == (3, 2.0, pytest.approx(3.0))
    assert page["mean_weight"] == pytest.approx(4 / 3)
    assert page["domains"] == {"task": [("a", 0.5), ("b", 0.5)]}
    assert page["promotes"][0][0] == "z"  # planted: its row is the column of z in the head
    assert page["promotes"][0][1] > page["promotes"][1][1] > page["suppresses"][0][1]
    first, second, third = page["contexts"]
    assert (first["before"], first["token"], first["after"], first["domains"]) == ("x", "=", "3", ["b"])
    assert {second["before"], third["before"]} == {"x", "x=1;y"}
    assert pages.index(trace, text, ByteVocabulary())["="] == [(5, 1.0)]


def test_experts_with_pages_are_of_three_kinds(rng):
    indices = rng.integers(40, size=(4000, 1, 2)).astype(np.int32)
    indices[:1000, 0, 0] = 3
    of = (np.arange(4000) < 500).astype(int)
    indices[of == 1, 0, 1] = 9
    trace = Trace(0, 40, indices, np.ones(indices.shape, np.float32), np.arange(0), np.zeros((0, D)))
    chosen = pages.choose(trace, Labels("task", ("a", "b"), of), seed=0, size=2)
    assert "most used" in chosen[3]
    assert "most specialised by task" in chosen[9]
    assert sum("random" in kinds for kinds in chosen.values()) == 2


# The command


@pytest.fixture(scope="module")
def analysed(tiny, tmp_path_factory):
    """The folder of a run of PEER, of a second text and of what the command writes; and what it prints."""
    folder = tmp_path_factory.mktemp("analysed")
    train(tiny, folder / "run", "Run.steps=30", layer="peer")
    (folder / "more" / "numbers").mkdir(parents=True)
    (folder / "more" / "words").mkdir()
    for number in range(12):
        (folder / "more" / "numbers" / f"{number}.txt").write_text(" ".join(map(str, range(number, 300, 7))))
    shutil.copy(write_text(folder / "words.jsonl", seed=5), folder / "more" / "words")
    (folder / "more.gin").write_text(
        "TextTask.corpus = @local_files()\n"
        f"local_files.path = {str(folder / 'more')!r}\nlocal_files.validation_share = 0.5\n"
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["peer-jax", *map(str, command(folder, "out")), "--quiet"])
        cli.main()
    return folder, printed.getvalue()


def command(folder, out):
    given = ("--workdir", folder / "run", "--data", folder / "more.gin", "--tokens", 3000, "--out", folder / out)
    return ("analyse", *given)


@pytest.mark.slow
def test_the_command_writes_a_page_and_files(analysed):
    folder, printed = analysed
    assert f"The page is {folder / 'out' / 'analysis.html'}" in printed
    assert "Block 1: The expert of a token tells about its token" in printed
    found = json.loads((folder / "out" / "analysis" / "analysis.json").read_text())
    assert set(found["texts"]) == {"corpus", "more"}
    (block,) = found["blocks"]
    assert (block["block"], block["usage"]["experts"]) == (1, 64)
    by_kind = {one["kind"]: one for one in block["specialisation"]}
    assert list(by_kind) == ["task", "folder", "kind of file", "token", "next token", "position"]
    assert by_kind["task"]["labels"] == 2
    assert by_kind["folder"]["labels"] == 3  # numbers, words, and the run's own text, which is in no folder
    assert by_kind["token"]["answer"] == "yes"
    assert {one["verdict"] for one in found["statements"]} <= {"yes", "no", "partly", "unknown"}
    assert len(block["ablations"]) == len(ablations.EXPLAINED)
    with (folder / "out" / "analysis" / "ablations_by_domain.csv").open() as file:
        domains = {row["domain"] for row in csv.DictReader(file) if row["label"] == "folder"}
    assert domains == {"numbers", "words", "(no folder)"}
    for name in ("usage", "heads", "specialisation", "similarity", "norm_ranks", "norms", "ablations"):
        assert (folder / "out" / "analysis" / f"{name}.svg").read_bytes().startswith(b"<?xml"), name
    page = Page(folder / "out" / "analysis.html")
    assert "http" not in page.text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    for words in ("Neurons act like fine-grained experts", "The expert of a token tells", "shuffled documents"):
        assert words in page.text, words


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(analysed, run_cli):
    folder, printed = analysed
    status, again, errors = run_cli(*command(folder, "again"))
    assert (status, again) == (0, printed.replace("/out/", "/again/"))
    for bar in ("look 1/1", "analyse block 1 1/9 task", "block 1, zeroed 1/1"):
        assert bar in errors
    first, second = (
        {path.relative_to(folder / out): path.read_bytes() for path in (folder / out).rglob("*") if path.is_file()}
        for out in ("out", "again")
    )
    assert len(first) > 10
    assert first == second


SEARCH = """<script>addEventListener("load", async () => {
  const told = document.documentElement.dataset;
  await Promise.all([...document.images].map((image) => image.decode()));
  told.widths = [...document.images].map((image) => image.naturalWidth).join(" ");
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  const boxes = () => [...document.querySelectorAll(".expert")].filter((box) => !box.hidden);
  told.all = boxes().length;
  const box = document.getElementById("token");
  box.value = "q";
  box.dispatchEvent(new Event("input"));
  told.found = boxes().length;
  told.matches = document.getElementById("matches").textContent;
  boxes()[0].open = true;
  await new Promise((done) => setTimeout(done, 50));
  told.page = boxes()[0].textContent;
  box.value = "\u2603";
  box.dispatchEvent(new Event("input"));
  told.nothing = document.getElementById("matches").textContent;
});</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_and_searches_it(analysed, tmp_path, width):
    if BROWSER is None:
        pytest.skip("there is no chromium on the PATH (Debian's package chromium)")
    folder, _ = analysed
    page = tmp_path / "analysis.html"
    page.write_text((folder / "out" / "analysis.html").read_text().replace("</body>", SEARCH + "</body>"))
    dumped, console = browse(page, tmp_path, width)
    assert console == []
    told = {name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', dumped)}
    assert len(told["widths"].split()) >= 8
    assert all(int(image) > 100 for image in told["widths"].split())
    assert int(told["overflow"]) <= 0
    assert int(told["all"]) > int(told["found"]) > 0
    assert re.match(r"Experts of q: block 1 expert \d+ \d", told["matches"])
    assert "Weight: mean" in told["page"]
    assert "Promotes:" in told["page"]
    assert re.fullmatch(r"None of the \d+ most frequent tokens of the text contains this\.", told["nothing"])


@pytest.mark.slow
def test_a_block_whose_experts_nobody_uses_has_a_page(analysed, tmp_path):
    folder, _ = analysed
    run = configs.load_kept(kept_config(str(folder / "run")))
    _, built = restore_model(run, folder / "run", "last")
    layer = built.blocks[1].ffw
    layer.score_activation, layer.sub_keys[...] = "relu", jnp.zeros_like(layer.sub_keys[...])
    found = look(built, [run.task], tokens=500, batch_size=8)
    assert (
        "No token uses an expert, so experts tell nothing about its next token."
        in write(found, "dead", tmp_path).read_text()
    )
    assert [one.name for one in found.blocks[0].ablations] == ["zeroed"]


@pytest.mark.slow
def test_what_cannot_be_analysed_is_refused(analysed, tmp_path, run_cli):
    folder, _ = analysed
    data = ("--data", folder / "more.gin")
    refused(run_cli("analyse", "--workdir", tmp_path), str(tmp_path))
    refused(run_cli("analyse", "--workdir", folder / "run", *data, *data), "two of the tasks 'more'")
    with pytest.raises(InputError, match=r"^Dense does not route tokens"):
        look(model(Dense), [], tokens=10, batch_size=1)
