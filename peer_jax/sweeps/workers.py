"""Worker processes of a sweep: each trains one run after another, on cores or an accelerator of its own."""

import contextlib
import dataclasses
import gc
import glob
import importlib.util
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peer_jax.errors import InputError, Interrupted, InUse, TrainingFailed

_spawn = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX hangs


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is asked to do: train a run in its directory, or, without one, measure its speed."""

    files: tuple[str, ...]
    bindings: tuple[str, ...]
    workdir: Path | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of it: "finished" (with seconds a step, if that was asked), "failed", "busy" or "interrupted"."""

    state: str
    reason: str = ""
    details: str = ""
    seconds: float | None = None


class Worker:
    """A process that takes tasks one at a time. It stops when this process dies.

    Args:
        load: makes a run of files and bindings, see ``plan.Load``; a module's function, for it is pickled.
        share: this worker's number and how many there are, which decides what cores or which device it has.
        log: the file that gets what libraries print.
    """

    def __init__(self, load: Any, share: tuple[int, int], log: Path) -> None:
        self._arguments = (load, share, log)
        self.task: Task | None = None
        self._start()

    def _start(self) -> None:
        self.connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        """Starts a task."""
        self.task = task
        self.connection.send(task)

    def answer(self) -> Answer | None:
        """What came of the task, if it has ended; a worker that died with it is replaced."""
        if self.task is None or not self.connection.poll():
            return None
        try:
            answer = self.connection.recv()
        except EOFError:
            self._process.join()
            answer = _death(self._process.exitcode)
            self.connection.close()
            self._start()
        self.task = None
        return answer

    def stop(self) -> None:
        """Asks the worker to save its run and end; it may just have made the last step, and then it has no run."""
        if self._process.is_alive():
            self._process.terminate()
        with contextlib.suppress(OSError):  # it is gone
            self.connection.send(None)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until it has ended."""
        self._process.join(timeout)


def _death(exitcode: int | None) -> Answer:
    """What to say of a worker that is gone."""
    if exitcode == -signal.SIGTERM:
        return Answer("interrupted")
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ": memory may have run out" if name == "SIGKILL" else ""
        return Answer("failed", f"its process was ended by {name}{hint}")
    return Answer("failed", f"its process ended with status {exitcode}")


def _serve(connection: Connection, load: Any, share: tuple[int, int], log: Path) -> None:
    """The life of a worker."""
    os.setsid()  # Ctrl-C is for the sweep, which asks its workers to stop
    _take_share(*share)
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if task is None:
            return
        answer = _do(task, load)
        connection.send(answer)
        if answer.state == "interrupted":
            return


def _do(task: Task, load: Any) -> Answer:
    """Does a task; whatever goes wrong is part of the answer."""
    import jax

    from peer_jax.sweeps.speed import seconds_per_step
    from peer_jax.training.loop import train

    try:
        run, _ = load(task.files, task.bindings)
        if task.workdir is None:
            return Answer("finished", seconds=seconds_per_step(run))
        train(run, task.workdir, progress=False)
        return Answer("finished")
    except Interrupted as stopped:
        return Answer("interrupted", str(stopped))
    except InUse as error:
        return Answer("busy", str(error))
    except (InputError, TrainingFailed) as error:
        return Answer("failed", " ".join(str(error).split()))
    except Exception as error:
        lines = str(error).splitlines()
        return Answer("failed", f"{type(error).__name__}: {lines[0] if lines else ''}", traceback.format_exc())
    finally:
        jax.clear_caches()  # or every run's programs stay in memory; the next run finds them on disk
        gc.collect()


def _stop_with_parent() -> None:
    """Has the run saved and this process ended when the sweep's process is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # for a checkpoint; a worker between two runs has ended already
    os._exit(1)


def accelerators() -> list[str]:
    """The accelerators a worker each can have: indices of GPUs, or "tpu", all of whose chips belong to one process."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return [device for device in visible.split(",") if device.strip()]
        return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if importlib.util.find_spec("libtpu"):
        return ["tpu"] if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*") else []
    return []


def default_workers() -> int:
    """One a GPU, one for a TPU's chips, or else one a core: several runs on a core each beat one run on all cores."""
    return len(accelerators()) or len(_cores())


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _take_share(number: int, workers: int) -> None:
    """Limits this process to its part of the cores or GPUs. It must not have started JAX yet."""
    devices = accelerators()
    if "tpu" not in devices and len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    cores = _cores()
    if not devices and workers > 1 and hasattr(os, "sched_setaffinity"):
        own = cores[number * len(cores) // workers : (number + 1) * len(cores) // workers]
        os.sched_setaffinity(0, own or [cores[number % len(cores)]])
