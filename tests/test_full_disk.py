"""A disk that is full for a while or stays full: what was saved is kept, and a message says what was not."""

import subprocess
import time

import pytest
from small_runs import load, losses, train

from peer_jax.errors import InputError
from peer_jax.training import loop
from peer_jax.training.checkpoint import Checkpoints

# Orbax leaves the writes that have failed to themselves, and Python complains of them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("trains"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts small file systems, which are unmounted after the test."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small tmpfs takes root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, checkpoint):
    """Takes all the space that is left, once a checkpoint is written."""
    while not checkpoint.is_dir():
        time.sleep(0.001)
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def at_batch(monkeypatch, actions):
    """Calls actions[step] while the batch of that step is fetched."""
    make = loop.train_batches

    def make_acting(*args, **kwargs):
        batches = make(*args, **kwargs)

        class Acting:
            fetched = 0

            def __next__(self):
                self.fetched += 1
                actions.get(self.fetched, lambda: None)()
                return next(batches)

            def __getattr__(self, name):
                return getattr(batches, name)

        return Acting()

    monkeypatch.setattr(loop, "train_batches", make_acting)


def test_disk_that_is_full_for_a_while(tiny, tmp_path, monkeypatch, small_disk, caplog):
    """Checkpoint 6 fails; training goes on with a warning, 3 stays whole, 9 and 12 are written."""
    disk = small_disk(tmp_path / "run" / "checkpoints", "4m")
    seen = []
    actions = {
        5: lambda: fill(disk, disk / "3"),
        8: lambda: (disk / "filler").unlink(),
        9: lambda: seen.append(sorted(path.name for path in disk.iterdir() if path.name.isdigit())),
    }
    at_batch(monkeypatch, actions)
    train(tiny, tmp_path / "run", "Run.steps=12", "Run.checkpoint_every=3")
    assert "could not be written" in caplog.text
    assert seen == [["3"]]
    assert {"9", "12"} <= {path.name for path in disk.iterdir()}
    (tmp_path / "whole").mkdir()
    monkeypatch.undo()
    train(tiny, tmp_path / "whole", "Run.steps=12", "Run.checkpoint_every=3")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_disk_that_stays_full(tiny, tmp_path, monkeypatch, small_disk):
    disk = small_disk(tmp_path / "run" / "checkpoints", "4m")
    at_batch(monkeypatch, {5: lambda: fill(disk, disk / "3")})
    with pytest.raises(InputError, match="the last checkpoint could not be written to"):
        train(tiny, tmp_path / "run", "Run.steps=12", "Run.checkpoint_every=3")
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.undo()
    (disk / "filler").unlink()
    step, _, _ = Checkpoints(disk, read_only=True).restore(load(tiny, "Run.steps=12").trainer().abstract_state())
    assert step == 3
    train(tiny, tmp_path / "run", "Run.steps=12", "Run.checkpoint_every=3")  # goes on from there


@pytest.mark.timeout(60)
def test_whole_run_directory_is_full(tiny, tmp_path, monkeypatch, small_disk):
    """Metrics can't be written either: one sentence, not a traceback."""
    disk = small_disk(tmp_path / "run", "4m")
    at_batch(monkeypatch, {5: lambda: fill(disk, disk / "checkpoints" / "3")})
    with pytest.raises(InputError, match=str(disk)):
        train(tiny, disk, "Run.steps=12", "Run.checkpoint_every=3")
