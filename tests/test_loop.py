"""Training from end to end, in this process."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small_runs import (
    BATCH,
    SEQ_LEN,
    assert_same,
    environment,
    interrupt_at,
    leaves,
    lines,
    load,
    losses,
    saved_steps,
    stack,
    train,
    without_times,
    write_text,
)

from peer_jax.data.corpora import local_files
from peer_jax.data.pipeline import TextTask, ensure_prepared
from peer_jax.errors import InputError, Interrupted
from peer_jax.run_directory import RunDirectory
from peer_jax.training import evaluators, loop, ownership
from peer_jax.training.checkpoint import Checkpoints
from peer_jax.training.restore import restore_model
from peer_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("trains")


# Learning

LAYERS = {"dense": "Dense", "soft_moe": "SoftMoE", "mumoe": "MuMoE", "pkm": "PKM", "peer": "PEER"}


@pytest.mark.parametrize("layer", ["dense", "moe", "moe_token_choice", "soft_moe", "mumoe", "pkm", "peer"])
def test_loss_falls_and_the_result_adds_up(tiny, tmp_path, layer):
    result = train(tiny, tmp_path, "Run.steps=40", layer=layer)
    logged = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert len(logged) == 40
    assert abs(logged[0] - np.log(259)) < 1.0  # it starts from uniform over bytes and special ids
    assert np.mean(logged[-5:]) < logged[0] - 1.5

    run = load(tiny, "Run.steps=40", layer=layer)
    model = run.trainer().abstract_model
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["schema"] == 1
    assert result["layer"] == LAYERS.get(layer, "MoE")
    assert result["method"] == model.method.label
    assert result["method"].startswith(result["layer"])
    assert result["options"] == json.loads(json.dumps(model.method.options()))
    assert result["is_baseline"] == (layer == "dense")
    assert result["config"] == run.config.identity
    assert (result["config"]["AdamW.learning_rate"], result["config"]["Run.steps"]) == ("0.01", "40")
    assert not result["config"].keys() & {"Run.log_every", "Run.accumulation", "TextTask.cache_dir", "local_files.path"}
    assert result["is_causal"] == (layer not in ("moe", "soft_moe"))
    assert (result["d_model"], result["num_blocks"]) == (16, 2)
    assert result["num_experts"] == {"dense": None, "peer": 64, "pkm": 64, "mumoe": 64}.get(layer, 4)
    assert (result["seed"], result["steps"], result["batch_size"], result["seq_len"]) == (0, 40, BATCH, SEQ_LEN)
    assert result["tokens"] == 40 * BATCH * SEQ_LEN
    assert result["forward_flops_per_token"] == sum(result["forward_flops_by_part"].values())
    assert result["forward_flops_per_token"] == model.flops_per_token(SEQ_LEN)
    assert result["training_flops"] == 3 * result["forward_flops_per_token"] * result["tokens"]
    assert result["params_total"] == model.num_params()
    assert result["params_active"] == model.num_active_params() <= result["params_total"]
    assert result["wall_seconds"] > 0
    assert result["tokens_per_second"] > 0
    assert result["corpus"]["name"] == "corpus"
    assert set(result["versions"]) == {"peer-jax", "jax", "flax", "optax", "numpy", "python"}
    names = {"platform", "device", "devices", "processes", "processor", "cores", "all_cores"}
    assert set(result["machine"]) == names
    (own,) = result["evaluations"].values()
    assert own["loss"] == lines(tmp_path)[-1]["validation_loss"]
    assert own["loss"] < logged[0] - 1.5
    assert ("experts" in own) == (layer not in ("dense", "soft_moe"))


def test_schedule_ends_with_the_last_step(tiny, tmp_path):
    train(tiny, tmp_path, "Run.steps=12", "AdamW.warmup_steps=4", "AdamW.final_fraction=0.25")
    rates = {line["step"]: line["learning_rate/backbone"] for line in lines(tmp_path) if "loss" in line}
    assert max(rates, key=rates.get) == 4
    assert rates[4] == 0.01
    assert rates[12] == pytest.approx(0.0025)


def test_parameters_and_order_have_seeds_of_their_own(tiny, tmp_path):
    """The order of the text is that of ``seed`` unless ``data_seed`` is given; parameters are always of ``seed``."""
    pairs = {(0, None): (0, 0), (1, None): (1, 1), (1, 0): (1, 0), (0, 1): (0, 1)}
    found = {}
    for seed, data_seed in [*pairs, (0, 0), (1, 1)]:
        folder = tmp_path / f"{seed}-{data_seed}"
        train(tiny, folder, "Run.steps=2", f"Run.seed={seed}", f"Run.data_seed={data_seed}")
        found[seed, data_seed] = losses(folder)
    assert all(found[given] == found[meant] for given, meant in pairs.items())
    assert len({tuple(found[meant].items()) for meant in pairs.values()}) == 4


@pytest.mark.slow
def test_eval_tasks_join_the_result(tiny, tmp_path):
    other = write_text(tmp_path / "other.jsonl", seed=1)
    run = load(tiny, "Run.steps=2")
    more = TextTask(local_files(other, validation_share=0.1), SEQ_LEN, cache_dir=run.task.cache_dir)
    result = loop.train(dataclasses.replace(run, eval_tasks=(more,)), tmp_path / "run", progress=False)
    assert set(result["evaluations"]) == {"corpus", "other"}
    assert result["evaluations"]["other"]["loss"] != result["evaluations"]["corpus"]["loss"]
    logged = {name: value for line in lines(tmp_path / "run") for name, value in line.items() if "validation" in name}
    assert logged == {
        "validation_loss": result["evaluations"]["corpus"]["loss"],
        "validation_loss/other": result["evaluations"]["other"]["loss"],
    }


@pytest.mark.slow
def test_wall_time_includes_further_evaluations_and_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    other = write_text(tmp_path / "other.jsonl", seed=1)
    run = load(tiny, "Run.steps=2")
    more = TextTask(local_files(other, validation_share=0.1), SEQ_LEN, cache_dir=run.task.cache_dir)
    ensure_prepared(more, progress=False)
    evaluate, wait, slept = evaluators.evaluate, Checkpoints.wait, []

    def slowly(model, source, **options):
        if source.path == more.cache_path():
            slept.append(time.sleep(2))
        return evaluate(model, source, **options)

    def wait_long(self):
        slept.append(time.sleep(2))
        return wait(self)

    monkeypatch.setattr(evaluators, "evaluate", slowly)
    monkeypatch.setattr(Checkpoints, "wait", wait_long)
    result = loop.train(dataclasses.replace(run, eval_tasks=(more,)), tmp_path / "run", progress=False)
    before = 2 * (len(slept) - 1)  # all but that of closing the checkpoints, when the result is written
    assert before >= 4
    assert result["wall_seconds"] >= before


def test_eval_task_of_the_same_name_is_not_dropped_in_silence(tiny, tmp_path):
    """Results go by the corpus's name, so another text under the same name must be refused."""
    other = tmp_path / "other"
    other.mkdir()
    run = load(tiny, "Run.steps=2")
    more = TextTask(
        local_files(write_text(other / "corpus.jsonl", seed=1), validation_share=0.1),
        SEQ_LEN,
        cache_dir=run.task.cache_dir,
    )
    with pytest.raises(InputError, match="corpus"):
        loop.train(dataclasses.replace(run, eval_tasks=(more,)), tmp_path / "run", progress=False)


