"""The evaluators of a run: objects in a list, each with an interval of its own, so that the loop knows none by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from peer_jax.data.pipeline import Rows, Task, ensure_prepared, open_cache
from peer_jax.errors import InputError
from peer_jax.models import Model
from peer_jax.training.checkpoint import METRIC
from peer_jax.training.evaluate import evaluate
from peer_jax.training.metrics import MetricsLog
from peer_jax.training.run import Run


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model during or after training.

    Attributes:
        name: its key among the evaluations of the result.
        metric: what the log calls the loss that it measures.
        every: steps between two evaluations, the last step always counting; None: only when training has ended.
    """

    name: str
    metric: str
    every: int | None

    def __call__(self, model: Model, *, ended: bool) -> dict[str, Any]:
        """What the result says of the model, ``loss`` included; at the end of training in more detail."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """The evaluator for the validation split of a task.

    Args:
        name, metric, every: see ``Evaluator``.
        source: the split.
        fingerprint: of the task's corpus.
        batch_size: rows per batch.
        progress: show a bar.
    """

    name: str
    metric: str
    every: int | None
    source: Rows
    fingerprint: str
    batch_size: int
    progress: bool = False

    def __call__(self, model: Model, *, ended: bool) -> dict[str, Any]:
        measured = evaluate(model, self.source, batch_size=self.batch_size, routing=ended, progress=self.progress)
        return measured | {"fingerprint": self.fingerprint}


def of_run(run: Run, *, progress: bool) -> list[Evaluator]:
    """An evaluator for the run's own task, which is evaluated during training, and one for each of ``eval_tasks``.

    Raises:
        InputError: if two of the texts have the same name, or if one can't be prepared.
    """
    check_names([run.task, *run.eval_tasks])
    how = {"batch_size": run.eval_batch_size(), "prepare_progress": progress}
    own = of_task(run.task, METRIC, run.evaluate_every, **how, progress=False)  # it has the bar of training beside it
    others = (of_task(task, f"{METRIC}/{task.corpus.name}", None, **how, progress=progress) for task in run.eval_tasks)
    return [own, *others]


def check_names(tasks: Sequence[Task]) -> None:
    """An InputError if two of the tasks to evaluate have texts of the same name."""
    names = [task.corpus.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two of the tasks to evaluate are named {twice!r}: rename a file or folder")


def of_task(
    task: Task, metric: str, every: int | None, *, batch_size: int, prepare_progress: bool, progress: bool
) -> Validation:
    """The evaluator for the validation split of a task, which is prepared first if need be."""
    return Validation(
        name=task.corpus.name,
        metric=metric,
        every=every,
        source=open_cache(ensure_prepared(task, progress=prepare_progress), "validation"),
        fingerprint=task.fingerprint(),
        batch_size=batch_size,
        progress=progress,
    )


class Evaluations:
    """Calls the evaluators of a run that are due, and writes each loss to the log once.

    A run that was stopped or killed between a checkpoint and its evaluation makes the evaluation up when it goes on:
    what the log lacks is due.

    Args:
        evaluators: of the run.
        start: the step that the run goes on from; 0 for a new run.
        steps: the length of the run.
        log: gets the losses.
    """

    def __init__(self, evaluators: Sequence[Evaluator], start: int, steps: int, log: MetricsLog) -> None:
        self._evaluators, self._steps, self._log = evaluators, steps, log
        self._logged = {(start, name) for name in log.found}
        self.at_end: dict[str, dict[str, Any]] = {}  # what was measured of the trained model, by evaluator

    def is_due(self, step: int) -> bool:
        """Whether anything is to be evaluated within training, after ``step``."""
        return bool(self._due(step))

    def after(self, step: int, model: Callable[[], Model]) -> dict[str, float]:
        """Evaluates what is due after ``step``; the losses by the names that they have in the log."""
        return self._evaluate(step, self._due(step), model)

    def finish(self, model: Callable[[], Model]) -> dict[str, dict[str, Any]]:
        """Evaluates the trained model by all evaluators that have not done so; what each has measured, by its name."""
        due = [evaluator for evaluator in self._evaluators if evaluator.name not in self.at_end]
        self._evaluate(self._steps, due, model)
        return self.at_end

    def _due(self, step: int) -> list[Evaluator]:
        return [
            evaluator
            for evaluator in self._evaluators
            if evaluator.every is not None
            and step > 0
            and (step % evaluator.every == 0 or step == self._steps)
            and (step, evaluator.metric) not in self._logged
        ]

    def _evaluate(self, step: int, evaluators: Sequence[Evaluator], model: Callable[[], Model]) -> dict[str, float]:
        losses = {}
        for evaluator in evaluators:
            measured = evaluator(model(), ended=step == self._steps)
            losses[evaluator.metric] = measured["loss"]
            if step == self._steps:
                self.at_end[evaluator.name] = measured
            if (step, evaluator.metric) not in self._logged:
                self._logged.add((step, evaluator.metric))
                scores = {name: measured[name] for name in ("loss", "accuracy") if name in measured}
                self._log.write(step, {evaluator.metric.replace("loss", name, 1): scores[name] for name in scores})
        return losses
