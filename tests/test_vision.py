"""Vision from end to end: the shipped configs of the digits, kills, evaluations, plans and the sweep."""

import csv
import json
import re
import signal

import numpy as np
import pytest
from small_runs import (
    CONFIGS,
    KEEPS_NO_PROGRAMS,
    PROGRAM,
    assert_same,
    leaves,
    lines,
    losses,
    refused,
    start_process,
    wait_for,
    without_times,
)

from peer_jax import config
from peer_jax.analysis import report, results
from peer_jax.analysis.isoflop import analyse
from peer_jax.data.pipeline import ensure_prepared
from peer_jax.layers import Dense
from peer_jax.models import ViT
from peer_jax.sweeps import plan
from peer_jax.sweeps.sweep import expand
from peer_jax.training import loop
from peer_jax.training.flops import training_flops

VISION = CONFIGS / "vision"
SHORT = ["Run.steps=12", "Run.batch_size=16", "ViT.d_model=16", "Run.log_every=1"]

pytestmark = pytest.mark.usefixtures("trains")


def files(layer="dense", size="tiny", data="digits"):
    own = [VISION / "sizes" / f"{size}.gin", VISION / "data" / f"{data}.gin"]
    return [VISION / "base.gin", CONFIGS / "layers" / f"{layer}.gin", *own]


def text_files(layer):
    others = [CONFIGS / "sizes" / "tiny.gin", CONFIGS / "data" / "python_stdlib.gin"]
    return [CONFIGS / "base.gin", CONFIGS / "layers" / f"{layer}.gin", *others]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(folder):
    def load(*bindings, layer="dense"):
        return config.load(files(layer), [*bindings, f"ImageTask.cache_dir={str(folder)!r}"])

    return load


def test_dense_reads_digits(load, tmp_path):
    """At least 95% of the held-out digits, by the command of the config, and a result that adds up."""
    run = load("Run.steps=200")
    result = loop.train(run, tmp_path, progress=False)
    assert result == json.loads((tmp_path / "result.json").read_text())
    own = result["evaluations"]["digits"]
    assert own["accuracy"] >= 0.95
    assert own["loss"] < 0.25
    assert not own.keys() & {"perplexity", "bits_per_byte", "tokens"}
    rows = run.task.prepared_rows()
    assert own["images"] == 1797 - rows
    assert result["is_causal"] is None
    assert result["seq_len"] == 4
    assert result["tokens"] == 200 * 64 * 4
    assert result["epochs"] == 200 * 64 / rows
    model = run.trainer().abstract_model
    assert isinstance(model, ViT)
    d, s = 32, 4
    per_image = s * (2 * 16 * d + 2 * (8 * d * d + 4 * s * d) + 2 * 16 * d * d) + 2 * d * 10
    assert result["training_flops"] == pytest.approx(3 * per_image * 200 * 64, rel=1e-12)
    assert result["training_flops"] == training_flops(model, result["tokens"], 4)
    logged = [line for line in lines(tmp_path) if "validation_loss" in line]
    assert [line["validation_accuracy"] for line in logged] == [own["accuracy"]]


@pytest.mark.slow
def test_killed_and_resumed_to_the_same(load, folder, tmp_path):
    """A process is killed after its first checkpoint; another one ends with the bits of a run that never was."""
    bindings = [*SHORT, "Run.steps=60", "Run.checkpoint_every=10"]
    run = load(*bindings, layer="peer")
    ensure_prepared(run.task, progress=False)
    stack = [part for file in files("peer") for part in ("--config", file)]
    given = [part for binding in (*bindings, f"ImageTask.cache_dir={str(folder)!r}") for part in ("--set", binding)]
    killed, never = tmp_path / "killed", tmp_path / "never"
    process = start_process([*PROGRAM, "train", *stack, *given, "--workdir", killed], **KEEPS_NO_PROGRAMS)
    log = killed / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()

    results = [loop.train(run, directory, progress=False) for directory in (killed, never)]
    assert without_times(results[0]) == without_times(results[1])
    assert losses(killed) == losses(never)
    assert_same(leaves(killed, run), leaves(never, run))


@pytest.fixture(scope="module")
def short_runs(folder, tmp_path_factory, trains):
    """A directory with a short run of each layer."""
    root = tmp_path_factory.mktemp("runs")
    for layer in ("dense", "moe", "peer"):
        run = config.load(files(layer), [*SHORT, f"ImageTask.cache_dir={str(folder)!r}"])
        loop.train(run, root / layer, progress=False)
    return root


def test_every_layer_trains_and_its_experts_are_measured(short_runs):
    for layer in ("dense", "moe", "peer"):
        own = json.loads((short_runs / layer / "result.json").read_text())["evaluations"]["digits"]
        assert 0 <= own["accuracy"] <= 1
        assert np.isfinite(own["loss"])
        if layer == "dense":
            assert "experts" not in own
        else:
            assert 0 < own["experts"]["block_1"]["usage"] <= 1


