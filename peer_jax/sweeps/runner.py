"""Runs a sweep: worker processes train each run in its directory, skip finished runs and continue begun ones."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import MappingProxyType

from peer_jax.analysis import results
from peer_jax.data.pipeline import ensure_prepared
from peer_jax.errors import InputError, Interrupted, TrainingFailed
from peer_jax.run_directory import SweepDirectory, find_runs
from peer_jax.sweeps.board import Board
from peer_jax.sweeps.plan import Load, Planned, to_measure
from peer_jax.sweeps.sweep import Sweep
from peer_jax.sweeps.workers import Answer, Task, Worker
from peer_jax.training.signals import StopOnSignal

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between two updates of the board, at most
RETRY_SECONDS = 5.0  # before a run that another process was training is tried again


def prepare_corpora(planned: Sequence[Planned], *, progress: bool) -> None:
    """Prepares the text of all runs, so that workers find it."""
    for task in dict.fromkeys(run.task for run in planned):
        ensure_prepared(task, progress=progress)


def run_sweep(
    sweep: Sweep,
    planned: Sequence[Planned],
    directory: SweepDirectory,
    *,
    load: Load,
    workers: int,
    progress: bool = True,
) -> None:
    """Trains the runs that are not finished, and keeps ``results.csv`` up to date.

    A run that fails leaves its reason in ``failure.json``, and the others go on. A run that the process of another
    sweep is training is left to that process, and is taken over if the process dies.

    Raises:
        InputError: if the directory can't be written to.
        TrainingFailed: at the end, if runs have failed.
        Interrupted: on SIGTERM or SIGINT, when the running runs have saved their state.
    """
    directory.keep_sweep(sweep.describe(), [run.point.name for run in planned])
    rows = _rows(directory)
    done = [run for run in planned if run.point.name in rows]
    todo = [run for run in planned if run.point.name not in rows]
    with StopOnSignal() as stop, Board(planned, done, directory, workers, enabled=progress) as board:
        failed = _Runner(todo, directory, load, workers, board, rows).run(stop) if todo else {}
    _write_results(directory, _rows(directory, rows))
    if stop.signal_number is not None:
        raise Interrupted(stop.signal_number, "stopped; every run is saved, and the same command goes on")
    if failed:
        name, reason = next(iter(failed.items()))
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise TrainingFailed(
            f"{len(failed)} of {len(planned)} runs failed, the rest is finished: {name}: {reason}{others}; "
            f"the reasons are in the runs' directories in {directory}, and the same command tries them again"
        )


class _Runner:
    """The loop that gives runs to workers and takes their answers; adds the rows of those that finish to ``rows``."""

    def __init__(
        self,
        todo: Sequence[Planned],
        directory: SweepDirectory,
        load: Load,
        workers: int,
        board: Board,
        rows: dict[str, results.Row],
    ) -> None:
        self._queue: deque[tuple[float, Planned]] = deque((0.0, run) for run in todo)
        self._directory, self._board = directory, board
        self._rows = rows
        self._failed: dict[str, str] = {}
        self._began = time.time()
        count = min(workers, len(todo))
        self._workers = [Worker(load, (i, workers), directory.worker_log(i)) for i in range(count)]
        self._running: dict[Worker, Planned] = {}

    def run(self, stop: StopOnSignal) -> dict[str, str]:
        """Works until no run is left or ``stop`` has a signal; returns the reasons of the runs that failed, by name."""
        try:
            while (self._queue or self._running) and stop.signal_number is None:
                self._hand_out()
                connection.wait([worker.connection for worker in self._running], timeout=TICK)
                self._collect()
                self._board.refresh()
            for worker in self._workers:
                worker.stop()
            self._board.say("Stopping: the running runs are being saved ..." if self._running else None)
            for worker in self._workers:
                worker.join()
            self._collect()
        except BaseException:  # also at a second Ctrl-C: checkpoints are written whole or not at all
            for worker in self._workers:
                worker.kill()
            raise
        return self._failed

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker not in self._running]
        for _ in range(len(self._queue)):
            if not idle:
                return
            not_before, run = self._queue.popleft()
            if not_before > time.monotonic():
                self._queue.append((not_before, run))
            elif not self._ended_elsewhere(run):
                self._start(idle.pop(), run)

    def _ended_elsewhere(self, run: Planned) -> bool:
        """Whether another process has finished the run, or has failed to since this sweep began; notes the outcome."""
        folder = self._directory.run(run.point.name)
        with contextlib.suppress(InputError):  # what can't be read was not written since
            if folder.has_result:
                self._finish(run)
                return True
            failure = folder.read_failure()
            if failure is not None and failure.get("time", 0) > self._began:
                self._fail(run, failure["reason"])
                return True
        return False

    def _start(self, worker: Worker, run: Planned) -> None:
        folder = self._directory.run(run.point.name)
        with contextlib.suppress(OSError, InputError):  # if the disk is full, the run fails too and says so
            folder.write_point(run.point.describe())
        worker.give(Task(run.point.files, run.point.bindings, run.point.imports, str(folder)))
        self._running[worker] = run
        self._board.started(run)

    def _collect(self) -> None:
        for worker, run in list(self._running.items()):
            if (answer := worker.answer()) is None:
                continue
            del self._running[worker]
            if answer.state == "finished":
                self._finish(run)
            elif answer.state == "failed":
                self._keep_failure(run, answer)
                self._fail(run, answer.reason)
            elif answer.state == "busy":
                self._queue.append((time.monotonic() + RETRY_SECONDS, run))
                self._board.elsewhere(run)
            else:  # the worker was asked to stop, by this sweep (which then ends) or by somebody else
                self._queue.append((0.0, run))

    def _finish(self, run: Planned) -> None:
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


def _rows(directory: SweepDirectory, known: Mapping[str, results.Row] = MappingProxyType({})) -> dict[str, results.Row]:
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


def _write_results(directory: SweepDirectory, rows: Mapping[str, results.Row]) -> None:
    """Writes the table of finished runs."""
    with contextlib.suppress(InputError):  # if there is no room for the table: it can be made again at any time
        results.write_csv(results.in_order(rows.values()), directory.results)


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
