"""Evaluation against the same numbers worked out in NumPy, and the experts' usage against counting them one by one."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from small_runs import BATCH, CONFIGS, load, train, write_text

from peer_jax import config
from peer_jax.data.pipeline import eval_batches, open_cache, shift_right, vocabulary_size
from peer_jax.errors import InputError
from peer_jax.layers import PEER, Dense
from peer_jax.models import Transformer
from peer_jax.run_directory import RunDirectory
from peer_jax.training import evaluate as evaluation
from peer_jax.training import ownership
from peer_jax.training.evaluate import evaluate, usage
from peer_jax.training.restore import evaluate_run

ROUTERS = {
    "peer": [],
    "pkm": [],
    "moe": [],
    "moe_token_choice": ["MoE.top_k=2", "MoE.capacity_factor=0.5"],  # some are dropped
}


pytestmark = pytest.mark.usefixtures("trains")


@pytest.fixture
def make(tiny):
    """A model in evaluation mode and its validation split, by the layer's config."""

    def make(layer, *bindings):
        run = load(tiny, "Run.steps=1", *bindings, layer=layer)
        trainer = run.trainer()
        return trainer.model(trainer.init(0)), open_cache(run.task.cache_path(), "validation")

    return make


def rows(source):
    """The whole split as one batch, padding included."""
    taken = source.take(range(source.rows))
    tokens, segment_ids = taken["tokens"], taken["segment_ids"]
    return shift_right(tokens, segment_ids), tokens, segment_ids


@pytest.mark.parametrize("layer", ["dense", "peer", "moe"])
def test_losses_are_those_worked_out_by_hand(make, layer):
    model, source = make(layer)
    inputs, targets, segment_ids = rows(source)
    logits = np.asarray(model(jnp.asarray(inputs), jnp.asarray(segment_ids))[0], np.float64)
    nll = tokens = 0.0
    for row in range(len(targets)):
        for position in range(source.seq_len):
            if segment_ids[row, position] == 0:
                continue
            score = logits[row, position]
            top = score.max()
            nll += top + math.log(np.exp(score - top).sum()) - score[targets[row, position]]
            tokens += 1
    assert tokens == source.counts["tokens"] < targets.size  # there is padding to leave out
    result = evaluate(model, source, batch_size=BATCH)
    # float32 logits and sums of a batch; a relative 1e-5 is a hundred times its resolution.
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / source.counts["bytes"], rel=1e-5)
    per_word = nll / source.counts["words"]
    assert math.log(result["word_perplexity"]) == pytest.approx(per_word, rel=1e-5)
    assert (result["tokens"], result["bytes"], result["words"]) == (
        tokens,
        source.counts["bytes"],
        source.counts["words"],
    )


def test_bytes_and_words_are_those_of_the_text(make):
    """A byte model has one token per byte, and one more per document for its end."""
    _, source = make("dense")
    counts = source.counts
    assert counts["tokens"] == counts["bytes"] + counts["documents"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["peer", "moe", "moe_token_choice"])
def test_batch_size_changes_nothing(make, layer):
    model, source = make(layer, *ROUTERS[layer])
    results = [evaluate(model, source, batch_size=size) for size in (1, 5, source.rows + 3)]
    for other in results[1:]:
        assert other["tokens"] == results[0]["tokens"]
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert other["experts"]["block_1"] == pytest.approx(results[0]["experts"]["block_1"], rel=1e-5)


@pytest.mark.parametrize("layer", ROUTERS)
def test_usage_and_unevenness_are_those_counted_one_by_one(make, layer):
    model, source = make(layer, *ROUTERS[layer])
    inputs, _, segment_ids = rows(source)
    (routing,) = model.route(jnp.asarray(inputs), jnp.asarray(segment_ids)).values()
    indices, gates = np.asarray(routing.indices), np.asarray(routing.gates, np.float64)
    weights = np.zeros((inputs.size, model.blocks[1].ffw.num_experts))  # [tokens, N]
    for token, place in enumerate(np.ndindex(inputs.shape)):
        if segment_ids[place] > 0:
            for expert, gate in zip(indices[place].flat, gates[place].flat, strict=True):
                weights[token, expert] += gate
    mass = weights.sum(axis=0)
    p = mass / mass.sum()
    expected = {
        "usage": np.mean((weights > 0).any(axis=0)),
        "unevenness": sum(x * math.log(x * len(p)) for x in p if x > 0),
    }
    assert evaluate(model, source, batch_size=BATCH)["experts"] == {"block_1": pytest.approx(expected, rel=1e-4)}