def test_eval_task_of_another_vocabulary_is_refused(tiny):
    run = load(tiny, "Run.steps=2")
    other = dataclasses.replace(run.task, vocabulary="pieces.model")
    with pytest.raises(InputError, match=r"pieces\.model"):
        dataclasses.replace(run, eval_tasks=(other,))


# Length


def test_steps_come_nearest_to_the_budget(tiny):
    step = load(tiny, "Run.steps=1").trainer().abstract_model.flops_per_token(SEQ_LEN) * 3 * BATCH * SEQ_LEN
    for wanted in (1.0, 1.4, 1.6, 7.49, 1000.5):
        run = load(tiny, f"Run.training_flops={wanted * step!r}")
        steps = run.num_steps(run.trainer().abstract_model)
        assert abs(steps * step - wanted * step) <= step / 2
    with pytest.raises(InputError, match=r"training_flops=.*less than .* one step"):
        run.num_steps.__func__(load(tiny, f"Run.training_flops={0.5 * step}"), run.trainer().abstract_model)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["Run.steps=5", "Run.training_flops=1e9"], r"steps=5 and training_flops=1000000000\.0"),
        (["Run.steps=0"], "steps=0 must be above zero"),
        (["Run.steps=5", "Run.batch_size=-4"], "batch_size=-4 must be above zero"),
        (["Run.steps=5", "Run.accumulation=3"], "batch_size=4 does not divide into accumulation=3"),
        (["Run.steps=5", "Run.log_every=0"], "log_every=0"),
        (["Run.steps=5", "Run.evaluate_every=0"], "evaluate_every=0"),
        (["Run.steps=5", "Run.checkpoint_every=0"], "checkpoint_every=0"),
        (["Run.steps=5", "Run.keep_checkpoints=0"], "keep_checkpoints=0"),
        (["Run.training_flops=-1.0"], r"training_flops=-1\.0"),
    ],
)
def test_run_refuses(tiny, bindings, message):
    with pytest.raises(InputError, match=message):
        load(tiny, *bindings)


