"""Reads batches of rows from a prepared cache with Grain; never imports TensorFlow or seqio.

The order of rows depends on seed and step alone: hosts take consecutive parts of each global batch.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cloudpickle
import grain

from peer_jax.data.cache import open_cache, publish
from peer_jax.data.image_task import ImageTask
from peer_jax.data.rows import START_ID, Batch, PackedText, Rows, shift_right
from peer_jax.data.task import Task
from peer_jax.data.text_task import TextTask
from peer_jax.data.vocabulary import decode, encode, vocabulary_size
from peer_jax.errors import InputError

__all__ = [
    "START_ID",
    "Batch",
    "ImageTask",
    "PackedText",
    "Rows",
    "Task",
    "TextTask",
    "decode",
    "encode",
    "ensure_prepared",
    "eval_batches",
    "open_cache",
    "shift_right",
    "train_batches",
    "vocabulary_size",
]


def train_batches(
    source: Rows, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """An endless iterator of `Batch`es, shuffled over the whole split anew each epoch and read ahead in a thread.

    Step s takes positions [s * batch_size, (s + 1) * batch_size) of the endless sequence of shuffled epochs, so every
    row comes once per epoch and a batch may straddle two epochs. `get_state()` is `{"next_index": step}`, whatever the
    number of hosts; `set_state` continues there.

    Args:
        source: the split to read.
        batch_size: rows per step of all hosts together; this host gets `batch_size / process_count` of them.
        seed: of the order of rows.
        process_index, process_count: which host this is, and how many there are.

    Raises:
        InputError: if there are fewer rows than `batch_size`, or a size doesn't divide by the number of hosts.
    """
    if source.rows < batch_size:
        raise InputError(
            f"batch_size {batch_size} is more than the {source.described} in {source.path.name}/{source.split}; "
            f"{source.more}."
        )
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; give a whole number from 0 to 2**32 - 1.")
    order = grain.MapDataset.range(source.rows).seed(seed).shuffle().repeat()

    def rows(start: int, stop: int) -> list[int]:
        return [int(order[position]) for position in range(start, stop)]

    steps = _Steps(source, rows, sys.maxsize, batch_size, process_index, process_count)
    read_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(read_ahead))


def eval_batches(source: Rows, *, batch_size: int, process_index: int = 0, process_count: int = 1) -> Sequence[Batch]:
    """A sequence of `Batch`es with every row once, in order.

    The last batch is filled up with rows whose `segment_ids` are all 0, on every host alike, so all batches have the
    same shape and all hosts make the same number of steps.
    """

    def rows(start: int, stop: int) -> range:
        return range(start, min(stop, source.rows))

    return _Steps(source, rows, source.rows, batch_size, process_index, process_count)


class _Steps(Sequence):
    """The sequence of batches by step, a random-access source that Grain reads ahead from."""

    def __init__(
        self, source, rows: Callable[[int, int], Sequence[int]], positions, batch_size, process_index, process_count
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("process_count", process_count, 1)):
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {value!r}; give a whole number of at least {least}.")
        if batch_size % process_count:
            raise InputError(f"batch_size {batch_size} does not divide by {process_count} hosts; make it a multiple.")
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index is {process_index} with {process_count} hosts; count from 0.")
        self._source, self._rows, self._batch_size = source, rows, batch_size
        self._steps = -(-positions // batch_size)
        self._share = batch_size // process_count
        self._offset = process_index * self._share

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step) -> Batch:
        start = range(self._steps)[step] * self._batch_size + self._offset
        return self._source.batch(self._rows(start, start + self._share), self._share)

    def __repr__(self) -> str:
        return f"batches of {self._share} rows of {self._source!r}"


def preparing_command() -> list[str]:
    """Starts the process that prepares a task; the paths of its request and its answer follow, see `tasks.main`."""
    return [sys.executable, "-P", "-m", "peer_jax.data.tasks"]


def ensure_prepared(task: Task, *, progress: bool = True) -> Path:
    """The path of the task's cache, which is prepared if it isn't there yet, or if it is damaged.

    Another process prepares it, so that this one never imports TensorFlow, and shows a progress bar on stderr.

    Raises:
        InputError: if the corpus, the vocabulary or the cache can't be used, or the process was killed.
    """
    if not task.is_prepared():
        _prepare(task, progress)
    path = task.cache_path()
    if (shared := task.shared_path()) is not None:
        publish(path, shared)
    return path


def _prepare(task: Task, progress: bool) -> None:
    """Prepares the task's cache in another process."""
    name = task.cache_path().name
    with tempfile.TemporaryDirectory(prefix="peer_jax-prepare-") as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        request.write_bytes(_pickled(task, progress))
        search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.run(
            [*preparing_command(), str(request), str(answer)],
            env={**os.environ, "PYTHONPATH": search},
            check=False,
        )
        result = json.loads(answer.read_text()) if answer.exists() else {}
    if "error" in result:
        raise InputError.heard(result["error"])
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise InputError(f"preparing {name} was ended by {name}; if memory ran out, set a lower max_train_tokens.")
    if process.returncode or "path" not in result:
        raise RuntimeError(f"preparing {name} failed with status {process.returncode}; its traceback is above")


def _pickled(task: Task, progress: bool) -> bytes:
    """A request for the process that prepares; a class that a script or a notebook defines is sent as code."""
    try:
        return cloudpickle.dumps((task, progress))
    except Exception as error:  # whatever the objects of a user's corpus raise
        raise InputError(
            f"corpus {task.corpus.name!r} can't be sent to the process that prepares it ({error}): keep paths in it "
            "and open them when they are read, or call peer_jax.data.tasks.prepare(task) first."
        ) from error
