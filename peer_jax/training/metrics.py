"""Metrics of a run: ``metrics.jsonl``, TensorBoard and a progress bar."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter, register_writer_factory
from tensorboardX.summary import scalar

from peer_jax.processes import gather, together
from peer_jax.run_directory import RunDirectory
from peer_jax.storage import BUCKETS, Growing, as_os_errors, is_in_bucket, reason, refusal


class _Bucket:
    """Opens event files in a bucket for tensorboardX, whose own writer fails if the answer to a writing is lost."""

    @staticmethod
    def open(path: str) -> Growing:
        return Growing(path.removeprefix(_OURS))


_OURS = "peer-jax-"  # before an address, so that tensorboardX opens others as it does
register_writer_factory(_OURS + BUCKETS.partition(":")[0], _Bucket)


class MetricsLog:
    """Scalars by step, appended to ``metrics.jsonl`` and to TensorBoard's event files in ``tensorboard/``.

    A resumed run goes on from its checkpoint, so lines of later steps are dropped first, as are lines that a kill or a
    fault has spoilt. Events are written in the caller's thread, because tensorboardX's own thread dies on a full disk
    and leaves its caller waiting. All processes of a run open the log, but only the one with ``enabled`` writes.

    Args:
        directory: of the run, which exists.
        resume_step: the step of the checkpoint that the run goes on from; 0 for a new run.
        enabled: whether to write.

    Attributes:
        found: names of the scalars that the log already has of ``resume_step``; the same in all processes.

    Raises:
        InputError: if the files can't be written: when the log is opened, in all processes, and later in the one that
            writes.
    """

    def __init__(self, directory: RunDirectory, resume_step: int, *, enabled: bool = True) -> None:
        self._directory, self._enabled = directory, enabled
        found: set[str] = set()

        def keep(line: str) -> bool:
            try:
                entry = json.loads(line)
                if entry["step"] == resume_step:
                    found.update(entry)
                return entry["step"] <= resume_step
            except (ValueError, TypeError, KeyError):
                return False

        with together(), self._naming_the_directory():
            if enabled:
                self._lines = directory.append_metrics(keep)
                with as_os_errors(directory):
                    events = directory.event_file(socket.gethostname())
                    self._events = RecordWriter(f"{_OURS}{events}" if is_in_bucket(events) else str(events))
                self._add_event(file_version="brain.Event:2")
                restart = SessionLog(status=SessionLog.START)  # TensorBoard forgets this step and later ones
                self._add_event(step=resume_step + 1, session_log=restart)
        first = gather(json.dumps(sorted(found)))[0]  # the first process writes for all, and so has found them
        self.found = frozenset(json.loads(first)) - {"step"}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        if not self._enabled:
            return
        with self._naming_the_directory():
            self._lines.append(json.dumps({"step": step, **scalars}))
            for name, value in scalars.items():
                self._add_event(step=step, summary=scalar(name, value))
            if self._lines.is_due:
                self._flush()

    def flush(self) -> None:
        """Has readers find all that was written, which for a bucket takes until now; before a checkpoint is saved."""
        if self._enabled:
            with self._naming_the_directory():
                self._flush()

    def _flush(self) -> None:
        self._lines.flush()
        with as_os_errors(self._directory):
            self._events.flush()

    def _add_event(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._lines, self._events) if self._enabled else ():
            with contextlib.suppress(OSError), as_os_errors(self._directory):  # write() has complained already
                file.close()

    @contextlib.contextmanager
    def _naming_the_directory(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            sentence = f"metrics can't be written to {self._directory} ({reason(error)}): mend that and run again"
            raise refusal(error, sentence) from error


class ProgressBar:
    """A bar on standard error; if that is no terminal, a plain line about every tenth of the way."""

    def __init__(self, description: str, total: int, start: int = 0, *, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._enabled, self._live = enabled, enabled and console.is_terminal
        self._description, self._total, self._done = description, total, start
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(description, total=total, completed=start, note="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, note: str = "") -> None:
        """Moves the bar to ``done`` and shows the note beside it."""
        tenth = max(1, self._total // 10)
        if self._enabled and not self._live and (done // tenth > self._done // tenth or done == self._total):
            print(f"{self._description} {done}/{self._total} {note}", file=sys.stderr, flush=True)
        self._done = done
        self._progress.update(self._task, completed=done, note=note)
