"""Metrics of a run: ``metrics.jsonl``, TensorBoard and a progress bar."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from peer_jax.errors import InputError


class MetricsLog:
    """Scalars by step, appended to ``metrics.jsonl`` and to TensorBoard's event files in ``tensorboard/``.

    A resumed run goes on from the checkpoint: lines of later steps, and a half-written one, are dropped first, and the
    validation loss of its own step, where that is due again; so each stands there once. Events are written in the
    caller's thread: tensorboardX's own thread dies on a full disk and leaves its caller waiting. One that is not
    ``enabled`` writes nothing: one process of a run writes for all.

    Raises:
        InputError: if the files can't be written, at any time.
    """

    def __init__(self, workdir: Path, resume_step: int, *, validation_due: bool = False, enabled: bool = True) -> None:
        self._workdir, self._enabled = workdir, enabled
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        with self._naming_the_directory():
            rewritten = path.with_suffix(".jsonl.tmp")
            rewritten.write_text("".join(line + "\n" for line in _lines(path, resume_step, validation_due)))
            os.replace(rewritten, path)
            self._file = path.open("a")
            (workdir / "tensorboard").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            self._events = RecordWriter(str(workdir / "tensorboard" / name))
            self._add_event(file_version="brain.Event:2")
            restart = SessionLog(status=SessionLog.START)  # TensorBoard forgets this step and later ones
            self._add_event(step=resume_step + 1, session_log=restart)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        if not self._enabled:
            return
        with self._naming_the_directory():
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
            for name, value in scalars.items():
                self._add_event(step=step, summary=scalar(name, value))
            self._events.flush()

    def _add_event(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._file, self._events) if self._enabled else ():
            with contextlib.suppress(OSError):  # what write() left to write, it has complained about
                file.close()

    @contextlib.contextmanager
    def _naming_the_directory(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"metrics can't be written to {self._workdir} ({error.strerror}): mend that and run again"
            ) from error


def _lines(path: Path, last_step: int, validation_due: bool) -> list[str]:
    """The whole lines of a log up to a step; what a kill or a fault spoilt, or is due again, is left out."""
    kept = []
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(line)
            again = validation_due and found["step"] == last_step and "validation_loss" in found
            if found["step"] <= last_step and not again:
                kept.append(line)
    return kept


def last_line(workdir: Path) -> dict[str, Any] | None:
    """The newest whole line of a run's log, whether or not it is running; None if there is none yet."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError):
                    return json.loads(line)
    except OSError:
        pass
    return None


class ProgressBar:
    """A bar on standard error; where that is no terminal, a plain line about every tenth of the way."""

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
