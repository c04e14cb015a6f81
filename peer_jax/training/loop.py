"""Training from beginning to end: data, model, restore, step by step, evaluate, result."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import jax
from flax import nnx
from jax.experimental import multihost_utils

from peer_jax.data.pipeline import TextTask, ensure_prepared, open_cache, train_batches, vocabulary_size
from peer_jax.errors import InputError, Interrupted, TrainingFailed
from peer_jax.fields import Bookkeeping, Gives, Placed, RunConfig
from peer_jax.layers.interface import check_positive
from peer_jax.models import Transformer
from peer_jax.ops import checked as with_checks
from peer_jax.processes import leads
from peer_jax.sharding import Placement, Sharding, current, split_batch, use
from peer_jax.training import workdir as workdirs
from peer_jax.training.checkpoint import Checkpoints
from peer_jax.training.evaluate import evaluate
from peer_jax.training.flops import steps_for, training_flops
from peer_jax.training.metrics import MetricsLog, ProgressBar
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Metrics, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, on what, for how long. One of ``steps`` and ``training_flops`` sets the length.

    Args:
        model: makes the transformer, ``model(vocab_size, rngs=)``.
        optimizer: its hyperparameters.
        task: the text to train on; its validation split is always evaluated.
        eval_tasks: further tasks whose validation splits are evaluated at the end.
        batch_size: rows a step.
        steps: updates.
        training_flops: budget; the steps that come nearest to it are made.
        seed: of the parameters and the order of the data.
        accumulation: micro-batches a step is split into.
        log_every, evaluate_every, checkpoint_every: steps between them; the last step always counts.
        keep_checkpoints: last ones to keep, beside the best.
        checked: raise on indices out of range and NaN scores inside the ops, on one device; slower.
        sharding: how many devices share what.
    """

    model: Annotated[Callable[..., Transformer], Gives(vocab_size="TextTask.vocabulary", rngs="Run.seed")]
    optimizer: AdamW
    task: TextTask
    eval_tasks: Bookkeeping[Sequence[TextTask]] = ()
    batch_size: int
    steps: int | None = None
    training_flops: float | None = None
    seed: int = 0
    accumulation: Placed[int] = 1
    log_every: Bookkeeping[int] = 10
    evaluate_every: Bookkeeping[int] = 1000
    checkpoint_every: Bookkeeping[int] = 1000
    keep_checkpoints: Bookkeeping[int] = 2
    checked: Bookkeeping[bool] = False
    sharding: Placed[Sharding] = dataclasses.field(default_factory=Sharding)
    config: RunConfig | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints")
        lengths = ("steps", "training_flops")
        check_positive(**{name: getattr(self, name) for name in sizes})
        check_positive(**{name: getattr(self, name) for name in lengths if getattr(self, name) is not None})
        if self.steps is not None and self.training_flops is not None:
            raise InputError(f"steps={self.steps} and training_flops={self.training_flops}: give only one of them")
        for task in self.eval_tasks:
            if task.vocabulary != self.task.vocabulary:
                raise InputError(
                    f"eval_tasks has vocabulary {task.vocabulary!r}, but the model's is {self.task.vocabulary!r}"
                )
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed!r}; give a whole number from 0 to 2**32 - 1.")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size={self.batch_size} does not divide into accumulation={self.accumulation}")

    def trainer(self) -> Trainer:
        """The functions of this run."""
        vocab_size = vocabulary_size(self.task.vocabulary)

        def build(*, rngs: nnx.Rngs) -> nnx.Module:
            return self.model(vocab_size, rngs=rngs)

        return Trainer(build, self.optimizer, accumulation=self.accumulation)

    def eval_batch_size(self) -> int:
        """Rows at a time in evaluation: a batch, but at least 4096 tokens, or small ones would take long."""
        rows = max(self.batch_size, -(-4096 // self.task.seq_len))
        return rows if current() is None else current().round_up(rows)

    def num_steps(self, model: Transformer) -> int:
        """Updates to make, given or from the budget.

        Raises:
            InputError: if neither is given, which is only needed to train; or if the budget is less than a step.
        """
        if self.steps is not None:
            return self.steps
        if self.training_flops is None:
            raise InputError("steps=None and training_flops=None: give one of them, the length of the run")
        return steps_for(self.training_flops, model, self.batch_size, self.task.seq_len)


def train(run: Run, workdir: Path, *, config: Callable[[], str] | None = None, progress: bool = True) -> dict[str, Any]:
    """Trains, from the last checkpoint in ``workdir`` if there is one, and writes ``result.json``, which it returns.

    All devices of all processes that ``peer_jax.processes`` has joined take part; the first process writes.

    Args:
        run: what to train.
        workdir: the run directory.
        config: the text of the config, asked for once everything is built; kept as ``config.gin``.
        progress: show progress bars.

    Raises:
        InputError: if a value, the data or what is in ``workdir`` can't be used.
        TrainingFailed: if the loss is not finite.
        Interrupted: on SIGTERM or SIGINT, when the state is saved.
    """
    placement = run.sharding.place(rows=run.batch_size // run.accumulation)
    with use(placement):
        return _train(run, workdir, placement, config, progress and leads())


def _train(
    run: Run, workdir: Path, placement: Placement | None, config: Callable[[], str] | None, progress: bool
) -> dict[str, Any]:
    if placement is not None:
        placement.check_rows("Run.batch_size / Run.accumulation", run.batch_size // run.accumulation)
        if run.checked:
            raise InputError(f"Run.checked=True can't check what {placement.mesh.size} devices share: use one device")
    trainer = run.trainer()
    model = trainer.abstract_model
    steps = run.num_steps(model)
    step_tokens = run.batch_size * run.task.seq_len
    step_flops = training_flops(model, step_tokens, run.task.seq_len)

    cache = ensure_prepared(run.task, progress=progress)
    fingerprint = run.task.fingerprint()
    text = open_cache(cache, "train")
    batches = train_batches(
        text,
        batch_size=run.batch_size,
        seed=run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    tasks = {run.task.corpus.name: run.task}
    for task in run.eval_tasks:
        if task.corpus.name in tasks:
            raise InputError(f"two of the tasks to evaluate are named {task.corpus.name!r}: rename a file or folder")
        tasks[task.corpus.name] = task
    validation = {
        name: open_cache(ensure_prepared(task, progress=progress), "validation") for name, task in tasks.items()
    }
    own_validation = validation[run.task.corpus.name]

    abstract_state = trainer.abstract_state()
    text_of_config = None if config is None else config()
    if text_of_config is not None:
        workdirs.check_same(text_of_config)
    with workdirs.owned(workdir):
        checkpoints = Checkpoints(workdir / "checkpoints", keep_last=run.keep_checkpoints)
        restored = checkpoints.restore(abstract_state)
        if text_of_config is not None:
            workdirs.keep_config(workdir, text_of_config)
        if (result := workdirs.read_result(workdir)) is not None:
            checkpoints.close()
            return result
        start, state, position = restored or (0, trainer.init(run.seed), None)
        if position:
            if position.get("text", fingerprint) != fingerprint:
                raise InputError(
                    f"{workdir} has trained {start} steps on another text than {run.task.corpus.name!r} is now: "
                    "bring its files back as they were, or choose another --workdir"
                )
            batches.set_state(position["batches"])
        clock = Clock(**position["clock"]) if position else Clock()
        validation_due = bool(position) and position["validation_due"]
        evaluations = {}

        step_function = with_checks(trainer.step) if run.checked else trainer.compiled_step()
        with (
            StopOnSignal() as stop,
            MetricsLog(workdir, start, validation_due=validation_due, enabled=leads()) as log,
            ProgressBar("train", steps, start, enabled=progress) as bar,
        ):
            if validation_due:
                loss = evaluate(trainer.model(state), own_validation, batch_size=run.eval_batch_size(), routing=False)[
                    "loss"
                ]
                log.write(start, {"validation_loss": loss})
            meter = Meter(log, bar, clock, checkpoints, run.log_every, step_tokens, step_flops)
            for step in range(start + 1, steps + 1):
                rates = run.optimizer.rates(trainer.labels, step - 1, steps)
                state, metrics = step_function(state, split_batch(next(batches)), rates)
                meter.add(step, metrics, rates)
                last, stopping = step == steps, stop.requested(step)
                validating = last or step % run.evaluate_every == 0
                evaluating = validating and not stopping
                saving = last or step % run.checkpoint_every == 0 or stopping
                if not (evaluating or saving):
                    continue

                meter.flush()
                loss = None
                if evaluating:
                    measured = evaluate(
                        trainer.model(state), own_validation, batch_size=run.eval_batch_size(), routing=last
                    )
                    loss = measured["loss"]
                    log.write(step, {"validation_loss": loss})
                    if last:
                        evaluations[run.task.corpus.name] = measured | {"fingerprint": fingerprint}
                if saving:
                    position = {
                        "text": fingerprint,
                        "batches": batches.get_state(),
                        "clock": clock.state(),
                        "validation_due": validating and stopping,
                    }
                    checkpoints.save(step, state, position, loss)
                if stopping:
                    checkpoints.close()
                    saved = checkpoints.steps()
                    outcome = (
                        "and saved" if step in saved else f"but could not save it; there are checkpoints of {saved}"
                    )
                    raise Interrupted(stop.signal_number, f"stopped at step {step} {outcome}; the same command resumes")
                meter.resume()
            if not checkpoints.wait() or steps not in checkpoints.steps():
                raise InputError(f"the last checkpoint could not be written to {workdir}: free space and run again")

        for name, source in validation.items():
            if name not in evaluations:
                measured = evaluate(trainer.model(state), source, batch_size=run.eval_batch_size(), progress=progress)
                evaluations[name] = measured | {"fingerprint": tasks[name].fingerprint()}
        checkpoints.close()
    return workdirs.write_result(
        workdir,
        {
            **workdirs.describe_model(model, run.task.seq_len),
            "seed": run.seed,
            "steps": steps,
            "batch_size": run.batch_size,
            "seq_len": run.task.seq_len,
            "tokens": steps * step_tokens,
            "training_flops": steps * step_flops,
            "tokens_per_second": clock.steps * step_tokens / clock.step_seconds if clock.steps else None,
            "wall_seconds": clock.wall_seconds,
            "epochs": steps * run.batch_size / len(text),
            "corpus": {
                "name": run.task.corpus.name,
                "cache": cache.name,
                "fingerprint": fingerprint,
            },
            "evaluations": evaluations,
        },
    )


def non_finite(step: int, values: dict[str, float], checkpoints: Checkpoints) -> TrainingFailed:
    """What to say when a step has made NaN or infinity."""
    checkpoints.wait()
    steps = checkpoints.steps()
    saved = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    return TrainingFailed(
        f"step {step} has {shown}; {saved}. Try a lower learning_rate or table_learning_rate, more warmup_steps or a "
        "smaller clip_norm; Run.checked=True tells where NaN starts"
    )


@dataclasses.dataclass
class Clock:
    """Time spent, over all processes that worked on a run. Step times leave out compilation and evaluation."""

    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self._last = time.perf_counter()

    def state(self) -> dict[str, float]:
        """The fields, with the time up to now."""
        now = time.perf_counter()
        self.wall_seconds += now - self._last
        self._last = now
        return dataclasses.asdict(self)


class Meter:
    """Reads a step's metrics while the next step runs, so that the device never waits; checks and logs them."""

    def __init__(
        self,
        log: MetricsLog,
        bar: ProgressBar,
        clock: Clock,
        checkpoints: Checkpoints,
        log_every: int,
        step_tokens: int,
        step_flops: float,
    ) -> None:
        self._checkpoints = checkpoints
        self._log, self._bar, self._clock, self._log_every = log, bar, clock, log_every
        self._step_tokens, self._step_flops = step_tokens, step_flops
        self._pending: tuple[int, Metrics, dict[str, float]] | None = None
        self._since: float | None = None
        self._recent: list[float] = []

    def add(self, step: int, metrics: Metrics, rates: dict[str, float]) -> None:
        """Takes the metrics of the step just started, and reads those of the one before."""
        self.flush()
        self._pending = (step, metrics, rates)

    def flush(self) -> None:
        """Waits for the last step and reads its metrics.

        Raises:
            TrainingFailed: if its loss, or the norm of its gradient or of the parameters, isn't finite.
        """
        if self._pending is None:
            return
        (step, metrics, rates), self._pending = self._pending, None
        watched = {name: float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")}
        loss = watched["loss"]
        self._tick()
        if not all(math.isfinite(value) for value in watched.values()):
            raise non_finite(step, watched, self._checkpoints)
        speed = self._step_tokens * len(self._recent) / sum(self._recent) if self._recent else None
        if step % self._log_every == 0 or step == 1:
            scalars = {name: float(value) for name, value in metrics.items()}
            scalars |= {f"learning_rate/{label}": rate for label, rate in rates.items()}
            if speed is not None:
                scalars["tokens_per_second"] = speed
                scalars["model_flops_per_second"] = speed / self._step_tokens * self._step_flops
                self._recent.clear()
            self._log.write(step, scalars)
        self._bar.update(step, f"loss {loss:.4f}" + (f"  {speed:,.0f} tokens/s" if speed else ""))

    def resume(self) -> None:
        """Time starts to count again, after something that is not a step."""
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._since is not None:  # the first step compiles
            self._recent.append(now - self._since)
            self._clock.step_seconds += now - self._since
            self._clock.steps += 1
        self._since = now


class StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a request; a second SIGINT interrupts at once.

    Of several processes one that is asked is enough: JAX's preemption service, which has SIGTERM then, lets them agree
    on a step.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        try:
            self._before = {number: signal.signal(number, self._request) for number in numbers}
        except ValueError:  # not in the main thread: the signals are its caller's
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer in all processes, which all ask after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal_number = number
