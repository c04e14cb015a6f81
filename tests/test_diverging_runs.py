"""Runs whose loss or parameters are not finite: they end with the step, and every checkpoint stays finite."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_runs import leaves, lines, load, saved_steps, train

from peer_jax.errors import InputError, TrainingFailed
from peer_jax.training.step import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trains")]


def test_diverging_run_stops_with_the_step_and_a_finite_checkpoint(tiny, tmp_path):
    bindings = ["Run.steps=20", "Run.checkpoint_every=1", "AdamW.learning_rate=1e16", "AdamW.warmup_steps=3"]
    with pytest.raises(TrainingFailed, match=r"step (\d+) has loss .* learning rate") as failed:
        train(tiny, tmp_path, *bindings)
    steps = saved_steps(tmp_path)
    assert steps
    assert f"the last good checkpoint is that of step {steps[-1]}" in str(failed.value)
    for name, value in leaves(tmp_path, load(tiny, *bindings)).items():
        assert np.isfinite(value).all(), name
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path) if "loss" in line)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_update_that_is_not_finite_is_never_saved(tiny, tmp_path):
    """A rate beyond float32 makes the parameters infinite while loss and gradient of that step are still finite."""
    bindings = ["Run.steps=20", "Run.checkpoint_every=1", "AdamW.learning_rate=1e39", "AdamW.warmup_steps=0"]
    with pytest.raises(TrainingFailed, match="step 1 "):
        train(tiny, tmp_path, *bindings)
    assert saved_steps(tmp_path) == []


def test_failure_before_any_checkpoint_says_that_there_is_none(tiny, tmp_path):
    with pytest.raises(TrainingFailed, match="there is no checkpoint yet"):
        train(tiny, tmp_path, "Run.steps=20", "AdamW.learning_rate=1e30", "AdamW.warmup_steps=0")


def test_checked_run_names_the_op_that_meets_nan(tiny, tmp_path, monkeypatch):
    make = Trainer.init

    def corrupted(self, seed):
        state = make(self, seed)
        keys = state.params["blocks"][1]["ffw"]["sub_keys"]
        keys.set_value(keys.get_value().at[0, 3].set(np.nan))
        return state

    monkeypatch.setattr(Trainer, "init", corrupted)
    with pytest.raises(InputError, match=r"product_key_top_k.* NaN"):
        train(tiny, tmp_path / "checked", "Run.steps=2", "Run.checked=True", layer="peer")
    with pytest.raises(TrainingFailed, match=r"step 1 has loss nan.*Run\.checked=True"):
        train(tiny, tmp_path / "unchecked", "Run.steps=2", layer="peer")


def test_after_a_loss_that_is_not_finite_a_checked_run_goes_on_in_the_same_directory(tiny, tmp_path, monkeypatch):
    """As the message of the failed run advises."""
    step = Trainer.step

    def poisoned(self, state, batch, rates):
        def poison(path, value):
            at_fault = "sub_keys" in jax.tree_util.keystr(path)
            return jnp.where(state.step == 4, jnp.nan, value).astype(value.dtype) if at_fault else value

        return step(self, state._replace(params=jax.tree_util.tree_map_with_path(poison, state.params)), batch, rates)

    bindings = ["Run.steps=8", "Run.checkpoint_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", poisoned)
        with pytest.raises(TrainingFailed, match=r"step 5 has loss nan.*checkpoint is that of step 4.*checked=True"):
            train(tiny, tmp_path, *bindings, layer="peer")
        with pytest.raises(InputError, match=r"product_key_top_k.* NaN"):
            train(tiny, tmp_path, *bindings, "Run.checked=True", layer="peer")
    assert saved_steps(tmp_path) == [2, 4]
    assert train(tiny, tmp_path, *bindings, layer="peer")["steps"] == 8


def test_failed_runs_let_go_of_their_checkpoints(tiny, tmp_path):
    """A worker of a sweep trains one run after another."""
    diverging = ["Run.steps=20", "Run.checkpoint_every=1", "AdamW.learning_rate=1e16", "AdamW.warmup_steps=3"]

    def fail(name):
        with pytest.raises(TrainingFailed):
            train(tiny, tmp_path / name, *diverging)

    fail("first")  # what JAX and Orbax start once per process, it has started
    gc.collect()
    before = threading.active_count()
    closed, close = [], ocp.CheckpointManager.close

    def counted(self):
        closed.append(self.directory)
        return close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "close", counted)
        for name in ("second", "third", "fourth"):
            fail(name)
    assert [path.parent.name for path in closed] == ["second", "third", "fourth"]
    gc.collect()
    assert threading.active_count() <= before + 1
