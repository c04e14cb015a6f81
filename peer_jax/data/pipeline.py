"""Reads batches of packed rows from a prepared cache with Grain; never imports TensorFlow or seqio.

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
from typing import TypedDict

import cloudpickle
import grain
import numpy as np
from jaxtyping import Int32

from peer_jax.data.cache import PackedText, open_cache, publish
from peer_jax.data.text_task import TextTask
from peer_jax.data.vocabulary import decode, encode, vocabulary_size
from peer_jax.errors import InputError

__all__ = [
    "START_ID",
    "Batch",
    "PackedText",
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

START_ID = 0  # the input at the start of each document, where there is no token before; seqio takes padding's id


class Batch(TypedDict):
    """b rows of T tokens. A position counts in the loss if its `segment_ids` is above 0; 0 is padding."""

    inputs: Int32[np.ndarray, "b T"]
    targets: Int32[np.ndarray, "b T"]
    segment_ids: Int32[np.ndarray, "b T"]


def train_batches(
    source: PackedText, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
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
            f"batch_size {batch_size} is more than the {source.rows} rows of {source.seq_len} tokens in "
            f"{source.path.name}/{source.split}; give more text, a smaller batch_size or a smaller seq_len."
        )
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; give a whole number from 0 to 2**32 - 1.")
    order = grain.MapDataset.range(source.rows).seed(seed).shuffle().repeat()

    def rows(start: int, stop: int) -> list[int]:
        return [int(order[position]) for position in range(start, stop)]

    steps = _Steps(source, rows, sys.maxsize, batch_size, process_index, process_count)
    read_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(read_ahead))


def eval_batches(
    source: PackedText, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Sequence[Batch]:
    """A sequence of `Batch`es with every row once, in order.

    The last batch is filled up with rows whose `segment_ids` are all 0, on every host alike, so all batches have the
    same shape and all hosts make the same number of steps.
    """

    def rows(start: int, stop: int) -> range:
        return range(start, min(stop, source.rows))

    return _Steps(source, rows, source.rows, batch_size, process_index, process_count)


def shift_right(targets: Int32[np.ndarray, "b T"], segment_ids: Int32[np.ndarray, "b T"]) -> Int32[np.ndarray, "b T"]:
    """The inputs that predict `targets`: the token before, and `START_ID` at the start of a segment, as in seqio."""
    inputs = np.full_like(targets, START_ID)
    inputs[:, 1:] = np.where(segment_ids[:, 1:] == segment_ids[:, :-1], targets[:, :-1], START_ID)
    return inputs


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
        taken = self._source.take(self._rows(start, start + self._share))
        missing = ((0, self._share - len(taken["tokens"])), (0, 0))
        targets, segment_ids = np.pad(taken["tokens"], missing), np.pad(taken["segment_ids"], missing)
        return Batch(inputs=shift_right(targets, segment_ids), targets=targets, segment_ids=segment_ids)

    def __repr__(self) -> str:
        return f"batches of {self._share} rows of {self._source!r}"


def preparing_command() -> list[str]:
    """Starts the process that prepares a text; the paths of its request and its answer follow, see `tasks.main`."""
    return [sys.executable, "-P", "-m", "peer_jax.data.tasks"]


def ensure_prepared(task: TextTask, *, progress: bool = True) -> Path:
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


def _prepare(task: TextTask, progress: bool) -> None:
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


def _pickled(task: TextTask, progress: bool) -> bytes:
    """A request for the process that prepares; a class that a script or a notebook defines is sent as code."""
    try:
        return cloudpickle.dumps((task, progress))
    except Exception as error:  # whatever the objects of a user's corpus raise
        raise InputError(
            f"corpus {task.corpus.name!r} can't be sent to the process that prepares it ({error}): keep paths in it "
            "and open them in documents(), or call peer_jax.data.tasks.prepare(task) first."
        ) from error
