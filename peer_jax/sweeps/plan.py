"""What a sweep would do: its runs, built without memory, with their sizes, FLOPs, steps and passes over the corpus."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from peer_jax import memory
from peer_jax.data.pipeline import Task, TextTask
from peer_jax.errors import InputError
from peer_jax.fields import RunConfig
from peer_jax.gin_syntax import Binding
from peer_jax.run_directory import SweepDirectory
from peer_jax.sweeps.sweep import Point, Sweep
from peer_jax.training import room
from peer_jax.training.flops import training_flops
from peer_jax.training.ownership import check_begun
from peer_jax.training.run import Run
from peer_jax.training.step import Trainer

Load = Callable[[Sequence[str], Sequence[Binding], Sequence[str]], Run]
"""Makes a run, with its config, from files, bindings and names of modules to import.

It must be a function at the top of a module, so that it can be pickled.
"""

# Fields that do not change the compiled program of a run.
NOT_COMPILED = {
    *("Run.seed", "Run.data_seed", "Run.steps", "Run.training_flops", "Run.eval_tasks", "Run.log_every"),
    *("Run.evaluate_every", "Run.checkpoint_every", "Run.keep_checkpoints"),
}
# Fields that do not change the trainer of a run.
NOT_OF_TRAINER = {"Run.seed", "Run.data_seed", "Run.steps", "Run.training_flops", "Run.batch_size"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run before it starts.

    Runs with the same ``program`` can share one compiled program. ``step_bytes`` is the least memory that a step takes
    on all devices of a worker together. ``corpus_tokens`` is the size of the task's training split: exact once the
    task is prepared, an estimate before, None if nothing is known.
    """

    point: Point
    config: RunConfig
    is_causal: bool
    params_total: int
    params_active: int
    flops_per_token: float
    steps: int
    step_tokens: int
    step_flops: float
    step_bytes: int
    program: str
    task: Task
    corpus_tokens: int | None
    is_prepared: bool

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def training_flops(self) -> float:
        return self.steps * self.step_flops

    @property
    def epochs(self) -> float | None:
        if self.corpus_tokens is None:
            return None
        return self.tokens / self.corpus_tokens if self.corpus_tokens else math.inf


