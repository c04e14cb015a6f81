"""Worker processes of a sweep: each trains one run after another, on cores or on an accelerator of its own."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peer_jax import memory, startup
from peer_jax.errors import TryAgain
from peer_jax.startup import accelerators
from peer_jax.sweeps.tasks import Answer, Task, do

_spawn = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX hangs

BLOCKED_AT_START = {signal.SIGINT, signal.SIGTERM}
TICK = 0.5  # seconds between two looks for answers, at most
MOST_STARTS = 3  # how often a process is started that dies before it has read its task


class Worker:
    """A process that takes tasks one at a time. It stops when the process that made it dies.

    Args:
        load: makes a run from files, bindings and imports, see ``plan.Load``.
        share: the number of this worker and the number of workers. They decide which cores or which device it gets.
        log: the file that gets what libraries print.
    """

    def __init__(self, load: Any, share: tuple[int, int], log: Path) -> None:
        self._arguments = (load, share, log)
        self.task: Task | None = None
        self._stopped = False
        self._start()

    def _start(self) -> None:
        """Starts the process. Signals to it are blocked until it can handle them; the sweep handles an early Ctrl-C."""
        resource_tracker.ensure_running()  # first, because it unblocks signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_AT_START)
        try:
            self.connection, theirs = _spawn.Pipe()
            self.process = _spawn.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            self.process.start()
            theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _restart(self) -> None:
        self.connection.close()
        self._start()

    def give(self, task: Task) -> None:
        """Starts a task; a process that has died since its last task is replaced."""
        self.task, self._has_begun, self._starts = task, False, 0
        if not self.process.is_alive():
            self._restart()
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the process has just died, and ``answer`` will notice
            self.connection.send(self.task)

    def answer(self) -> Answer | None:
        """The outcome of the task, or None if it has not ended.

        If the process died before it had read the task, the task is not to blame: a new process gets the task.
        """
        try:
            while self.task is not None and self.connection.poll():
                answer = self.connection.recv()
                if answer.state != "begun":
                    self.task = None
                    return answer
                self._has_begun = True
        except (EOFError, OSError):
            return self._died()
        return None

    def _died(self) -> Answer | None:
        self.process.join()
        self._starts += 1
        if not self._has_begun and self._starts < MOST_STARTS and not self._stopped:
            self._restart()
            self._send()
            return None
        self.task = None
        return _death(self.process.exitcode)

    def stop(self) -> None:
        """Asks the worker to save its run, unless the run has just ended, and to end."""
        self._stopped = True
        if self.process.is_alive():
            self.process.terminate()
        with contextlib.suppress(OSError):  # the process is gone
            self.connection.send(None)

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended."""
        self.process.join(timeout)


class Workers:
    """The worker processes of a sweep on this machine, each of which is started when there is a first task for it.

    Args:
        load: makes a run, see ``plan.Load``.
        count: how many tasks are done at a time.
        log: gives the file that the worker of a number prints to.
    """

    def __init__(self, load: Any, count: int, log: Callable[[int], Path]) -> None:
        self._load, self._count, self._log = load, count, log
        self._workers: list[Worker] = []

    @property
    def is_busy(self) -> bool:
        """Whether a task is being done."""
        return any(worker.task is not None for worker in self._workers)

    @property
    def is_free(self) -> bool:
        """Whether another task can be given."""
        return len(self._workers) < self._count or any(worker.task is None for worker in self._workers)

    def give(self, task: Task) -> None:
        """Starts a task."""
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            number = len(self._workers)
            worker = Worker(self._load, (number, self._count), self._log(number))
            self._workers.append(worker)
        worker.give(task)

    def answers(self) -> list[tuple[Task, Answer]]:
        """The tasks that have ended, for which it waits a moment."""
        connection.wait([worker.connection for worker in self._workers if worker.task is not None], timeout=TICK)
        return self._answered()

    def _answered(self) -> list[tuple[Task, Answer]]:
        asked = [(worker.task, worker.answer()) for worker in self._workers if worker.task is not None]
        return [(task, answer) for task, answer in asked if answer is not None]

    def stop(self) -> list[tuple[Task, Answer]]:
        """Has the workers save what they train, and end; the tasks that had not been answered."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        return self._answered()

    def kill(self) -> None:
        """Ends the workers at once: checkpoints are written whole or not at all."""
        for worker in self._workers:
            worker.kill()


def _death(exitcode: int | None) -> Answer:
    """The answer for a worker whose process is gone."""
    if exitcode == -signal.SIGTERM:
        return Answer("interrupted")
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ": memory may have run out" if name == "SIGKILL" else ""
        return Answer("failed", f"its process was ended by {name}{hint}")
    return Answer("failed", f"its process ended with status {exitcode}")


def _serve(connection: Connection, load: Any, share: tuple[int, int], log: Path) -> None:
    """What the process of a worker runs: task after task, until it is told to stop."""
    os.setsid()  # Ctrl-C is for the sweep, which asks its workers to stop
    take_share(*share)
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_AT_START)
    refused = None
    try:
        startup.prepare()
    except TryAgain as error:
        refused = Answer("later", str(error))
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):  # the sweep's process is gone
            return
        if task is None:
            return
        connection.send(Answer("begun"))
        answer = refused or do(task, load)
        connection.send(answer)
        if refused or answer.state == "interrupted":
            return


def _stop_with_parent() -> None:
    """Makes this process save its run and end when the process of the sweep is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # time for a checkpoint; a worker between two runs has ended already
    os._exit(1)


def default_workers() -> int:
    """One per GPU, one for all chips of a TPU host, or else one per core.

    On CPU, several runs with one core each are faster than one run after another with all cores.
    """
    return len(accelerators()) or len(cores())


def memory_of_worker() -> int | None:
    """The most bytes of memory that the devices of a worker have; None if unknown, as on a TPU host."""
    devices = accelerators()
    if not devices:
        return memory.of_machine()
    return None if "tpu" in devices else memory.of_gpu()


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def take_share(number: int, workers: int) -> None:
    """Limits this process to its part of the cores or GPUs. It must not have started JAX yet."""
    devices = accelerators()
    if "tpu" not in devices and len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    all_cores = cores()
    if not devices and workers > 1 and hasattr(os, "sched_setaffinity"):
        own = all_cores[number * len(all_cores) // workers : (number + 1) * len(all_cores) // workers]
        os.sched_setaffinity(0, own or [all_cores[number % len(all_cores)]])