@pytest.mark.parametrize(
    ("mass", "share", "unevenness"),
    [
        ([1, 1, 1, 1], 1.0, 0.0),
        ([0, 5, 0, 0], 0.25, math.log(4)),
        ([2, 2, 0, 0], 0.5, math.log(2)),
        ([3, 1], 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ],
)
def test_usage_in_closed_form(mass, share, unevenness):
    assert usage(np.asarray(mass, np.float32)) == pytest.approx({"usage": share, "unevenness": unevenness}, abs=1e-12)


def test_usage_of_experts_that_got_nothing(recwarn):
    """Gates of relu may all be zero; then no expert is used, and the mass is zero and can't be divided by."""
    result = usage(np.zeros(4, np.float32))
    assert result["usage"] == 0
    json.dumps(result, allow_nan=False)


def test_dense_models_have_no_experts(make):
    assert "experts" not in evaluate(*make("dense"), batch_size=BATCH)


def test_routing_can_be_left_out(make):
    model, source = make("peer")
    assert "experts" not in evaluate(model, source, batch_size=BATCH, routing=False)


def test_evaluating_leaves_the_model_as_it_was(make):
    model, source = make("peer")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    evaluate(model, source, batch_size=BATCH)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    assert jax.tree.leaves(before)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_million_experts_without_an_array_of_tokens_by_experts():
    n, tokens = 1024**2, 2 * 64

    def peer(d_model, **types):
        return PEER(d_model, n, num_heads=2, top_k=4, d_key=8, **types)

    model = nnx.eval_shape(
        lambda: Transformer(259, 16, 2, 2, ffw=lambda d, **t: Dense(d, **t), sparse_ffw=peer, rngs=nnx.Rngs(0))
    )
    model.eval()
    graph, state = nnx.split(model)
    batch = {name: jax.ShapeDtypeStruct((2, 64), jnp.int32) for name in ("inputs", "targets", "segment_ids")}
    masses = {1: jax.ShapeDtypeStruct((n,), jnp.float32)}
    compiled = evaluation._evaluate_batch.lower(graph, state, batch, masses).compile()
    # A few copies of the [N] masses and what 128 tokens need; [tokens, N] in float32 alone were 512 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * n * 4 / 8


# The command


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run whose best checkpoint isn't its last."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny, folder, "Run.steps=6", "Run.checkpoint_every=2", "Run.evaluate_every=2", "Run.keep_checkpoints=1")
    return folder


@pytest.fixture(scope="module")
def peer_run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    train(tiny, folder, "Run.steps=2", layer="peer")
    return folder


def data_file(folder, name, text, seed):
    path = folder / f"{name}.gin"
    path.write_text(f"TextTask.corpus = @local_files()\nlocal_files.path = {str(write_text(folder / text, seed))!r}\n")
    return path


@pytest.mark.slow
def test_evaluate_on_other_text_adds_to_the_result(finished, tmp_path, run_cli):
    before = json.loads((finished / "result.json").read_text())
    files = [data_file(tmp_path, name, f"{name}.jsonl", seed) for seed, name in enumerate(("one", "two"), start=1)]
    status, printed, errors = run_cli("evaluate", "--workdir", finished, "--quiet", *(f"--data={f}" for f in files))
    assert (status, errors) == (0, "")
    assert "one" in printed
    assert "two" in printed
    after = json.loads((finished / "result.json").read_text())
    assert set(after["evaluations"]) == {"corpus", "one", "two"}
    assert after["evaluations"]["corpus"] == before["evaluations"]["corpus"]
    assert {k: v for k, v in after.items() if k != "evaluations"} == {
        k: v for k, v in before.items() if k != "evaluations"
    }


def test_evaluate_again_gives_the_same(finished, run_cli, caplog):
    before = json.loads((finished / "result.json").read_text())
    status, _, errors = run_cli("evaluate", "--workdir", finished, "--quiet")
    assert (status, errors, caplog.messages) == (0, "", [])
    assert json.loads((finished / "result.json").read_text()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        (["--set=PEER.top_k=2"], "PEER.top_k = 4, not 2"),
        (["--set=TextTask.max_validation_tokens=60"], "another text named 'corpus'"),
        (["--set=TextTask.seq_len=16"], "another text named 'corpus'"),
    ],
)
def test_what_is_not_the_run_s_own_evaluation_does_not_replace_it(peer_run, run_cli, caplog, bindings, said):
    before = (peer_run / "result.json").read_text()
    status, printed, _ = run_cli("evaluate", "--workdir", peer_run, "--quiet", *bindings)
    assert status == 0
    assert "corpus" in printed
    (message,) = caplog.messages
    assert message.startswith("not added to result.json")
    assert said in message
    assert (peer_run / "result.json").read_text() == before


def test_another_text_of_a_known_name_does_not_replace_it(finished, tmp_path, run_cli, caplog):
    before = (finished / "result.json").read_text()
    data = data_file(tmp_path, "other", "corpus.jsonl", seed=5)
    assert run_cli("evaluate", "--workdir", finished, "--quiet", "--data", data)[0] == 0
    assert "another text named 'corpus'" in caplog.text
    assert (finished / "result.json").read_text() == before


