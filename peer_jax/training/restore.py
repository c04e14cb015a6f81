"""Using a finished or half-finished run: its model, evaluations of other text, continuations of a prompt."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax

from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.pipeline import START_ID, TextTask
from peer_jax.errors import InputError
from peer_jax.models import Model, generate
from peer_jax.run_directory import RunDirectory
from peer_jax.sharding import current, use
from peer_jax.training import evaluators, room
from peer_jax.training.checkpoint import METRIC, Checkpoints
from peer_jax.training.result import add_evaluations
from peer_jax.training.run import Run
from peer_jax.training.step import Trainer, TrainState

logger = logging.getLogger(__name__)


def restore_model(run: Run, workdir: str | os.PathLike, checkpoint: str = "last") -> tuple[int, Model]:
    """The step and model, in evaluation mode, of a checkpoint: "last", "best" or a step.

    Raises:
        InputError: if there is no such checkpoint, or it can't be read.
    """
    trainer = run.trainer()
    step, state, _ = restore(trainer, workdir, checkpoint)
    return step, trainer.model(state)


def restore(trainer: Trainer, workdir: str | os.PathLike, checkpoint: str) -> tuple[int, TrainState, dict[str, Any]]:
    """The step, state and data position of a checkpoint, as ``restore_model`` finds it."""
    directory = RunDirectory(workdir)
    if not directory.checkpoints.is_dir():
        raise InputError(f"{directory} has no checkpoints: give the directory of a run", argument="workdir")
    abstract_state = trainer.abstract_state()
    with Checkpoints(directory.checkpoints, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state, _step(checkpoints, checkpoint))
        while restored is None and checkpoints.steps():  # a run that trains there has removed that checkpoint
            restored = checkpoints.restore(abstract_state, _step(checkpoints, checkpoint))
    if restored is None:
        raise InputError(f"{directory} holds no checkpoint: train first", argument="workdir")
    return restored


def _step(checkpoints: Checkpoints, checkpoint: str) -> int | None:
    """The step of "best" or of a number; None for "last"."""
    steps = checkpoints.steps()
    if checkpoint == "best":
        return checkpoints.best_step()
    if checkpoint == "last":
        return None
    if checkpoint.isdecimal() and int(checkpoint) in steps:
        return int(checkpoint)
    raise InputError(
        f"checkpoint {checkpoint!r} is not 'last', 'best' or one of the saved steps {steps}", argument="checkpoint"
    )


def evaluate_run(
    runs: Sequence[Run],
    workdir: str | os.PathLike,
    *,
    checkpoint: str = "last",
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[int, dict[str, Any]]:
    """Evaluates the model in ``workdir`` on the validation split of each run's task.

    Args:
        runs: the first makes the model; each names a text, or images, by its task.
        workdir: the run directory.
        checkpoint: "last", "best" or a step.
        batch_size: rows per batch; None: as each run has it.
        progress: show progress bars.

    Returns:
        The checkpoint's step, and for each task, by its corpus's name, what ``evaluate`` returns and the corpus's
        fingerprint. Evaluations of the last checkpoint are added to ``result.json``, if the run has one and they are of
        the model that it trained.
    """
    with use(runs[0].sharding.place()):
        step, evaluations = _evaluate_run(runs, workdir, checkpoint, batch_size, progress)
    add_evaluations(RunDirectory(workdir), step, evaluations, runs[0].config)
    return step, evaluations


def _evaluate_run(
    runs: Sequence[Run], workdir: str | os.PathLike, checkpoint: str, batch_size: int | None, progress: bool
) -> tuple[int, dict[str, Any]]:
    step, model = restore_model(runs[0], workdir, checkpoint)
    if batch_size is not None and current() is not None:
        current().check_rows("batch_size", batch_size)
    check_tasks(runs)
    measured = {}
    for run in runs:
        room.check_evaluation(model, batch_size=batch_size or run.eval_batch_size(), seq_len=run.task.seq_len)
        how = {"batch_size": batch_size or run.eval_batch_size(), "prepare_progress": progress, "progress": progress}
        evaluator = evaluators.of_task(run.task, METRIC, None, **how)
        measured[evaluator.name] = evaluator(model, ended=True)
    return step, measured


def check_tasks(runs: Sequence[Run]) -> None:
    """An InputError unless all tasks fit the first run's model, and have names of their own."""
    for run in runs:
        run.task.check_fits(runs[0].task, "the model")
    evaluators.check_names([run.task for run in runs])


def check_is_text(run: Run, done: str) -> None:
    """An InputError unless the run is of text; ``done`` says what can be done with text alone."""
    if not isinstance(run.task, TextTask):
        raise InputError(f"the run is of {run.task.corpus.name}, not of text, which alone can be {done}")


def continue_text(
    run: Run,
    workdir: str | os.PathLike,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    checkpoint: str = "last",
) -> str:
    """What the model writes after ``prompt``, until it ends the document or has made ``max_new_tokens``.

    Raises:
        InputError: if there is no such checkpoint, the run is not of text, or the prompt is no text.
    """
    check_is_text(run, "generated")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"prompt {prompt!r} is not UTF-8: give text", argument="prompt") from None
    _, model = restore_model(run, workdir, checkpoint)
    vocabulary = vocabularies.load(run.task.vocabulary)
    given = [START_ID, *vocabulary.encode(prompt)]
    (new,) = generate(
        model,
        [given],
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        eos_id=vocabulary.eos_id,
        key=jax.random.key(seed),
        use_cache=not model.mixes_tokens,
    )
    if len(given) + len(new) > run.task.seq_len:
        logger.warning(
            "the text has %d tokens, and the run was trained on rows of %d: what is beyond them may be poor",
            len(given) + len(new),
            run.task.seq_len,
        )
    return vocabularies.continuation(prompt, new, run.task.vocabulary)
