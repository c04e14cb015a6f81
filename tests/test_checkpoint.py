"""Checkpoints: killed processes, damaged files. What is restored was saved, or a message says so."""

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import (
    KEEPS_NO_PROGRAMS,
    arrays,
    assert_same,
    environment,
    leaves,
    lines,
    load,
    losses,
    stack,
    train,
    without_times,
)

from peer_jax.errors import InputError
from peer_jax.training import loop
from peer_jax.training.checkpoint import Checkpoints
from peer_jax.training.restore import restore_model

SIZE = 1000

# Where reading a file fails, Orbax leaves the reads of the others unfinished, and Python complains of them.
pytestmark = [
    pytest.mark.usefixtures("trains"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


# Processes that are killed

STEPS = 150
BINDINGS = ("Transformer.num_blocks=1", f"Run.steps={STEPS}", "Run.checkpoint_every=15", "Run.evaluate_every=50")


def start(tiny, folder, **variables):
    command = [sys.executable, "-m", "peer_jax", "train", "--quiet", "--workdir", str(folder)]
    command += [f"--config={file}" for file in stack(tiny, "peer")] + [f"--set={binding}" for binding in BINDINGS]
    return subprocess.Popen(
        command, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def signal_when(process, condition, number):
    """Sends a signal as soon as a condition holds; returns what the process wrote to standard error."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0005)
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def being_written(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


@pytest.mark.slow
def test_killed_processes_end_as_one_that_never_was(tiny, tmp_path):
    never, killed = tmp_path / "never", tmp_path / "killed"
    finish(start(tiny, never))

    moments = (
        (lambda: (killed / "config.gin").exists(), signal.SIGKILL),  # nothing is trained yet
        (lambda: logged(killed) >= 10 and being_written(killed), signal.SIGKILL),
        (lambda: logged(killed) >= 85, signal.SIGKILL),
        (lambda: logged(killed) >= 115, signal.SIGTERM),
    )
    for condition, number in moments:
        process = start(tiny, killed, **KEEPS_NO_PROGRAMS)
        errors = signal_when(process, condition, number)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], errors
        assert not (killed / "result.json").exists()
    stopped = lines(killed)[-1]["step"]
    assert errors == f"peer-jax: stopped at step {stopped} and saved; the same command resumes\n"
    assert (killed / "checkpoints" / str(stopped)).is_dir()

    finish(start(tiny, killed))
    assert losses(killed) == losses(never)  # and none twice
    run = load(tiny, *BINDINGS, layer="peer")
    assert_same(leaves(killed, run), leaves(never, run))
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, never)]
    assert without_times(results[0]) == without_times(results[1])
    assert [path.name for path in (killed / "checkpoints").glob("*") if not path.name.isdigit()] == []


# What is saved


def state_of(seed):
    """Something like a TrainState: nested, of several types."""
    draw = np.random.default_rng(seed)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "params": {"table": jnp.asarray(draw.normal(size=(SIZE, 8)), jnp.float32), "bias": jnp.zeros(3) + seed},
        "others": {"half": jnp.asarray(draw.normal(size=5), jnp.bfloat16)},
    }


ABSTRACT = jax.eval_shape(lambda: state_of(0))


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (1, 2, 3):
        assert checkpoints.save(step, state_of(step), {"next": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        return checkpoints.restore(ABSTRACT)
    finally:
        checkpoints.close()


def test_restored_is_what_was_saved(saved):
    step, state, data = restore(saved)
    assert (step, data) == (3, {"next": 3})
    assert_same(arrays(state), arrays(state_of(3)))


def test_random_streams_are_restored(tmp_path):
    """The noise of MoE's router is drawn from a random stream in the state."""
    state = {"key": jax.random.key(5), "count": jnp.asarray(7, jnp.uint32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    assert_same(arrays(restored), arrays(state))


def test_an_error_closes_checkpoints_and_is_not_hidden(tmp_path):
    def fail(checkpoints):
        with checkpoints:
            checkpoints.save(1, state_of(1), {})
            raise KeyError("mine")

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyError, match="mine"):
        fail(checkpoints)
    checkpoints.close()  # once more does nothing
    assert restore(tmp_path)[0] == 1


def test_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_saving_goes_on_beside_steps_that_donate_the_state(tmp_path):
    @jax.jit
    def init():
        return {f"table_{i}": jax.random.normal(jax.random.key(i), (500, 500)) for i in range(8)}

    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.5 + 1, state), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, keep_last=3), init()
    for _ in range(3):
        state = step(state)
    at_save = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints.save(3, state, {})
    for _ in range(50):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    _, restored, _ = checkpoints.restore(jax.eval_shape(init), 3)
    checkpoints.close()
    for name in at_save:
        np.testing.assert_array_equal(restored[name], at_save[name])


def test_last_ones_and_the_best_remain(tmp_path):
    validation = {1: 5.0, 2: 1.0, 3: 3.0, 4: None, 5: 2.0, 6: 4.0, 7: None}
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    remaining = {}
    for step, loss in validation.items():
        checkpoints.save(step, state_of(step), {}, loss)
        checkpoints.wait()
        remaining[step] = checkpoints.steps()
    checkpoints.close()
    assert remaining == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [2, 6, 7]}
    again = Checkpoints(tmp_path, keep_last=2)
    assert again.steps() == [2, 6, 7]
    assert again.best_step() == 2
    again.save(8, state_of(8), {}, 0.5)  # the new best; that of another process goes
    again.wait()
    assert again.steps() == [7, 8]
    assert again.best_step() == 8
    again.close()


def test_best_is_the_last_where_none_was_measured(saved):
    checkpoints = Checkpoints(saved, read_only=True)
    assert checkpoints.best_step() == 3
    checkpoints.close()


def test_saving_a_step_again_changes_nothing(saved):
    checkpoints = Checkpoints(saved, keep_last=3)
    assert checkpoints.save(3, state_of(9), {})
    assert_same(arrays(checkpoints.restore(ABSTRACT, 3)[1]), arrays(state_of(3)))
    checkpoints.close()


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, zero, flip, empty, delete])
def test_damaged_file_is_noticed_or_harmless(saved, tmp_path, caplog, damage):
    """Damages each file of the newest checkpoint: what is restored is whole, and going back a step is reported."""
    files = [path.relative_to(saved) for path in sorted((saved / "3").rglob("*")) if path.is_file()]
    assert len(files) > 5
    wrong = []
    for file in files:
        folder = tmp_path / "copy"
        shutil.copytree(saved, folder)
        damage(folder / file)
        caplog.clear()
        try:
            step, state, data = restore(folder)
        except InputError as error:
            wrong.append(f"{file}: {error}")
        else:
            expected, found = arrays(state_of(step)), arrays(state)
            differing = [name for name in expected if not np.array_equal(expected[name], found[name])]
            if differing or data != {"next": step}:
                wrong.append(f"{file}: step {step} restored with other values: {differing}, {data}")
            # Without the marker of having been finished it is a checkpoint that was never made, as after a kill.
            if step != 3 and "checkpoint of step 3" not in caplog.text and file.name != "commit_success.txt":
                wrong.append(f"{file}: fell back to {step} in silence")
        shutil.rmtree(folder)
    assert wrong == []