def test_data_of_one_name_are_not_dropped_in_silence(finished, tmp_path, run_cli):
    files = []
    for seed, folder in enumerate((tmp_path / "a", tmp_path / "b"), start=1):
        folder.mkdir()
        files.append(data_file(folder, "data", "one.jsonl", seed))
    status, printed, errors = run_cli("evaluate", "--workdir", finished, "--quiet", *(f"--data={f}" for f in files))
    assert status == 2 or printed.count("one") == 2, "two texts went in, one came out"


def test_a_run_without_its_text_generates_and_evaluates_other_text(finished, tmp_path, run_cli):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.gin").read_text()
    (run / "config.gin").write_text(re.sub(r"(?m)^local_files.path = .*", "local_files.path = '/gone.jsonl'", text))
    status, printed, _ = run_cli("generate", "--workdir", run, "--prompt", "the ", "--max-new-tokens", 4)
    assert status == 0
    assert printed.startswith("the ")
    data = data_file(tmp_path, "other", "other.jsonl", seed=3)
    status, printed, _ = run_cli("evaluate", "--workdir", run, "--quiet", "--data", data)
    assert status == 0
    assert "other" in printed
    status, _, errors = run_cli("evaluate", "--workdir", run, "--quiet")
    assert (status, errors.count("\n")) == (2, 1)
    assert "/gone.jsonl does not exist; give a text file" in errors


def test_a_file_that_names_no_text_is_refused(finished, tmp_path, run_cli):
    """It evaluated the run's own text, as if that were another."""
    (tmp_path / "path.gin").write_text("local_files.path = 'other.txt'\n")
    for file in (CONFIGS / "sweeps" / "lr.gin", tmp_path / "path.gin"):
        status, _, errors = run_cli("evaluate", "--workdir", finished, "--quiet", "--data", file)
        assert (status, errors.count("\n")) == (2, 1)
        assert f"--data {file} names no text: give a file that binds TextTask.corpus" in errors


def test_other_text_takes_no_argument_of_the_run_s_own(finished, tmp_path):
    """A validation_path of the run's own text would be evaluated under the name of the other text."""
    kept = tmp_path / "config.gin"
    text = (finished / "config.gin").read_text()
    own = write_text(tmp_path / "own.jsonl", 9)
    kept.write_text(text.replace("local_files.validation_path = None", f"local_files.validation_path = {str(own)!r}"))
    assert config.load_kept(kept).task.corpus.validation_files[0].path == own
    other = config.load_kept(kept, [data_file(tmp_path, "other", "other.jsonl", seed=3)]).task.corpus
    assert other.validation_files is None
    assert other.split_by == "text"


def test_the_model_of_a_run_is_read_from_its_directory(finished, tmp_path):
    """A copy is kept, because the original may be gone or be another file later."""
    original = tmp_path / "some.model"
    texts = iter(["some words to train on", "and some more words"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(original)[:-6], vocab_size=30, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    text = (finished / "config.gin").read_text()
    directory.write_config(text.replace("vocabulary = 'bytes'", f"vocabulary = {str(original)!r}"))
    for _ in range(2):
        ownership.keep_vocabulary(directory, str(original))
    size = vocabulary_size(str(original))
    original.unlink()
    run = config.load_kept(directory.config)
    assert vocabulary_size(run.task.vocabulary) == size
    assert run.config.identity == config.load_kept(finished / "config.gin").config.identity
    copy = Path(directory.vocabulary)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"\.model is damaged: remove it, to use the file that config\.gin names"):
        config.load_kept(directory.config)


def test_evaluate_the_best_checkpoint(tiny, tmp_path, run_cli):
    bindings = ["Run.steps=6", "Run.checkpoint_every=2", "Run.evaluate_every=2", "AdamW.learning_rate=5.0"]
    train(tiny, tmp_path, *bindings, "Run.keep_checkpoints=1")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["validation_loss"] for line in written if "validation_loss" in line}
    best = min(validation, key=validation.get)
    run = config.load([tmp_path / "config.gin"])
    step, evaluations = evaluate_run([run], tmp_path, checkpoint="best", batch_size=BATCH, progress=False)
    assert step == best
    assert evaluations["corpus"]["loss"] == pytest.approx(validation[best], rel=1e-6)
    if best != 6:
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["evaluations"]["corpus"]["loss"] == validation[6]
    status, printed, _ = run_cli("evaluate", "--workdir", tmp_path, "--quiet", "--checkpoint", "best")
    assert status == 0
    assert f"step {best}" in printed


def test_another_vocabulary_is_refused(tiny, finished):
    run = config.load([finished / "config.gin"])
    other = dataclasses.replace(run, task=dataclasses.replace(run.task, vocabulary="pieces.model"))
    with pytest.raises(InputError, match=r"vocabulary='pieces\.model' is not that of the model, 'bytes'"):
        evaluate_run([run, other], finished, batch_size=BATCH, progress=False)


def test_batches_cover_the_split_once(make):
    _, source = make("dense")
    seen = [batch["segment_ids"] for batch in eval_batches(source, batch_size=BATCH)]
    assert int(np.sum(np.concatenate(seen) > 0)) == source.counts["tokens"]
