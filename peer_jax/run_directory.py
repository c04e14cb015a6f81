"""The files of runs and of sweeps: their names, how they are written, locked, appended to, listed and read.

A run directory has ``config.gin``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and ``result.json``, and a
copy of its SentencePiece model if it has one. The directory of a run that belongs to a sweep also has ``point.json``,
and ``failure.json`` while the last attempt has failed. A sweep directory has a folder per run, ``sweep-<digest>.json``
per sweep that was run in it, ``results.csv`` and the logs of worker processes.

No other file knows these names. A directory may be in a bucket: ``storage`` and ``lease`` know how it differs from a
folder.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from etils import epath

from peer_jax import lease, records, storage
from peer_jax.errors import InputError, InUse, TryAgain
from peer_jax.storage import is_in_bucket, make_folder, place, set_aside, whole_lines, write_whole

CONFIG = "config.gin"
RESULT = "result.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
VOCABULARY = "vocabulary-{}.model"
POINT = "point.json"
FAILURE = "failure.json"
RESULTS = "results.csv"
LOCK = ".lock"
LEASE = ".lease"
SWEEP_FILES = ("sweep-*.json", "sweep.json")  # the second name is that of earlier versions, which kept one sweep

SCHEMA = 1


def _read(path: epath.Path, record: type[records.Record]) -> dict[str, Any] | None:
    """The record in a JSON file; None if there is no file.

    Raises:
        InputError: if it can't be read, or is no such record.
    """
    try:
        content = storage.read(path)
        return None if content is None else records.parse(content.decode(), record, path)
    except (OSError, UnicodeDecodeError) as error:
        raise storage.refusal(error, f"{path} can't be read ({error}): mend it, or remove it") from error


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2, default=str) + "\n")


class _Directory:
    """A folder, local or in a bucket, as a path-like object.

    Args:
        path: of the folder, which need not exist yet.

    Raises:
        InputError: for an address of something else, or of a bucket that can't be used.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = place(path, "workdir")

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)


