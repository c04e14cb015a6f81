"""A slice: processes under ``jax.distributed`` that train the runs of a sweep one by one, on all of their devices.

The first process hands out the runs, as the process of a sweep does for its workers, and trains along. The others hear
from it what to train, and know nothing else of the sweep.
"""

import base64
import contextlib
import itertools
import json
import pickle
import time
from collections.abc import Iterator
from typing import Any

import jax

from peer_jax import memory
from peer_jax.errors import InputError, Interrupted, TrainingFailed, TryAgain
from peer_jax.processes import WAIT, gather, leads, settle
from peer_jax.run_directory import RunDirectory
from peer_jax.sweeps.tasks import Answer, Task, do
from peer_jax.training.signals import StopOnSignal

PATIENCE = 60  # seconds that a process whose run has failed waits for the others to fail, too
STOPPED = ("failed", "later")  # states of a run that some processes may still be training


class _OutOfStep(TryAgain):
    """A run has failed in some processes only, so that the processes can't go on together."""


class Slice:
    """The processes of this slice, which do one task at a time; ``workers.Workers`` has the same methods.

    Only the first process has one. The others ``follow``.

    Args:
        load: makes a run, see ``plan.Load``.
        pause: seconds between two looks for runs, while other slices train all that are left.
    """

    def __init__(self, load: Any, pause: float) -> None:
        self._load, self._pause = load, pause
        self._task: Task | None = None
        self._turns = itertools.count()

    @property
    def is_busy(self) -> bool:
        """Whether a task was given."""
        return self._task is not None

    @property
    def is_free(self) -> bool:
        """Whether a task can be given."""
        return self._task is None

    def give(self, task: Task) -> None:
        """Has ``answers`` do a task."""
        self._task = task

    def answers(self) -> list[tuple[Task, Answer]]:
        """Does the task that was given; if there is none, waits."""
        task, self._task = self._task, None
        turn, _ = next(self._turns), _told((self._load, task))
        if task is None:
            time.sleep(self._pause)
            return []
        return [(task, _train(self._load, task, turn))]

    def stop(self) -> list[tuple[Task, Answer]]:
        """Nothing is being trained between two calls of ``answers``."""
        return []

    def kill(self) -> None:
        """Nothing is being trained between two calls of ``answers``."""


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """The first process tells the others, at the end of this block, that the sweep has ended, and how."""
    try:
        yield
    except _OutOfStep:
        raise
    except (InputError, TrainingFailed, Interrupted) as error:
        _told(error)
        raise
    _told(None)


def follow() -> None:
    """Trains what the first process says, until it says that the sweep has ended.

    Raises:
        InputError, TrainingFailed, Interrupted: as the first process does.
    """
    with StopOnSignal() as stop:
        for turn in itertools.count():
            stop.requested()  # the first process asks now, too, and says so if the sweep is to end
            told = _told()
            if isinstance(told, Exception):
                raise told
            if told is None:
                return
            load, task = told
            if task is not None:
                _train(load, task, turn)


def memory_of_slice() -> int | None:
    """Bytes of memory that all devices of the slice have together; None if unknown."""
    there = memory.of_device()
    return None if there is None else there * jax.device_count()


def _told(message: Any = None) -> Any:
    """The message of the first process, in all of them."""
    text = base64.b64encode(pickle.dumps(message)).decode() if leads() else ""
    return pickle.loads(base64.b64decode(gather(text)[0]))


def _train(load: Any, task: Task, turn: int) -> Answer:
    """Does a task in all processes; the answer on which they agree.

    Raises:
        TryAgain: if the run has failed in some of them only. The failure is kept in the directory of the run.
    """
    own = do(task, load)
    told, in_step = settle(f"turn-{turn}", json.dumps(vars(own)), PATIENCE if own.state in STOPPED else WAIT)
    answers = [Answer(**json.loads(text)) for text in told]
    answer = next((answer for answer in answers if answer.state in STOPPED), answers[0])
    if not in_step:
        run = RunDirectory(task.workdir)
        if answer.state == "failed" and (leads() or len(answers) == 1):
            with contextlib.suppress(InputError):  # of a bucket that does not answer either
                run.write_failure(answer.reason, answer.details)
        raise _OutOfStep(
            f"{run.name} has failed in some processes only: {answer.reason}: start all processes again, and the sweep "
            "goes on with the other runs first"
        )
    return answer
