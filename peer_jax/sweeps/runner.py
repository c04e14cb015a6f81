"""Runs a sweep: hands out the runs that are not finished, to worker processes or to a slice, and keeps the results."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from peer_jax.analysis import results, row_table
from peer_jax.analysis.row import Row, in_order
from peer_jax.data.pipeline import ensure_prepared
from peer_jax.errors import InputError, Interrupted, TrainingFailed, TryAgain
from peer_jax.lease import STALE
from peer_jax.run_directory import SweepDirectory, find_runs
from peer_jax.sweeps.board import Board
from peer_jax.sweeps.plan import Load, Planned, to_measure
from peer_jax.sweeps.sweep import Sweep
from peer_jax.sweeps.tasks import Answer, Task
from peer_jax.sweeps.workers import Worker
from peer_jax.training.signals import StopOnSignal

logger = logging.getLogger(__name__)

PUT_OFFS = 20  # how often in a row runs may end because something does not answer for now
RETRY_SECONDS = 15.0  # before a run that another process was training is tried again, at most


@runtime_checkable
class Trainers(Protocol):
    """What trains the runs: ``workers.Workers`` on this machine, or a ``slices.Slice``."""

    @property
    def is_busy(self) -> bool:
        """Whether a task is being done."""

    @property
    def is_free(self) -> bool:
        """Whether another task can be given."""

    def give(self, task: Task) -> None:
        """Starts a task."""

    def answers(self) -> list[tuple[Task, Answer]]:
        """The tasks that have ended, for which it waits a moment."""

    def stop(self) -> list[tuple[Task, Answer]]:
        """Saves what is being trained, and ends; the tasks that had not been answered."""

    def kill(self) -> None:
        """Ends at once."""


def prepare_corpora(planned: Sequence[Planned], *, progress: bool) -> None:
    """Prepares the text of all runs, so that all who train them find it."""
    for task in dict.fromkeys(run.task for run in planned):
        ensure_prepared(task, progress=progress)


def retry_seconds(stale: float) -> float:
    """Seconds before a run that another process was training is tried again."""
    return min(RETRY_SECONDS, stale / 4)


def run_sweep(
    sweep: Sweep,
    planned: Sequence[Planned],
    directory: SweepDirectory,
    trainers: Trainers,
    *,
    chosen: Sequence[Planned] | None = None,
    stale: float = STALE,
    progress: bool = True,
) -> None:
    """Trains the runs that are not finished, and keeps ``results.csv`` up to date.

    The most expensive runs come first, and those that have failed before come last. A run that fails leaves its reason
    in ``failure.json``, and the others go on. A run that another sweep on the same directory is training is left to
    that sweep, and is taken over if its process dies.

    Args:
        sweep: what is trained.
        planned: all of its runs.
        directory: gets the runs.
        trainers: what trains them.
        chosen: the runs to train; None: all.
        stale: seconds without a sign of life after which a process on another machine has died.
        progress: show what is being trained.

    Raises:
        InputError: if the directory can't be written to.
        TrainingFailed: at the end, if runs have failed.
        Interrupted: on SIGTERM or SIGINT, when the running runs have saved their state.
    """
    chosen = planned if chosen is None else chosen
    directory.keep_sweep(sweep.describe(), [run.point.name for run in planned])
    rows = _rows(directory)
    done = [run for run in chosen if run.point.name in rows]
    todo = [run for run in chosen if run.point.name not in rows]
    with StopOnSignal() as stop, Board(chosen, done, directory, enabled=progress) as board:
        failed = _Runner(todo, directory, trainers, board, rows, stale).run(stop) if todo else {}
    _write_results(directory, _rows(directory, rows))
    if stop.signal_number is not None:
        raise Interrupted(stop.signal_number, "stopped; every run is saved, and the same command goes on")
    if failed:
        name, reason = next(iter(failed.items()))
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise TrainingFailed(
            f"{len(failed)} of {len(chosen)} runs failed, the rest is finished: {name}: {reason}{others}; "
            f"the reasons are in the runs' directories in {directory}, and the same command tries them again"
        )


class _Runner:
    """The loop that hands out runs and takes the answers; adds the rows of those that finish to ``rows``."""

    def __init__(
        self,
        todo: Sequence[Planned],
        directory: SweepDirectory,
        trainers: Trainers,
        board: Board,
        rows: dict[str, Row],
        stale: float,
    ) -> None:
        self._directory, self._trainers, self._board = directory, trainers, board
        self._rows, self._stale = rows, stale
        self._failed: dict[str, str] = {}
        self._put_offs = 0
        self._failures_before = {run.point.name: self._failure(run) for run in todo}
        order = sorted(todo, key=lambda run: self._failures_before[run.point.name] is not None)
        self._queue: deque[tuple[float, Planned]] = deque((0.0, run) for run in order)
        self._running: dict[str, Planned] = {}

    def run(self, stop: StopOnSignal) -> dict[str, str]:
        """Works until no run is left or ``stop`` is asked to; returns the reasons of the runs that failed, by name."""
        try:
            while not stop.requested() and (self._queue or self._trainers.is_busy):
                self._hand_out()
                self._collect(self._trainers.answers())
            self._board.say("Stopping: the running runs are being saved ..." if self._running else None)
            self._collect(self._trainers.stop())
        except BaseException:  # also at a second Ctrl-C
            self._trainers.kill()
            raise
        return self._failed

    def _hand_out(self) -> None:
        for _ in range(len(self._queue)):
            if not self._trainers.is_free:
                return
            not_before, run = self._queue.popleft()
            if not_before > time.monotonic():
                self._queue.append((not_before, run))
            elif not self._ended_elsewhere(run):
                holder = None if not_before else self._directory.run(run.point.name).holder()
                if holder is None:
                    self._start(run)
                else:  # whether it lives is found out later, when there is nothing else to do
                    self._postpone(run)
                    self._board.elsewhere(run, holder)

    def _ended_elsewhere(self, run: Planned) -> bool:
        """Whether another process has finished the run, or has failed to since this sweep began; notes the outcome."""
        if self._directory.run(run.point.name).has_result:
            with contextlib.suppress(InputError):  # a damaged one is made again
                self._finish(run)
                return True
        failure = self._failure(run)
        if failure is not None and failure != self._failures_before[run.point.name]:
            self._fail(run, failure["reason"])
            return True
        return False

    def _failure(self, run: Planned) -> dict | None:
        """Why the run has failed last; None if it has not, or if that can't be read."""
        with contextlib.suppress(InputError):
            return self._directory.run(run.point.name).read_failure()
        return None

    def _start(self, run: Planned) -> None:
        folder = self._directory.run(run.point.name)
        with contextlib.suppress(OSError, InputError):  # if the disk is full, the run fails too and says so
            folder.write_point(run.point.describe())
        self._trainers.give(Task(run.point.files, run.point.bindings, run.point.imports, str(folder), self._stale))
        self._running[str(folder)] = run
        self._board.started(run)

    def _collect(self, answers: Sequence[tuple[Task, Answer]]) -> None:
        for task, answer in answers:
            run = self._running.pop(task.workdir)
            if answer.state == "finished":
                self._finish(run)
            elif answer.state == "failed":
                self._keep_failure(run, answer)
                self._fail(run, answer.reason)
            elif answer.state == "busy":
                self._postpone(run)
                self._board.elsewhere(run)
            elif answer.state == "later":
                self._postpone(run)
                self._put_off(run, answer.reason)
            else:  # the sweep was asked to stop, or somebody else has stopped a worker
                self._queue.append((0.0, run))

    def _postpone(self, run: Planned) -> None:
        self._queue.append((time.monotonic() + retry_seconds(self._stale), run))

    def _put_off(self, run: Planned, reason: str) -> None:
        """Notes that a run could not go on for now. If that goes on, the sweep ends, and a launcher starts it again."""
        self._put_offs += 1
        if self._put_offs > PUT_OFFS:
            raise TryAgain(f"{run.point.name} could not go on {self._put_offs} times: {reason}")
        self._board.put_off(run, reason)

    def _finish(self, run: Planned) -> None:
        self._put_offs = 0
        folder = self._directory.run(run.point.name)
        row = self._rows[run.point.name] = results.row(folder, self._directory)
        folder.clear_failure()
        self._board.finished(run, row)
        _write_results(self._directory, self._rows)

    def _fail(self, run: Planned, reason: str) -> None:
        self._failed[run.point.name] = reason
        self._board.failed(run, reason)

    def _keep_failure(self, run: Planned, answer: Answer) -> None:
        with contextlib.suppress(InputError):  # the final message of the sweep has the reason, too
            self._directory.run(run.point.name).write_failure(answer.reason, answer.details)