def plan(points: Sequence[Point], load: Load) -> list[Planned]:
    """Builds every run abstractly. Settings that a run doesn't use are dropped; runs that are the same are listed once.

    Raises:
        InputError: if a run can't be built, or two runs would have the same name. The message names the run.
    """
    planned: dict[tuple[str, str, str], Planned] = {}
    trainers: dict[frozenset, Trainer] = {}
    corpora: dict[Task, tuple[int | None, bool]] = {}
    for point in points:
        try:
            run = _build(point, load, trainers, corpora)
        except InputError as error:
            raise InputError(f"{point.name}: {error}") from error
        planned.setdefault((point.method, point.size, run.config.text), run)
    names = [run.point.name for run in planned.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two runs of the sweep would be named {twice[0]!r}: give their sizes or budgets other labels")
    return list(planned.values())


def _build(
    point: Point,
    load: Load,
    trainers: dict[frozenset, Trainer],
    corpora: dict[Task, tuple[int | None, bool]],
) -> Planned:
    run = load(point.files, point.bindings, point.imports)
    if run.grown_from is not None:
        raise InputError(
            f"Run.grown_from={run.grown_from!r} can't be part of a sweep, whose runs begin anew: grow the run by "
            "peer-jax train --grow"
        )
    # Building abstract models takes most of the time of planning, so runs that differ in nothing else share a trainer.
    same = frozenset(field for field in run.config.identity.items() if field[0] not in NOT_OF_TRAINER)
    same |= {("Run.accumulation", str(run.accumulation)), *map(str, run.task.model_sizes().items())}
    if same not in trainers:
        trainers[same] = run.trainer()
    trainer = trainers[same]
    model, seq_len = trainer.abstract_model, run.task.seq_len
    steps, step_tokens = run.num_steps(model), run.batch_size * seq_len
    state = trainer.abstract_state()
    if run.task not in corpora:
        corpora[run.task] = _corpus_tokens(run.task)
    corpus_tokens, is_prepared = corpora[run.task]
    used = {name: value for name, value in point.settings.items() if run.config.uses(name)}
    return Planned(
        point=dataclasses.replace(point, settings=used),
        config=run.config,
        is_causal=model.is_causal is not False,
        params_total=model.num_params(),
        params_active=model.num_active_params(),
        flops_per_token=model.flops_per_token(seq_len),
        steps=steps,
        step_tokens=step_tokens,
        step_flops=training_flops(model, step_tokens, seq_len),
        step_bytes=room.step_bytes(
            model, state, batch_size=run.batch_size, accumulation=run.accumulation, seq_len=seq_len
        ),
        program=_program(run, state),
        task=run.task,
        corpus_tokens=corpus_tokens,
        is_prepared=is_prepared,
    )


def _program(run: Run, state: object) -> str:
    """A digest of what a run compiles: shapes, and the fields that are built into the step."""
    schedule = getattr(run.optimizer, "schedule_arguments", ())
    left_out = NOT_COMPILED | {f"{type(run.optimizer).__name__}.{name}" for name in schedule}
    fields = {name: value for name, value in run.config.fields.items() if name not in left_out}
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    return hashlib.sha256(f"{shapes} {sorted(fields.items())}".encode()).hexdigest()[:12]


def _corpus_tokens(task: Task) -> tuple[int | None, bool]:
    """The number of training tokens of a task, padding included, and whether the task is prepared.

    Before a task is prepared, the number is an estimate; None if nothing is known.
    """
    if (rows := task.prepared_rows()) is not None:
        return rows * task.seq_len, True
    return task.train_tokens(), False


def check(sweep: Sweep, planned: Sequence[Planned]) -> list[str]:
    """Returns sentences to print before a sweep starts.

    Raises:
        InputError: if a run is too short to mean anything, or needs more text than the corpus has.
    """
    for run in planned:
        if run.steps < sweep.min_steps:
            raise InputError(
                f"{run.point.name} would make {run.steps} steps, fewer than Sweep.min_steps={sweep.min_steps}: "
                "raise its budget, lower Run.batch_size, or leave out its size"
            )
        if run.epochs is not None and run.epochs > sweep.max_epochs:
            raise InputError(
                f"{run.point.name} would read {run.tokens:.3g} tokens, {run.epochs:.1f} times the "
                f"{run.corpus_tokens:.3g} of {run.task.corpus.name}, but Sweep.max_epochs={sweep.max_epochs:g}: "
                "lower its budget, leave out its size, or take a larger corpus"
            )
    notes = []
    if repeating := [run for run in planned if (run.epochs or 0) > 1]:
        most = max(repeating, key=lambda run: run.epochs)
        notes.append(
            f"{len(repeating)} of {len(planned)} runs read {most.task.corpus.name} more than once; {most.point.name} "
            f"reads it {most.epochs:.1f} times."
        )
        if isinstance(most.task, TextTask):
            notes[-1] += " Up to 4 times, repeated text is nearly as good as new text (arXiv:2305.16264)."
    if any(run.corpus_tokens is None for run in planned):
        notes.append("How large the corpus is isn't known before `peer-jax prepare`: epochs are left blank.")
    elif not all(run.is_prepared for run in planned):
        notes.append("The corpus is not prepared yet: its size, and so the epochs, are estimates.")
    return notes


def check_room(planned: Sequence[Planned], there: int | None) -> None:
    """Raises InputError if runs can't fit the memory of a worker's devices.

    Args:
        planned: the runs that are to be trained.
        there: bytes of that memory; None if unknown, so that each run is checked when its worker begins it.
    """
    too_large = [run for run in planned if there is not None and run.step_bytes > there]
    if too_large:
        largest = max(too_large, key=lambda run: run.step_bytes)
        raise InputError(
            f"{len(too_large)} of {len(planned)} runs don't fit a worker, whose devices have {memory.shown(there)} of "
            f"memory: a training step of {largest.point.name} takes at least {memory.shown(largest.step_bytes)}; leave "
            "out its size, lower Run.batch_size, or raise Run.accumulation"
        )


def check_begun_runs(planned: Sequence[Planned], directory: SweepDirectory) -> None:
    """Raises InputError if a run was begun in the directory with another config than is planned now."""
    for run in planned:
        check_begun(directory.run(run.point.name), run.config)


def step_seconds(planned: Sequence[Planned], measured: Mapping[str, float]) -> dict[str, float | None]:
    """Seconds per step of every program, from the measured seconds of some programs.

    Between two measured sizes of a method, seconds follow FLOPs by a power law; beyond them they are proportional to
    FLOPs. The seconds are None where no program of the method was measured.
    """
    estimates: dict[str, float | None] = {}
    for run in planned:
        same_method = (r for r in planned if r.point.method == run.point.method and r.program in measured)
        own = sorted({(r.step_flops, measured[r.program]) for r in same_method})
        if run.program in measured:
            estimates[run.program] = measured[run.program]
        elif not own:
            estimates[run.program] = None
        else:
            flops, seconds = np.array(own).T
            near = np.clip(run.step_flops, flops[0], flops[-1])
            at_near = np.exp(np.interp(np.log(near), np.log(flops), np.log(seconds)))
            estimates[run.program] = float(at_near * run.step_flops / near)
    return estimates


def to_measure(planned: Sequence[Planned]) -> list[Planned]:
    """The runs to measure: for each method, those with the fewest and the most FLOPs per step. Others are estimated."""
    chosen: dict[str, Planned] = {}
    for method in dict.fromkeys(run.point.method for run in planned):
        own = [run for run in planned if run.point.method == method]
        for run in (min(own, key=lambda r: r.step_flops), max(own, key=lambda r: r.step_flops)):
            chosen.setdefault(run.program, run)
    return list(chosen.values())