class RunDirectory(_Directory):
    """The directory of a run."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name or self.path.resolve().name

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the checkpoints, which Orbax fills."""
        return self.path / CHECKPOINTS

    # Ownership.

    def lock(self, *, timeout: float = 0, stale: float = lease.STALE) -> lease.Held:
        """Makes the directory and takes its lease, which keeps other processes from training in it.

        The caller releases what is returned. If its ``lost`` becomes true, another process has the run by now.

        A process of the same machine that has died is noticed at once, in a folder by a lock of the kernel's. A process
        of another machine has died if it has not renewed its lease for ``stale`` seconds, see ``lease.hold``.

        Args:
            timeout: seconds to wait for another process to release the directory.
            stale: seconds without a sign of life after which a process of another machine has died.

        Raises:
            InUse: if another process has the directory; it names the process.
            InputError: if the directory can't be made or written to.
        """
        until = time.monotonic() + timeout
        with contextlib.ExitStack() as undo:
            try:
                has_died = lease.is_gone
                if not is_in_bucket(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    lock = filelock.FileLock(self.path / LOCK, timeout=timeout)
                    lock.acquire()
                    undo.callback(lock.release)
                    has_died = lease.is_here
                left = max(0.0, until - time.monotonic())
                with storage.as_os_errors(self.path):
                    held = lease.hold(self._lease, timeout=left, stale=stale, has_died=has_died)
            except (filelock.Timeout, InUse):
                holder = self.holder() or "it has not said which"
                raise InUse(
                    f"{self} is in use by another process ({holder}): wait for it, or choose another directory",
                    argument="workdir",
                ) from None
            except OSError as error:
                sentence = f"{self} can't be written to ({storage.reason(error)}): choose another directory"
                raise storage.refusal(error, sentence, "workdir") from error
            return held.then(undo.pop_all().close)

    def holder(self) -> lease.Holder | None:
        """The process that trains in the directory, or that did when it died; None if nobody does."""
        found = self._lease.read()
        return None if found is None or lease.is_gone(found) else found.holder

    @property
    def _lease(self) -> lease.Place:
        return (lease.Bucket if is_in_bucket(self.path) else lease.Folder)(self.path / LEASE)

    def leave_mark(self, mark: str) -> None:
        """Leaves an empty file that another process on the same file system can see; ``remove_mark`` removes it.

        Raises:
            InputError: if it can't be written.
        """
        write_whole(self._mark(mark), b"")

    def has_mark(self, mark: str) -> bool:
        """Whether a mark is there."""
        return self._mark(mark).exists()

    def remove_mark(self, mark: str) -> None:
        """Removes a mark."""
        storage.remove(self._mark(mark))

    def _mark(self, mark: str) -> epath.Path:
        return self.path / f".shared-{mark}"

    # Config and result.

    @property
    def config(self) -> epath.Path:
        """The file of the config that the run was begun with."""
        return self.path / CONFIG

    def kept_config(self, argument: str | None = None) -> epath.Path:
        """The file of the config of a run that has begun.

        Raises:
            InputError: if there is none; ``argument`` is what names the directory.
        """
        if not self.config.is_file():
            raise InputError(
                f"{self.path} has no config.gin: give the directory of a run made by `peer-jax train`",
                argument=argument,
            )
        return self.config

    def read_config(self) -> str | None:
        """The text of ``config.gin``; None if there is none.

        Raises:
            InputError: if it can't be read.
        """
        try:
            content = storage.read(self.config)
            return None if content is None else content.decode()
        except (OSError, UnicodeDecodeError) as error:
            sentence = f"{self.config} can't be read ({error}): mend it, or choose another directory"
            raise storage.refusal(error, sentence, "workdir") from error

    def write_config(self, text: str) -> None:
        """Writes ``config.gin``."""
        write_whole(self.config, text)

    def keep_vocabulary(self, model: bytes) -> None:
        """Writes a copy of a SentencePiece model, unless it is there; its name has a part of its digest."""
        path = self.path / VOCABULARY.format(hashlib.sha256(model).hexdigest()[:16])
        if storage.read(path) != model:
            write_whole(path, model)

    @property
    def vocabulary(self) -> epath.Path | None:
        """The copy of the run's SentencePiece model; None if there is none.

        Raises:
            InputError: if it is damaged.
        """
        for path in self.path.glob(VOCABULARY.format("*")):
            try:
                whole = path.name == VOCABULARY.format(hashlib.sha256(path.read_bytes()).hexdigest()[:16])
            except OSError:
                whole = False
            if not whole:
                raise InputError(f"{path} is damaged: remove it, to use the file that {CONFIG} names instead")
            return path
        return None

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run; None if there is no ``result.json``.

        Raises:
            InputError: if it is damaged, or of another version.
        """
        return _read(self.path / RESULT, records.Result)

    def whole_result(self) -> dict[str, Any] | None:
        """The result; None if there is none that can be read, so that the run has to write it again.

        Raises:
            TryAgain: if the bucket does not answer.
        """
        try:
            return self.read_result()
        except TryAgain:
            raise
        except InputError:
            return None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``. A damaged one is set aside, since it may have evaluations of further texts."""
        if self.has_result and self.whole_result() is None:
            set_aside(self.path / RESULT)
        _write_json(self.path / RESULT, {"schema": SCHEMA} | dict(result))

    @property
    def has_result(self) -> bool:
        """Whether there is a ``result.json``, whole or not."""
        with storage.as_os_errors(self.path):
            return (self.path / RESULT).exists()

    # Metrics.

    def append_metrics(self, keep: Callable[[str], bool]) -> storage.Lines:
        """Opens ``metrics.jsonl`` for more lines. Lines that it already has stay if ``keep`` accepts them."""
        return storage.Lines(self.path / METRICS, keep)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that no kill or fault has spoilt; none if there is no such file."""
        try:
            lines = whole_lines(self.path / METRICS)
        except OSError:
            return
        for line in lines:
            with contextlib.suppress(InputError):
                yield records.parse(line, records.Metrics, self.path / METRICS)

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest whole line of ``metrics.jsonl``, which a process may still be writing; None if there is none."""
        try:
            with storage.as_os_errors(self.path), (self.path / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
                for line in reversed(file.read().decode(errors="replace").splitlines()):
                    with contextlib.suppress(InputError):
                        return records.parse(line, records.Metrics, self.path / METRICS)
        except OSError:
            pass
        return None

    def event_file(self, host: str) -> str:
        """The name of a new file of TensorBoard events, or its address; makes the folder that holds it."""
        folder = self.path / TENSORBOARD
        if not is_in_bucket(folder):
            folder.mkdir(exist_ok=True)
        return str(folder / f"events.out.tfevents.{time.time_ns()}.{host}")

    # What a sweep keeps in the directory of each of its runs.

    def read_point(self) -> dict[str, Any]:
        """The run's place in its sweep; empty if the run belongs to no sweep.

        Raises:
            InputError: if it is damaged.
        """
        return _read(self.path / POINT, records.Point) or {}

    def write_point(self, point: Mapping[str, Any]) -> None:
        """Writes the run's place in its sweep; makes the directory."""
        make_folder(self.path)
        _write_json(self.path / POINT, point)

    def read_failure(self) -> dict[str, Any] | None:
        """Why the last attempt failed: ``reason``, ``details`` and ``time``; None if it has not failed.

        Raises:
            InputError: if what was kept is damaged.
        """
        return _read(self.path / FAILURE, records.Failure)

    def write_failure(self, reason: str, details: str = "") -> None:
        """Keeps why an attempt failed."""
        make_folder(self.path)
        _write_json(self.path / FAILURE, {"reason": reason, "details": details, "time": time.time()})

    def clear_failure(self) -> None:
        """Forgets a failure, when the run has finished."""
        storage.remove(self.path / FAILURE)


class SweepDirectory(_Directory):
    """The directory of one or several sweeps: a folder per run, and a description of each sweep."""

    def run(self, name: str) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory(self.path / name)

    def keep_sweep(self, described: Mapping[str, Any], runs: Sequence[str]) -> None:
        """Keeps the description of a sweep and the names of its runs, beside those of the directory's other sweeps.

        Raises:
            InputError: if the directory can't be written to.
        """
        make_folder(self.path, "workdir")
        text = json.dumps({"sweep": described, "runs": list(runs)}, indent=2, default=str) + "\n"
        write_whole(self.path / f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json", text)

    def sweeps(self) -> list[dict[str, Any]]:
        """Each sweep's description: ``name``, ``sweep`` with its fields, ``runs`` with the names of its runs.

        Earlier versions did not keep the names of the runs, which are None then.

        Raises:
            InputError: if a description is damaged.
        """
        found = []
        for path in (path for pattern in SWEEP_FILES for path in sorted(self.path.glob(pattern))):
            kept = _read(path, records.Record)
            kept = kept if "sweep" in kept else {"sweep": kept, "runs": None}
            found.append({"name": path.stem} | records.check(kept, records.KeptSweep, path))
        return found

    @property
    def results(self) -> epath.Path:
        """The table of finished runs."""
        return self.path / RESULTS

    def worker_log(self, number: int) -> Path:
        """The local file that a worker process prints to: in the directory, or for a bucket among temporary files."""
        name = f"worker-{number}.log"
        if not is_in_bucket(self.path):
            return Path(self.path / name)
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"peer_jax-{digest}-{name}"


def find_runs(directory: str | os.PathLike) -> list[RunDirectory]:
    """The run directories at and below a path, in the order of their names.

    A folder is a run if it has a config, a result or a failure. The folders inside of a run are not searched. If a
    sweep directory has the list of its runs, the folders of these runs are not searched either.
    """
    return list(_find(place(directory)))


def _find(path: epath.Path) -> Iterator[RunDirectory]:
    with storage.as_os_errors(path):
        is_run = any((path / name).exists() for name in (CONFIG, RESULT, FAILURE))
    if is_run:
        yield RunDirectory(path)
        return
    kept = [kept["runs"] for kept in SweepDirectory(path).sweeps()]
    listed = {name for runs in kept for name in runs or ()}
    yield from (RunDirectory(path / name) for name in sorted(listed) if (path / name).exists())
    try:
        named = (child for child in storage.listed(path) if child.name not in listed and child.name[0] != ".")
        below = sorted(child for child in named if child.is_dir())
    except storage.BucketError:  # else a report would lack runs and not say so
        raise
    except OSError:
        return
    for child in below:
        yield from _find(child)