def _rows(directory: SweepDirectory, known: Mapping[str, Row] = MappingProxyType({})) -> dict[str, Row]:
    """The finished runs in a directory, by the names of their folders; those that are ``known`` are not read again."""
    rows = dict(known)
    for run in find_runs(directory):
        try:
            if run.has_result and str(run.path.relative_to(directory.path)) not in rows:
                row = results.row(run, directory)
                rows[row.run] = row
        except InputError as error:
            logger.warning("%s leaves out a run: %s", directory.results, error)
    return rows


def _write_results(directory: SweepDirectory, rows: Mapping[str, Row]) -> None:
    """Writes the table of finished runs."""
    with contextlib.suppress(InputError):  # if there is no room for the table: it can be made again at any time
        row_table.write(in_order(rows.values()), directory.results)


def measure(planned: Sequence[Planned], *, load: Load, workers: int) -> tuple[dict[str, float], dict[str, str]]:
    """Measures seconds per step by program, and returns them with the reasons why some runs could not be measured.

    One process measures them one after another, with the share of the machine that a worker of the sweep would have.
    """
    seconds, reasons = {}, {}
    worker = Worker(load, (0, workers), Path(os.devnull))
    try:
        for run in to_measure(planned):
            worker.give(Task(run.point.files, run.point.bindings, run.point.imports))
            while (answer := worker.answer()) is None:
                connection.wait([worker.connection])
            if answer.seconds is None:
                reasons[run.point.name] = answer.reason
            else:
                seconds[run.program] = answer.seconds
    finally:
        worker.kill()
    return seconds, reasons