def test_fallback_is_reported_and_training_saves_the_step_again(saved, caplog):
    shutil.rmtree(saved / "3" / "state")
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(saved, keep_last=3)
        step, state, data = checkpoints.restore(ABSTRACT)
    assert (step, data) == (2, {"next": 2})
    assert_same(arrays(state), arrays(state_of(2)))
    assert "the checkpoint of step 3 can't be read" in caplog.text
    assert checkpoints.save(3, state_of(3), {"next": 3})
    checkpoints.close()
    assert restore(saved)[0] == 3


def test_foreign_folder_named_like_a_step(saved, caplog):
    (saved / "999").mkdir()
    (saved / "999" / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(saved, keep_last=3)
    step, state, _ = checkpoints.restore(ABSTRACT)
    assert step == 3
    assert_same(arrays(state), arrays(state_of(3)))
    assert "999" in caplog.text
    assert checkpoints.save(4, state_of(4), {})
    checkpoints.close()
    assert restore(saved)[0] == 4
    assert [path.read_text() for path in saved.rglob("notes.txt")] == ["mine"]


def test_foreign_files_are_let_be(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "old").mkdir()
    assert restore(saved)[0] == 3
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "old").is_dir()


def damage_all(saved):
    for path in saved.rglob("*"):
        if path.is_file() and "ocdbt" in str(path):
            truncate(path)


def test_all_damaged_is_refused(saved):
    damage_all(saved)
    with pytest.raises(InputError, match=r"no checkpoint of steps \[3, 2, 1\] in .* can be read"):
        restore(saved)


def test_all_damaged_is_refused_the_second_time_too(saved):
    """Otherwise the same command would begin again at step 1 and overwrite the metrics of the run that was lost."""
    damage_all(saved)
    for _ in range(2):
        with pytest.raises(InputError):
            restore(saved)


def test_reading_only_changes_nothing(saved):
    """`evaluate` and `generate` look at the folder of a run that may be training."""
    truncate(next((saved / "3").rglob("manifest.ocdbt")))
    shutil.rmtree(saved / "3" / "state" / "d")
    before = sorted(path.name for path in saved.iterdir())
    assert restore(saved, read_only=True)[0] == 2
    assert sorted(path.name for path in saved.iterdir()) == before