def test_reports_show_accuracy_beside_loss_and_nothing_of_text(short_runs, tmp_path, capsys):
    rows = results.read([short_runs])
    report.table(rows)
    printed = capsys.readouterr().out
    assert "nats per image" in printed
    assert "not causal" not in printed
    page = report.write_report(analyse(rows, resamples=0), [short_runs], tmp_path).read_text()
    for row in rows:
        assert f"{row.accuracy:.2%}" in printed
        assert f"{row.accuracy:.2%}" in page
    assert "nats per image, on the validation split" in page
    assert "There is one series" in page or "No method has a minimum" in page
    table, definitions = page.split('id="definitions"')
    for word in ("perplexity", "bits/byte", "per token of text", "causal"):
        assert word not in printed
        assert word not in re.sub("<style>.*?</style>", "", table, flags=re.DOTALL)
    with open(tmp_path / "results.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(line["accuracy"]) for line in written] == [row.accuracy for row in rows]
    assert {line["perplexity"] for line in written} == {""}


def test_what_a_run_of_images_is_asked_for_in_vain(short_runs, tmp_path, run_cli):
    run = short_runs / "dense"
    refused(run_cli("generate", "--workdir", run), "the run is of digits, not of text")
    text = CONFIGS / "data" / "python_stdlib.gin"
    refused(run_cli("evaluate", "--workdir", run, "--data", text), f"{text} binds TextTask.corpus, but ImageTask")
    other = tmp_path / "other.gin"
    other.write_text("# Other digits.\nImageTask.corpus = @digits()\nImageTask.patch_size = 2\n")
    refused(run_cli("evaluate", "--workdir", run, "--data", other), "embed/linear/kernel the config gives")
    stack = [part for file in files() for part in ("--config", file)]
    mixed = [*stack, "--set", "Run.model=@Transformer", "--set", "Run.steps=1", "--workdir", tmp_path / "mixed"]
    refused(run_cli("train", *mixed), "@Transformer is given 'image_shape' a model must fit its task")
    refused(
        run_cli("train", *stack, "--set", "ViT.patch_size=2", "--workdir", tmp_path / "x"), "set ImageTask.patch_size"
    )
    of_text = ["--set", "Transformer.sparse_ffw=@PEER", "--set", "PEER.num_experts=16", "--workdir", tmp_path / "x"]
    refused(run_cli("train", *stack, *of_text), "Transformer.sparse_ffw ViT.sparse_ffw set that")
    peer = run_cli("analyse", "--workdir", short_runs / "peer")
    refused(peer, "the run is of digits, not of text, which alone can be analysed")
    refused(run_cli("sentencepiece", *stack, "--model", tmp_path / "model"), "digits is no text")
    status, printed, errors = run_cli("evaluate", "--workdir", run)
    assert status == 0, errors
    assert "accuracy" in printed
    assert "nats per image" in printed
    assert "perplexity" not in printed
    assert "bits/byte" not in printed


@pytest.mark.parametrize("size", sorted(path.stem for path in (VISION / "sizes").glob("*.gin")))
@pytest.mark.parametrize("data", sorted(path.stem for path in (VISION / "data").glob("*.gin")))
def test_configs_are_built_without_data(size, data, load):
    """Every stack; the fingerprint of a TFDS builder is that of its names, so nothing is downloaded."""
    given = ["Run.steps=10"]
    if data == "prepared":
        given.append(f"prepared_images.path={str(ensure_prepared(load('Run.steps=10').task, progress=False))!r}")
    run = config.load(files("peer", size, data), given)
    model = run.trainer().abstract_model
    assert [type(block.ffw) is Dense for block in model.blocks].count(False) == 1
    assert run.task.seq_len == model.num_patches
    assert run.task.fingerprint()
    assert run.eval_batch_size() * run.task.seq_len >= 4096


@pytest.mark.parametrize("layer", sorted(path.stem for path in (CONFIGS / "layers").glob("*.gin")))
def test_every_layer_of_the_configs_reaches_the_vit(layer):
    """A file that bound the layer at the Transformer would leave a ViT dense under the layer's name."""
    run, text = (config.load(stack, ["Run.steps=10"]) for stack in (files(layer), text_files(layer)))
    models = [made.trainer().abstract_model for made in (run, text)]
    assert [model.method.name for model in models] == [models[1].method.name] * 2
    assert (models[0].method.name == "Dense") == (layer == "dense")


def test_the_sweep_spends_the_same_on_every_method(folder):
    """As it ships: every run within 2% of its budget, enough steps, and a prediction of its epochs."""
    file = CONFIGS / "sweeps" / "vision_digits.gin"
    sweep, bindings, imports = config.load_sweep([file])
    made = plan.plan(expand(sweep, file.parent, bindings, imports), config.load)
    assert {run.point.method for run in made} == set(sweep.methods)
    assert all(run.training_flops == pytest.approx(run.point.budget, rel=0.02) for run in made)
    assert all(run.is_causal for run in made)  # no loss is flattered by seeing what it is to predict
    (note, *_) = plan.check(sweep, made)
    assert "read digits more than once" in note
