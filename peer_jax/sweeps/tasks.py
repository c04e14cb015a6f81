"""What is to be done with a run of a sweep, by a worker process or by all processes of a slice, and what came of it."""

import dataclasses
import gc
import traceback
from typing import Any

from peer_jax import startup
from peer_jax.errors import InputError, Interrupted, InUse, TrainingFailed, TryAgain
from peer_jax.gin_syntax import Binding
from peer_jax.lease import STALE


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked for: to train a run in its directory, or, without a directory, to measure its speed.

    ``stale`` is after how many seconds a process on another machine has died, see ``training.loop.train``.
    """

    files: tuple[str, ...]
    bindings: tuple[Binding, ...]
    imports: tuple[str, ...]
    workdir: str | None = None
    stale: float = STALE


@dataclasses.dataclass(frozen=True)
class Answer:
    """A task's outcome: "begun", "finished" (with seconds per step, if asked), "failed" or "interrupted"; "busy" if
    another process trains the run, and "later" if something does not answer that may do so later.
    """

    state: str
    reason: str = ""
    details: str = ""
    seconds: float | None = None


def do(task: Task, load: Any) -> Answer:
    """Does a task. Whatever goes wrong becomes the answer.

    Args:
        task: what to do.
        load: makes a run from files, bindings and imports, see ``plan.Load``.
    """
    import jax  # imported here, so that a worker can answer before

    from peer_jax.sweeps.speed import seconds_per_step
    from peer_jax.training.loop import train

    try:
        run = load(task.files, task.bindings, task.imports)
        if task.workdir is None:
            return Answer("finished", seconds=seconds_per_step(run))
        train(run, task.workdir, progress=False, stale=task.stale)
        return Answer("finished")
    except Interrupted as stopped:
        return Answer("interrupted", str(stopped))
    except InUse as error:
        return Answer("busy", str(error))
    except TryAgain as error:
        return Answer("later", str(error))
    except (InputError, TrainingFailed) as error:
        return Answer("failed", " ".join(str(error).split()))
    except Exception as error:
        if refused := startup.refusal_of_a_bucket(error):
            return Answer("later" if isinstance(refused, TryAgain) else "failed", str(refused))
        lines = str(error).splitlines()
        return Answer("failed", f"{type(error).__name__}: {lines[0] if lines else ''}", traceback.format_exc())
    finally:
        jax.clear_caches()  # otherwise the programs of all runs stay in memory; the next run finds them on disk
        gc.collect()