def test_a_checkpoint_without_digests_is_read_with_a_note(saved, caplog):
    """Earlier versions wrote none."""
    for path in saved.glob("*/digests.json"):
        path.unlink()
    step, state, _ = restore(saved)
    assert step == 3
    assert_same(arrays(state), arrays(state_of(3)))
    assert caplog.text.count("the checkpoint of step 3 is of an earlier version, which wrote no digests") == 1


def test_digests_cover_every_file(saved):
    for folder in (saved / "1", saved / "3"):
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        digests = json.loads((folder / "digests.json").read_text())
        assert files - digests.keys() == {"digests.json", "_CHECKPOINT_METADATA", "commit_success.txt"}


LOSS_DAMAGES = {
    "empty": empty,
    "no JSON": lambda path: path.write_text("{"),
    "another loss": lambda path: path.write_text(path.read_text().replace("2.0", "0.5")),
    "a list": lambda path: path.write_text("[2.0]"),
    "NaN": lambda path: path.write_text('{"validation_loss": NaN}'),
    "gone": delete,
}


@pytest.mark.parametrize("damage", LOSS_DAMAGES)
@pytest.mark.parametrize("digests", ["with digests", "without digests"])
def test_a_damaged_validation_loss(tmp_path, caplog, damage, digests):
    """It neither makes a checkpoint the best one nor ends a run, whether it is in the newest checkpoint or not."""
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step, loss in {1: 3.0, 2: 2.0, 3: 4.0}.items():
            checkpoints.save(step, state_of(step), {}, loss)
    if digests == "without digests":
        for path in tmp_path.glob("*/digests.json"):
            path.unlink()
    LOSS_DAMAGES[damage](tmp_path / "2" / "metrics" / "metrics")
    unnoticed = digests == "without digests" and damage in ("another loss", "gone")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best_step() == (2 if unnoticed and damage != "gone" else 1)
        assert checkpoints.restore(ABSTRACT)[0] == 3
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        assert checkpoints.restore(ABSTRACT)[0] == 3
        assert checkpoints.save(4, state_of(4), {}, 5.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"1", "2", "3", "4"} if unnoticed else {"1", "damaged-2", "3", "4"})
    assert ("the checkpoint of step 2 can't be read" in caplog.text) != unnoticed


def test_checkpoints_that_are_a_file(tiny, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(InputError, match=r"checkpoints can't be made \(File exists\): choose another folder"):
        train(tiny, tmp_path, "Run.steps=2")
    with pytest.raises(InputError, match="has no checkpoints: give the directory of a run"):
        restore_model(load(tiny), tmp_path)


@pytest.mark.slow
def test_reading_beside_a_run_that_saves(tmp_path, caplog, capfd):
    """Checkpoints are removed while they are looked for, checked and read; whatever is found is whole."""
    ended = threading.Event()
    first = Checkpoints(tmp_path, keep_last=1)
    first.save(1, state_of(1), {"next": 1}, 1.0)
    first.wait()

    def save() -> None:
        for step in range(2, 60):
            first.save(step, state_of(step), {"next": step}, 1 / step)
        first.close()
        ended.set()

    saving = threading.Thread(target=save)
    saving.start()
    found = []
    while not ended.is_set():
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            step, state, data = checkpoints.restore(ABSTRACT)
            assert data == {"next": step}
            assert_same(arrays(state), arrays(state_of(step)))
            found.append(step)
    saving.join()
    assert found == sorted(found)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("peer_jax")] == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"].update(bias=jnp.zeros(4)), r"params/bias of shape \(3,\), but the config gives \(4,\)"),
        (lambda s: s["params"].update(gate=jnp.zeros(4)), r"params/gate of shape none, but the config gives \(4,\)"),
        (lambda s: s["params"].pop("bias"), r"params/bias of shape \(3,\), but the config gives none"),
    ],
)
def test_other_shapes_are_refused_by_name(saved, change, message):
    state = state_of(0)
    change(state)
    checkpoints = Checkpoints(saved)
    with pytest.raises(InputError, match=message):
        checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    assert restore(saved)[0] == 3


def test_run_of_other_shapes_names_the_parameter(tiny, tmp_path):
    """A run that was made by hand has no config, so the error names the parameter and not the config's argument."""
    train(tiny, tmp_path, "Run.steps=2")
    (tmp_path / "result.json").unlink()
    wider = load(tiny, "Run.steps=2", "Transformer.d_model=32")
    with pytest.raises(InputError, match=r"params/blocks/0/.* of shape .*16.*, but the config gives .*32"):
        loop.train(dataclasses.replace(wider), tmp_path, progress=False)
    with pytest.raises(InputError, match=r"holds a run with Transformer\.d_model = 16, now it is 32"):
        loop.train(wider, tmp_path, progress=False)
