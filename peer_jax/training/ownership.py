"""How the processes of a run share its directory: the first process locks it and writes for all of them."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from peer_jax.data import vocabulary as vocabularies
from peer_jax.errors import InputError, InUse
from peer_jax.fields import RunConfig
from peer_jax.lease import STALE
from peer_jax.processes import gather, leads, together
from peer_jax.run_directory import RunDirectory


@contextlib.contextmanager
def owned(directory: RunDirectory, stale: float = STALE) -> Iterator[Callable[[], None]]:
    """Makes the directory and keeps other runs from training in it at the same time.

    Args:
        directory: of the run.
        stale: seconds without a sign of life after which its holder on another machine has died.

    Yields:
        A function that raises InUse, in all processes, if another run has taken the directory over meanwhile, because
        this one was not heard of for too long. To be called before anything is written that the other run may rely on.

    Raises:
        InputError: in all processes, if the directory can't be made, if another run has it, or if not all processes
            see the same directory.
    """
    with contextlib.ExitStack() as stack:
        held = None
        with together():
            if leads():
                held = directory.lock(stale=stale)
                stack.callback(held.release)
        if jax.process_count() > 1:
            _check_shared(directory)

        def check_still_owned() -> None:
            with together():
                if held is not None and held.lost:
                    raise InUse(
                        f"{directory} was taken over by another process, because this one was not heard of for "
                        f"{stale:g} s: wait for it, or choose another directory",
                        argument="workdir",
                    )

        yield check_still_owned


def _check_shared(directory: RunDirectory) -> None:
    """An InputError, in all processes, unless each finds the mark that the first process leaves in the directory."""
    mark = gather(str(time.time_ns()))[0]
    with together():
        if leads():
            directory.leave_mark(mark)
    try:
        with together():
            if not directory.has_mark(mark):
                raise InputError(
                    f"{directory} of process {jax.process_index()} is not that of process 0: give all processes the "
                    "same directory, on a file system that they share",
                    argument="workdir",
                )
    finally:
        if leads():
            directory.remove_mark(mark)


def finished(directory: RunDirectory) -> dict[str, Any] | None:
    """The result of the directory's run as the first process finds it, in all processes; None if it has none.

    On a network's file system, another process may not see it for a while.
    """
    return json.loads(gather(json.dumps(directory.whole_result() if leads() else None))[0])


def check_same(config: RunConfig | None, text: str) -> None:
    """An InputError, in all processes, unless all have the same config and the same text.

    Args:
        config: of this process.
        text: the fingerprint of the text that this process trains on.
    """
    (first, first_text), *others = map(json.loads, gather(json.dumps([dict(config.fields) if config else {}, text])))
    for process, (other, other_text) in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise InputError(
                    f"process {process} has {name} = {other.get(name, 'unset')}, process 0 has "
                    f"{first.get(name, 'unset')}: give all the same config"
                )
        if first_text != other_text:
            raise InputError(
                f"process {process} reads another text than process 0: give all processes the same files to train on"
            )


def check_begun(directory: RunDirectory, config: RunConfig) -> None:
    """An InputError if the directory holds a run that was begun with a config of another identity."""
    kept = directory.read_config()
    if kept is not None and (found := config.difference(kept)) is not None:
        raise InputError(
            f"{directory} holds a run with {found.name} = {found.before}, now it is {found.now}: use its config, or "
            "choose another directory",
            argument="workdir",
        )


def check_config(directory: RunDirectory, config: RunConfig | None) -> None:
    """``check_begun`` by the first process, whose error all processes raise."""
    with together():
        if leads() and config is not None:
            check_begun(directory, config)


def keep_config(directory: RunDirectory, config: RunConfig | None) -> None:
    """Writes ``config.gin``, unless the directory has the config that its run was begun with."""
    with together():
        if leads() and config is not None and directory.read_config() is None:
            directory.write_config(config.text)


def keep_vocabulary(directory: RunDirectory, vocabulary: str) -> None:
    """Copies the run's SentencePiece model to the directory, so that the run can be used without the original file."""
    with together():
        if leads() and (model := vocabularies.model(vocabulary)) is not None:
            directory.keep_vocabulary(model)