def test_only_training_needs_a_length(tiny):
    run = load(tiny, "Run.steps=None")
    with pytest.raises(InputError, match="steps=None and training_flops=None"):
        run.num_steps(run.trainer().abstract_model)


def test_accumulation_under_query_batch_norm_is_refused(tiny):
    with pytest.raises(InputError, match=r"accumulation=2 .* query_norm"):
        load(tiny, "Run.steps=5", "Run.accumulation=2", layer="peer").trainer()


@pytest.mark.slow
def test_accumulated_steps_equal_whole_batches(tiny, tmp_path):
    train(tiny, tmp_path / "whole", "Run.steps=5")
    train(tiny, tmp_path / "parts", "Run.steps=5", "Run.accumulation=2")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    # Sums in another order, five updates on: float32's 6e-8, times a few hundred terms.
    np.testing.assert_allclose(list(parts.values()), list(whole.values()), rtol=2e-5)


# Stopping


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "bindings"),
    [
        ("dense", []),
        ("moe", ["MoE.router_noise=1.0"]),  # its random stream has to go on, too
    ],
)
def test_sigterm_saves_within_the_step_and_resumes_to_the_same(tiny, tmp_path, monkeypatch, layer, bindings):
    bindings = ["Run.steps=12", "Run.evaluate_every=5", *bindings]
    never = train(tiny, tmp_path / "never", *bindings, layer=layer)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted, match="stopped at step 7") as stopped:
            train(tiny, tmp_path / "stopped", *bindings, layer=layer)
    assert stopped.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert lines(tmp_path / "stopped")[-1]["step"] == 7
    assert saved_steps(tmp_path / "stopped") == [7]
    resumed = train(tiny, tmp_path / "stopped", *bindings, layer=layer)
    assert without_times(resumed) == without_times(never)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "never")
    run = load(tiny, *bindings, layer=layer)
    assert_same(leaves(tmp_path / "stopped", run), leaves(tmp_path / "never", run))


@pytest.mark.slow
def test_sigterm_while_the_last_checkpoint_is_written_stops_before_the_result(tiny, tmp_path, monkeypatch):
    never = train(tiny, tmp_path / "never", "Run.steps=6")
    wait, signals = Checkpoints.wait, [signal.SIGTERM]

    def signalled(checkpoints):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return wait(checkpoints)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", signalled)
        with pytest.raises(Interrupted, match="stopped at step 6 and saved"):
            train(tiny, tmp_path / "stopped", "Run.steps=6")
    assert RunDirectory(tmp_path / "stopped").read_result() is None
    assert without_times(train(tiny, tmp_path / "stopped", "Run.steps=6")) == without_times(never)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 8])
def test_sigterm_where_validation_is_due_loses_no_validation(tiny, tmp_path, monkeypatch, step):
    bindings = ["Run.steps=8", "Run.evaluate_every=5"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted):
            train(tiny, tmp_path, *bindings)
    with monkeypatch.context() as patch:  # and again, at the first step after it has been made up for
        interrupt_at(patch, 1)
        if step < 8:
            with pytest.raises(Interrupted):
                train(tiny, tmp_path, *bindings)
            (tmp_path / "checkpoints" / str(step + 1)).rename(tmp_path / "gone")
    train(tiny, tmp_path, *bindings)
    assert {at for at, kind in losses(tmp_path) if kind == "validation_loss"} == {5, 8}


