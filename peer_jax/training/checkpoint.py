"""Checkpoints of a run: saved asynchronously and atomically, restored from the newest one that is whole."""

import functools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from peer_jax.errors import InputError, InUse, TrainingFailed, TryAgain
from peer_jax.processes import gather, leads, together, wait_for_all
from peer_jax.storage import check_room, is_in_bucket, make_folder, place, refusal, set_aside
from peer_jax.storage import fault as storage_fault
from peer_jax.training import checkpoint_files as files
from peer_jax.training.checkpoint_files import METRIC

logger = logging.getLogger(__name__)

NO_DIGESTS = (
    "the checkpoint of step %d is of an earlier version, which wrote no digests: changed bytes in it are not noticed"
)
UNFINISHED = (
    "the checkpoint of step %d in %s has no %s and is passed over: either it is not finished, or it was copied without "
    "that file"
)


class Checkpoints:
    """The ``checkpoints`` folder of a run, to be closed after use or used as a context manager.

    A checkpoint holds ``state`` (parameters, optimiser, batch-norm statistics, random streams, step), ``data`` (the
    position in the data), digests of its files and, if the model was evaluated at that step, the validation loss that
    decides which checkpoint is best.

    Args:
        directory: the folder.
        keep_last: how many of the last checkpoints are kept, beside the best.
        read_only: change nothing in the folder, which exists.

    Raises:
        InputError: in all processes, if the folder can't be made.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, read_only: bool = False) -> None:
        self.directory = place(directory, "workdir")
        if not is_in_bucket(self.directory):
            self.directory = self.directory.absolute()
        self._keep_last, self._read_only = keep_last, read_only
        self._closed = False
        self._writing = 0
        with together():
            if leads() and not read_only:
                make_folder(self.directory, "workdir")

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which writes checkpoints and removes old ones. Nothing is read through it."""
        self._tidy()
        policies = [
            checkpoint_managers.LatestN(self._keep_last),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        return ocp.CheckpointManager(
            self.directory,
            item_names=("state", "data"),
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics[METRIC],  # has Orbax write the metrics; the policies decide
                best_mode="min",
                # In a bucket, _tidy knows better what is unfinished.
                cleanup_tmp_directories=not is_in_bucket(self.directory),
                # Called in the first process when all files are written, before the checkpoint is a finished one.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=lambda: files.write_digests(self.directory, self._writing)
                ),
            ),
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return files.finished_steps(self.directory)

    def save(self, step: int, state: Any, data: Mapping[str, Any], validation_loss: float | None = None) -> bool:
        """Starts to write a checkpoint and returns whether it could.

        If it could not, it logs a warning instead of raising: a disk may be full for a while only.
        """
        text = json.dumps(dict(data), sort_keys=True)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"text": text, "crc32": zlib.crc32(text.encode())}),
        )
        metrics = None if validation_loss is None else {METRIC: validation_loss}

        def start() -> None:
            self._writing = step
            self._manager.save(step, args=arguments, metrics=metrics)

        for _ in range(3):  # an old error of Orbax's comes up again, up to twice, in place of the new checkpoint
            if step in self._manager.all_steps():
                return True
            if self.wait() and self._succeeds(self._probe) and self._succeeds(start):
                return True
        return False

    def _probe(self) -> None:
        """An OSError if there is no room for the little that the first process writes while the others wait for it."""
        if jax.process_count() > 1 and leads():
            check_room(self.directory)

    def wait(self) -> bool:
        """Waits for the checkpoint that is being written and returns whether it was written."""
        return "_manager" not in vars(self) or self._succeeds(self._manager.wait_until_finished)

    def _succeeds(self, action: Callable[[], Any]) -> bool:
        """Calls ``action`` and returns whether it went well in all processes; logs a warning if it did not.

        All processes call this at the same time.
        """
        fault = ""
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            fault = _reason(error)
        except Exception as error:
            if (fault := storage_fault(error)) is None:
                raise
        faults = list(filter(None, gather(fault)))
        for fault in faults[:1]:
            logger.warning("a checkpoint could not be written to %s: %s", self.directory, fault)
        return not faults

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and data position of the newest whole checkpoint, or of the one of ``step``; None without it.

        A checkpoint with a file that is not what was written, or that can't be read, is passed over for the one before
        it, with a warning. It is then set aside as ``damaged-*``, unless this is read-only.

        Raises:
            InputError: if a checkpoint has other shapes, naming the parameter; or if no checkpoint is whole.
        """
        self._say_unfinished()
        damaged, removed = [], []
        while steps := [s for s in self._agreed_steps() if s not in damaged + removed and step in (None, s)]:
            candidate = steps[-1]
            items, fault = self._try(candidate, abstract_state)
            unchecked = files.lacks_digests(self.directory / str(candidate))
            if (fault or unchecked) and self._is_being_removed(candidate, step is None):
                removed.append(candidate)
            elif fault:
                logger.warning("the checkpoint of step %d can't be read: %s", candidate, fault)
                damaged.append(candidate)
            else:
                if unchecked and leads():
                    logger.warning(NO_DIGESTS, candidate)
                self._set_aside(damaged)
                return candidate, items["state"], items["data"]
        if damaged:
            raise InputError(
                f"no checkpoint of steps {damaged} in {self.directory} can be read: choose another run directory",
                argument="workdir",
            )
        return None

    def _say_unfinished(self) -> None:
        """Says which checkpoints in a bucket are passed over because they lack the file that is written last."""
        for step in files.unfinished_steps(self.directory) if leads() else ():
            logger.warning(UNFINISHED, step, self.directory, files.COMMIT)

    def _agreed_steps(self) -> list[int]:
        """The steps that have a checkpoint as the first process sees them, in all processes."""
        return json.loads(gather(json.dumps(self.steps() if leads() else []))[0])

    def _is_being_removed(self, step: int, any_newer: bool) -> bool:
        """Whether a run that trains removes this checkpoint while it is read, or has a newer one, if that will do."""
        if not self._read_only:
            return False
        for _ in range(10):
            steps = self.steps()
            if step not in steps or (any_newer and steps[-1] > step):
                return True
            time.sleep(0.1)
        return False

    def _try(self, step: int, abstract_state: Any) -> tuple[dict[str, Any], str]:
        """What a checkpoint holds, and what is wrong with it in any of the processes, which share the checking."""
        folder, items = self.directory / str(step), {}

        def read() -> None:
            items.update(self._read(step, abstract_state))
            items["data"] = _verified(items["data"])

        fault = _first_fault(lambda: files.check(folder, jax.process_index(), jax.process_count()))
        if not fault:
            self._check_shapes(step, abstract_state)
            fault = _first_fault(read)
        return items, fault

    def _read(self, step: int, abstract_state: Any) -> dict[str, Any]:
        """What a checkpoint holds.

        Each process reads its part without waiting for the others, because one of them may find its part damaged.
        """
        handlers = ocp.CompositeCheckpointHandler(**_handlers())
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        with ocp.Checkpointer(handlers, multiprocessing_options=alone) as reader:
            return dict(reader.restore(self.directory / str(step), args=arguments))

    def best_step(self) -> int | None:
        """The step of the lowest validation loss; the last step if no loss was measured; None without checkpoints."""
        losses, _ = self._losses()
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=measured.__getitem__) if measured else max(losses, default=None)

    def _losses(self) -> tuple[dict[int, float | None], list[int]]:
        """The validation loss of each step, if one was measured, and the steps whose loss is damaged."""
        losses, damaged = {}, []
        for step in self.steps():
            try:
                losses[step] = files.read_loss(self.directory / str(step))
            except ValueError as error:
                logger.warning("the checkpoint of step %d can't be read: %s", step, error)
                damaged.append(step)
        return losses, damaged

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        try:
            saved = ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "state")
            saved = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved.tree)}
        except Exception:  # metadata is damaged, which restoring will find too
            return
        wanted = {
            _name(path): _stored_shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
        }
        differing = [name for name in wanted if saved.get(name) != wanted[name]] or sorted(saved.keys() - wanted.keys())
        if differing:
            name = differing[0]
            raise InputError(
                f"the checkpoint of step {step} in {self.directory} has {name} of shape {saved.get(name, 'none')}, but "
                f"the config gives {wanted.get(name, 'none')}: use its config, or choose another run directory",
                argument="workdir",
            )

    def _set_aside(self, damaged: list[int]) -> None:
        """Renames the checkpoints of these steps, so that the steps can be saved again."""
        if self._read_only:
            return
        for step in damaged:
            wait_for_all()
            if leads():
                target = set_aside(self.directory / str(step))
                logger.warning("it is now %s", target)
            wait_for_all()

    def _tidy(self) -> None:
        """Sets aside the checkpoints whose validation loss is damaged, because Orbax's manager ends at such a file.

        In a bucket, what a killed run has left unfinished is removed, because it has the name of a checkpoint. What has
        digests is a copy that lacks its last file, and is set aside instead.
        """
        damaged = []
        if leads():
            damaged = self._losses()[1]
            for step in files.unfinished_steps(self.directory):
                if files.lacks_digests(self.directory / str(step)):
                    (self.directory / str(step)).rmtree()
                else:
                    damaged.append(step)
        self._set_aside(json.loads(gather(json.dumps(damaged))[0]))

    def close(self) -> None:
        """Waits for the checkpoint that is being written and ends Orbax's threads. Closing twice does nothing."""
        if not self._closed and "_manager" in vars(self):
            self._closed = True
            for _ in range(3):  # as in save(): until Orbax has raised what it has to say of earlier checkpoints
                if self._succeeds(self._manager.close):
                    break

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if jax.process_count() == 1 or error is None or isinstance(error, TrainingFailed | InUse):
            self.close()
        # Else this may be the only process that has failed, and closing would wait for the others. It will end soon.


