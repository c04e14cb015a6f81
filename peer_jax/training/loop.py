"""Training from beginning to end: mesh, model, data, restore, step by step, result."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from peer_jax.data.pipeline import TextTask, ensure_prepared, open_cache, train_batches
from peer_jax.errors import InputError, Interrupted, TryAgain
from peer_jax.lease import STALE
from peer_jax.ops import checked as with_checks
from peer_jax.processes import leads, together, wait_for_all
from peer_jax.run_directory import RunDirectory
from peer_jax.sharding import Placement, split_batch, use
from peer_jax.storage import is_in_bucket
from peer_jax.training import evaluators, growth, ownership, result, room
from peer_jax.training.checkpoint import METRIC, Checkpoints
from peer_jax.training.flops import training_flops
from peer_jax.training.meter import Clock, Meter
from peer_jax.training.metrics import MetricsLog, ProgressBar
from peer_jax.training.run import Grown, Run
from peer_jax.training.signals import StopOnSignal
from peer_jax.training.step import Metrics, Trainer, TrainState


def train(run: Run, workdir: str | os.PathLike, *, progress: bool = True, stale: float = STALE) -> dict[str, Any]:
    """Trains, from the last checkpoint in ``workdir`` if there is one, and writes ``result.json``, which it returns.

    All devices of all processes that ``peer_jax.processes`` has joined take part. The first process writes for all.

    Args:
        run: what to train. If it has a config, ``workdir`` keeps it as ``config.gin``, and is bound to it: the run goes
            on only with a config of the same identity.
        workdir: the run directory.
        progress: show progress bars.
        stale: seconds without a sign of life after which a process on another machine that trains in ``workdir`` has
            died. Then this one takes the run over.

    Raises:
        InUse: if a process that lives trains in ``workdir``.
        InputError: if a value, the data or what is in ``workdir`` can't be used.
        TrainingFailed: if the loss is not finite.
        Interrupted: on SIGTERM or SIGINT, when the state is saved.
    """
    directory = RunDirectory(workdir)
    placement = run.sharding.place(rows=run.batch_size // run.accumulation)
    with use(placement):
        return _train(run, directory, placement, progress and leads(), stale)


def _train(
    run: Run, directory: RunDirectory, placement: Placement | None, progress: bool, stale: float
) -> dict[str, Any]:
    with together():  # what one process refuses all refuse, and none waits for another that has ended
        _check_placement(run, placement)

        # Model.
        trainer = run.trainer()
        run.num_steps(trainer.abstract_model)  # refuses a run without a length before anything is prepared
        step_tokens = run.batch_size * run.task.seq_len
        step_flops = training_flops(trainer.abstract_model, step_tokens, run.task.seq_len)

        sizes = {"batch_size": run.batch_size, "accumulation": run.accumulation, "seq_len": run.task.seq_len}
        room.check_step(trainer.abstract_model, trainer.abstract_state(), **sizes)

    # Data. The first process prepares them, and the others find them if they share a cache.
    with together():
        for task in (run.task, *run.eval_tasks) if leads() else ():
            ensure_prepared(task, progress=progress)
    with together():
        cache = ensure_prepared(run.task, progress=progress)
        corpus = {"name": run.task.corpus.name, "cache": cache.name, "fingerprint": run.task.fingerprint()}
        source = open_cache(cache, "train")
        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = train_batches(source, batch_size=run.batch_size, seed=run.order_seed, **hosts)
        to_evaluate = evaluators.of_run(run, progress=progress)

    with contextlib.ExitStack() as stack:
        # The directory, and what it has of this run.
        ownership.check_same(run.config, corpus["fingerprint"])
        check_still_owned = stack.enter_context(ownership.owned(directory, stale))
        ownership.check_config(directory, run.config)
        if (finished := ownership.finished(directory)) is not None:
            _check_text(directory, corpus, finished["corpus"].get("fingerprint"), finished["steps"])
            return finished
        checkpoints = stack.enter_context(Checkpoints(directory.checkpoints, keep_last=run.keep_checkpoints))
        restored = checkpoints.restore(trainer.abstract_state())
        grows = restored is None and run.grown_from is not None
        if grows:
            beginning = {"text": corpus["fingerprint"], "batches": batches.get_state()}
            restored = growth.begin(run, trainer, beginning)
        start, state, position = restored or (0, None, {})
        grown = Grown(**position.get("grown", {}))
        with together():
            steps = run.num_steps(trainer.abstract_model, grown)
        ownership.keep_config(directory, run.config)
        if state is None:
            state = trainer.init(run.seed)
        if position:
            _check_text(directory, corpus, position.get("text"), start)
            batches.set_state(position["batches"])
        if grows:  # from now on, the run needs no other directory
            checkpoints.save(start, state, position)
        clock = Clock(**position.get("clock", {}))
        if isinstance(run.task, TextTask):
            ownership.keep_vocabulary(directory, run.task.vocabulary)

        # Steps.
        step_function = _step_function(run, trainer, state) if start < steps else None
        log = stack.enter_context(MetricsLog(directory, start, enabled=leads()))
        evaluations = evaluators.Evaluations(to_evaluate, start, steps, log)
        with StopOnSignal() as stop, ProgressBar("train", steps, start, enabled=progress) as bar:
            meter = Meter(
                log, bar, clock, checkpoints, log_every=run.log_every, step_tokens=step_tokens, step_flops=step_flops
            )
            evaluations.after(start, functools.partial(trainer.model, state))  # what a run that was stopped left undone
            for step in range(start + 1, steps + 1):
                rates = run.optimizer.rates(trainer.labels, step - 1, steps)
                batch = split_batch(next(batches))
                state, metrics = step_function(state, batch, rates)
                meter.add(step, metrics, rates)
                stopping = stop.requested()
                evaluating = evaluations.is_due(step) and not stopping
                saving = stopping or step == steps or step % run.checkpoint_every == 0
                if not (evaluating or saving):
                    continue

                check_still_owned()
                meter.flush()
                losses = evaluations.after(step, functools.partial(trainer.model, state)) if evaluating else {}
                if saving:
                    log.flush()  # so that nothing older than a checkpoint is lost
                    position |= {"text": corpus["fingerprint"], "batches": batches.get_state(), "clock": clock.state()}
                    checkpoints.save(step, state, position, losses.get(METRIC))
                if stopping:
                    raise _interrupted(stop, step, checkpoints)
                meter.resume()
            if not checkpoints.wait() or steps not in checkpoints.steps():
                kind = TryAgain if is_in_bucket(directory.path) else InputError
                raise kind(f"the last checkpoint could not be written to {directory}: free space and run again")
            if stop.signal_number is not None:  # it came after the last step
                raise _interrupted(stop, steps, checkpoints)

        # Result.
        measured = evaluations.finish(functools.partial(trainer.model, state))
        check_still_owned()
        time, since = clock.state(), steps - grown.steps
        return result.write(
            directory,
            {
                **result.describe_model(trainer.abstract_model, run.task.seq_len, grown),
                "seed": run.seed,
                "steps": steps,
                "batch_size": run.batch_size,
                "seq_len": run.task.seq_len,
                "tokens": grown.tokens + since * step_tokens,
                "training_flops": grown.training_flops + since * step_flops,
                "tokens_per_second": time["steps"] * step_tokens / time["step_seconds"] if time["steps"] else None,
                "wall_seconds": time["wall_seconds"],
                "epochs": batches.get_state()["next_index"] * run.batch_size / len(source),
                "corpus": corpus,
                "config": {} if run.config is None else dict(run.config.identity),
                "evaluations": measured,
            },
        )


def _step_function(run: Run, trainer: Trainer, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """The trainer's step, compiled in all processes, which would otherwise miss one another in a first collective."""
    if run.checked:
        return with_checks(trainer.step)
    batch = split_batch(run.task.example(run.batch_size // jax.process_count()))
    step = trainer.compiled_step().lower(state, batch, run.optimizer.rates(trainer.labels, 0, 1)).compile()
    wait_for_all()
    return step


def _check_placement(run: Run, placement: Placement | None) -> None:
    """An InputError if the run can't be split over the devices."""
    if placement is not None:
        placement.check_rows("Run.batch_size / Run.accumulation", run.batch_size // run.accumulation)
        if run.checked:
            raise InputError(f"Run.checked=True can't check what {placement.mesh.size} devices share: use one device")


def _check_text(directory: RunDirectory, corpus: dict[str, str], trained: str | None, steps: int) -> None:
    """An InputError if the directory's run was trained on another text; earlier versions did not always keep which."""
    if trained not in (None, corpus["fingerprint"]):
        raise InputError(
            f"{directory} has trained {steps} steps on another text than {corpus['name']!r} is now: bring its files "
            "back as they were, or choose another directory",
            argument="workdir",
        )


def _interrupted(stop: StopOnSignal, step: int, checkpoints: Checkpoints) -> Interrupted:
    """What to raise when a run has been asked to stop, once its checkpoint is written."""
    checkpoints.close()
    saved = checkpoints.steps()
    outcome = "and saved" if step in saved else f"but could not save it; there are checkpoints of {saved}"
    return Interrupted(stop.signal_number, f"stopped at step {step} {outcome}; the same command resumes")