@pytest.mark.slow
def test_a_validation_that_a_crash_has_lost_is_made_up_for(tiny, tmp_path):
    """After a crash of the machine a checkpoint may be on the disk, and a line that was logged before it may not."""
    bindings = ["Run.steps=12", "Run.checkpoint_every=5", "Run.evaluate_every=5"]
    train(tiny, tmp_path, *bindings)
    expected = losses(tmp_path)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    log = tmp_path / "metrics.jsonl"
    kept = [line for line in lines(tmp_path) if line["step"] < 10 or (line["step"] == 10 and "loss" in line)]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    train(tiny, tmp_path, *bindings)
    assert losses(tmp_path) == expected
    assert [line["step"] for line in lines(tmp_path) if "validation_loss" in line] == [5, 10, 12]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_text(tiny, tmp_path, monkeypatch):
    corpus = write_text(tmp_path / "corpus.jsonl")
    bindings = ["Run.steps=8", "Run.checkpoint_every=2", f"local_files.path={str(corpus)!r}"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            train(tiny, tmp_path / "run", *bindings)
    write_text(corpus, seed=1)
    with pytest.raises(InputError, match="another text than 'corpus' is now"):
        train(tiny, tmp_path / "run", *bindings)
    write_text(corpus)
    assert train(tiny, tmp_path / "run", *bindings)["steps"] == 8


@pytest.mark.slow
def test_a_finished_run_is_not_taken_for_one_on_another_text(tiny, tmp_path):
    corpus = write_text(tmp_path / "corpus.jsonl")
    bindings = ["Run.steps=2", f"local_files.path={str(corpus)!r}"]
    result = train(tiny, tmp_path / "run", *bindings)
    write_text(corpus, seed=1)
    with pytest.raises(InputError, match=r"run has trained 2 steps on another text than 'corpus' is now"):
        train(tiny, tmp_path / "run", *bindings)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


@pytest.mark.slow
def test_a_run_goes_on_with_other_placement_and_bookkeeping(tiny, tmp_path, monkeypatch):
    """The same text elsewhere, another log, other intervals: config.gin stays as it was, and so do the numbers."""
    bindings = ["Run.steps=12", "Run.evaluate_every=5", "Run.checkpoint_every=4"]
    expected = train(tiny, tmp_path / "never", *bindings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            train(tiny, tmp_path / "run", *bindings)
    begun_with = (tmp_path / "run" / "config.gin").read_text()
    moved = tmp_path / "moved" / "corpus.jsonl"
    moved.parent.mkdir()
    shutil.copy(tiny.parent / "corpus.jsonl", moved)
    shutil.copytree(load(tiny, *bindings).task.cache_dir, tmp_path / "cache")
    others = [
        *("Run.log_every=3", "Run.evaluate_every=100", "Run.checkpoint_every=2", "Run.keep_checkpoints=4"),
        *(f"local_files.path={str(moved)!r}", f"TextTask.cache_dir={str(tmp_path / 'cache')!r}"),
    ]
    result = train(tiny, tmp_path / "run", "Run.steps=12", *others)
    assert (tmp_path / "run" / "config.gin").read_text() == begun_with
    assert without_times(result) == without_times(expected)
    assert saved_steps(tmp_path / "run") == [7, 8, 10, 12]
    run = load(tiny, *bindings)
    assert_same(leaves(tmp_path / "run", run), leaves(tmp_path / "never", run))
    logged, never = losses(tmp_path / "run"), losses(tmp_path / "never")
    assert {step for step, kind in logged if kind == "loss"} == {*range(1, 8), 9, 12}
    assert logged.items() <= never.items()


def test_a_run_that_was_changed_by_hand_is_not_the_one_of_its_config(tiny):
    run = load(tiny, "Run.steps=2")
    assert run.config.identity["Run.steps"] == "2"
    assert dataclasses.replace(run, steps=3).config is None
    assert dataclasses.replace(run) == run  # the config is no part of what a run is
    assert "config=" not in repr(run)


def test_a_directory_given_as_a_string(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop.train(load(tiny, "Run.steps=2"), "run", progress=False)["steps"] == 2
    assert restore_model(load(tiny, "Run.steps=2"), "run")[0] == 2


@pytest.mark.parametrize("address", ["s3://bucket/run", "http://host/run"])
def test_an_address_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    run = load(tiny, "Run.steps=2")
    for use in (lambda: loop.train(run, address, progress=False), lambda: restore_model(run, address)):
        with pytest.raises(InputError, match=f"{address} is an address"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_stopping_says_so_when_the_state_could_not_be_saved(tiny, tmp_path, monkeypatch):
    def fails(self, step, *args, **kwargs):
        return False

    monkeypatch.setattr(Checkpoints, "save", fails)
    interrupt_at(monkeypatch, 3)
    with pytest.raises((Interrupted, InputError)) as stopped:
        train(tiny, tmp_path, "Run.steps=8")
    assert "and saved" not in str(stopped.value)


def test_killed_between_the_last_checkpoint_and_the_result(tiny, tmp_path):
    first = train(tiny, tmp_path, "Run.steps=4")
    before = losses(tmp_path)
    (tmp_path / "result.json").unlink()
    again = train(tiny, tmp_path, "Run.steps=4")
    assert without_times(again) == without_times(first)
    assert losses(tmp_path) == before


def test_finished_run_is_not_trained_again(tiny, tmp_path, monkeypatch):
    result = train(tiny, tmp_path, "Run.steps=4")
    monkeypatch.setattr(Trainer, "step", None)
    monkeypatch.setattr(Trainer, "init", None)
    assert train(tiny, tmp_path, "Run.steps=4") == result


def test_another_config_is_refused_by_name_and_values(tiny, tmp_path):
    train(tiny, tmp_path, "Run.steps=4")
    with pytest.raises(InputError, match=r"AdamW\.learning_rate = 0\.01, now it is 0\.5"):
        train(tiny, tmp_path, "Run.steps=4", "AdamW.learning_rate=0.5")
    with pytest.raises(InputError, match=r"Run\.steps = 4, now it is 5"):
        train(tiny, tmp_path, "Run.steps=5")


def test_a_changed_default_of_a_layer_is_part_of_the_config(tiny, tmp_path):
    """config.gin has every default that the run used, so that it means the same when a default changes later."""
    train(tiny, tmp_path, "Run.steps=1", layer="peer")
    kept = (tmp_path / "config.gin").read_text()
    for name in ("PEER.score_activation", "PEER.share_sub_keys", "Transformer.tie_embeddings", "Dense.activation"):
        assert f"{name} =" in kept


def test_second_process_is_kept_out(tiny, tmp_path):
    run = load(tiny, "Run.steps=4")
    with ownership.owned(RunDirectory(tmp_path)), pytest.raises(InputError, match="in use by another process"):
        loop.train(run, tmp_path, progress=False)
    loop.train(run, tmp_path, progress=False)


# What training imports, and what it leaves


@pytest.mark.slow
def test_training_never_imports_tensorflow(tiny, tmp_path):
    program = """
import sys
from peer_jax import config
from peer_jax.training.loop import train
*files, folder = sys.argv[1:]
train(config.load(files, ["Run.steps=2"]), __import__("pathlib").Path(folder), progress=False)
heavy = {"tensorflow", "seqio", "tensorflow_datasets", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", program, *map(str, stack(tiny)), str(tmp_path / "run")],
        env=environment(),
        check=True,
        timeout=120,
    )
    assert (tmp_path / "run" / "result.json").exists()


def test_restored_model_is_that_of_the_step(tiny, tmp_path):
    bindings = ["Run.steps=4", "Run.checkpoint_every=2", "Run.evaluate_every=2"]
    train(tiny, tmp_path, *bindings)
    run = load(tiny, *bindings)
    assert restore_model(run, tmp_path)[0] == 4
    assert restore_model(run, tmp_path, "2")[0] == 2
    for wrong in ("3", "newest", "-1"):
        with pytest.raises(InputError, match=rf"checkpoint '{wrong}'.*\[2, 4\]"):
            restore_model(run, tmp_path, wrong)
