"""The processes of a run: one, or several under ``jax.distributed``, each with devices of its own."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from peer_jax import supervisor
from peer_jax.cluster import Place, Timeouts, not_together
from peer_jax.errors import InputError, TryAgain

# Seconds: LEAVE is how long a process that has failed waits for the others, WAIT is how long it waits for others that
# live.
LEAVE, WAIT = 5, 7 * 24 * 3600
HEAD_START = 0.5  # of the others, which JAX would abort once the first process has gone


class _Counts:
    """How often this process has exchanged texts and has asked whether to stop, which all processes do in step."""

    texts = 0
    questions = 0


def start(place: Place | None, *, from_cluster: bool = False, timeouts: Timeouts = Timeouts()) -> None:  # noqa: B008
    """Joins the other processes of the run, if there are any; to be called before JAX is used.

    Args:
        place: which process this is, as ``cluster.find`` tells.
        from_cluster: if there is no place, have JAX look for any cluster that it knows.
        timeouts: how long the processes wait for one another.

    Raises:
        InputError: if JAX finds no cluster; TryAgain if the processes don't find one another in time, or if the port
            is taken.
    """
    if place is None and not from_cluster:
        return
    arguments: dict[str, Any] = {}
    if place is not None:
        if place.process_id == 0:
            _check_port(place)
        arguments = {
            "coordinator_address": place.coordinator,
            "num_processes": place.num_processes,
            "process_id": place.process_id,
            "cluster_detection_method": "deactivate",
        }
        if place.local_id is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            arguments["local_device_ids"] = place.local_id  # several processes of a host have one GPU each
    failures = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=2 * timeouts.start,
                heartbeat_timeout_seconds=timeouts.heartbeat,
                shutdown_timeout_seconds=timeouts.shutdown,
            )
        except Exception as error:  # of whatever kind: the thread that waits raises it
            failures.append(error)

    # JAX aborts the process after its own timeout, without saying for whom it waited. This one is shorter.
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(timeouts.start)
    if failures or joining.is_alive():
        who = "the cluster's processes" if place is None else str(place)
        reason = (
            (str(failures[0]) or type(failures[0]).__name__).splitlines()[0]
            if failures
            else f"waited {timeouts.start} s"
        )
        kind = InputError if failures and isinstance(failures[0], ValueError) else TryAgain  # the arguments can't be
        raise not_together(who, reason, kind) from (failures[0] if failures else None)


def _check_port(place: Place) -> None:
    """An InputError if the port is taken, where JAX would end the process without a message."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", place.port))
        except OSError as error:
            taken = f"{place.coordinator}: port {place.port} can't be had ({error.strerror})"
            raise place.refusal("coordinator", taken, TryAgain) from error


def leave(status: int) -> None:
    """Ends a process that can't go on, without waiting for the others as long as JAX would before it aborts."""
    if supervisor.is_supervised():
        if status > 128:  # all have stopped at the same step, and none is to go before all have said so
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                distributed.global_state.client.wait_at_barrier("peer_jax/leave", LEAVE * 1000)
            time.sleep(HEAD_START * leads())
        _exit_now(status)  # the others hear of it
    if jax.distributed.is_initialized():
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(LEAVE)
        if leaving.is_alive():
            _exit_now(status)
    sys.exit(status)


def _exit_now(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leads() -> bool:
    """Whether this is the process that logs, reports and writes for all."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    gather("")


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. Every process calls this, and each gets all texts.

    The texts go through JAX's coordination service. A collective would end with an error where one process is half a
    minute later than the others; here, only a process that has died ends the waiting.
    """
    if jax.process_count() == 1:
        return [text]
    turn, own = _Counts.texts, jax.process_index()
    _Counts.texts += 1
    texts = _exchange(str(turn), text, WAIT)
    if turn > 0:  # which all processes have read, since all have come to this turn
        distributed.global_state.client.key_value_delete(f"peer_jax/{turn - 1}/{own}")
    return texts


def _exchange(name: str, text: str, seconds: float) -> list[str]:
    """The texts that all processes give under a name; a JaxRuntimeError if not all have done so in time."""
    store, deadline = distributed.global_state.client, time.monotonic() + seconds
    store.key_value_set(f"peer_jax/{name}/{jax.process_index()}", text)
    return [
        store.blocking_key_value_get(f"peer_jax/{name}/{i}", max(1, int((deadline - time.monotonic()) * 1000)))
        for i in range(jax.process_count())
    ]


def settle(name: str, text: str, seconds: float) -> tuple[list[str], bool]:
    """The texts of all processes after work that may have failed in some of them, and whether they are still in step.

    They are in step if all come here and if all have called ``gather`` and ``asked_to_stop`` equally often. Otherwise
    they can't go on together.

    Args:
        name: of this meeting, another one each time.
        text: of this process.
        seconds: how long to wait for the others. If they don't come, the only text is that of this process.
    """
    if jax.process_count() == 1:
        return [text], True
    try:
        told = _exchange(name, json.dumps([text, _Counts.texts, _Counts.questions]), seconds)
    except jax.errors.JaxRuntimeError:
        return [text], False
    texts, *counts = zip(*map(json.loads, told), strict=True)
    return list(texts), all(len(set(count)) == 1 for count in counts)


def asked_to_stop() -> bool:
    """Whether one of several processes was sent SIGTERM. All ask equally often, and all get the same answer.

    The answer is true once. JAX numbers the questions, and so one number is not used twice, in whichever run it is.
    """
    _Counts.questions += 1
    return multihost_utils.reached_preemption_sync_point(_Counts.questions)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Has all processes refuse what one refuses in this block, so that none goes on to wait for one that has ended.

    Raises:
        InputError: the error of this process, or else that of the first process that has one.
    """
    refused = None
    try:
        yield
    except InputError as error:
        refused = error
    told = gather("" if refused is None else json.dumps(refused.told()))
    if refused is not None:
        raise refused
    for one in filter(None, told):
        raise InputError.heard(json.loads(one))