def _handlers() -> dict[str, Any]:
    """Orbax's handler of each item of a checkpoint."""
    return {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}


def _verified(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data position; a ValueError if it is not the one that was saved."""
    if zlib.crc32(data["text"].encode()) != data["crc32"]:
        raise ValueError("the checksum of its data position is wrong")
    return json.loads(data["text"])


def _first_fault(action: Callable[[], None]) -> str:
    """What has failed in the first process where ``action``, which all processes call, fails; empty if none fails.

    Raises:
        TryAgain: in all processes, if a bucket did not answer, which says nothing of what is in it.
    """
    fault = ""
    with together():
        try:
            action()
        except Exception as error:  # whatever a damaged file makes the reader raise
            fault = _reason(error)
            if (said := storage_fault(error)) is not None:
                refused = refusal(error, f"a checkpoint can't be read ({said}): check the connection")
                if isinstance(refused, TryAgain):
                    raise refused from error
    return next(filter(None, gather(fault)), "")


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _stored_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape that an array has on disk, where random keys are stored as their data."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return leaf.shape


def _name(path: tuple) -> str:
    """``params/blocks/2/ffw/up`` from a tree path; the saved tree and ours differ in how keys are wrapped."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return "/".join(part for part in parts if part not in ("value", "get_value"))
