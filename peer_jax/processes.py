"""The processes of a run: one, or several under ``jax.distributed``, each with devices of its own."""

import contextlib
import itertools
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

from peer_jax import supervisor
from peer_jax.cluster import Place
from peer_jax.errors import InputError, InUse
from peer_jax.supervisor import START

# Timeouts in seconds: no heartbeat for HEARTBEAT means that a process has died; a supervisor, where there is one, is
# earlier to say which. SHUTDOWN and START are how long a process waits for the others when it ends and when it starts,
# LEAVE is how long it waits when it has failed, and WAIT is how long it waits for others that live.
HEARTBEAT, SHUTDOWN = 30, 20
LEAVE, WAIT = 5, 7 * 24 * 3600
HEAD_START = 0.5  # of the others, which JAX would abort once the first process has gone
_TURNS = itertools.count()


def start(place: Place | None, *, from_cluster: bool = False) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX is used.

    Args:
        place: which process this is, as ``cluster.find`` tells.
        from_cluster: if there is no place, have JAX look for any cluster that it knows.

    Raises:
        InputError: if the processes don't find one another in time, or JAX finds no cluster.
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
                initialization_timeout=2 * START,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=SHUTDOWN,
            )
        except Exception as error:  # of whatever kind: the thread that waits raises it
            failures.append(error)

    # JAX aborts the process after its own timeout, without saying for whom it waited. This one is shorter.
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(START)
    if failures or joining.is_alive():
        who = "the cluster's processes" if place is None else f"{place.num_processes} processes at {place.coordinator}"
        reason = (str(failures[0]) or type(failures[0]).__name__).splitlines()[0] if failures else f"waited {START} s"
        raise InputError(
            f"{who} did not start together ({reason}): start all, and check that they reach the first"
        ) from (failures[0] if failures else None)


def _check_port(place: Place) -> None:
    """An InputError if the port is taken, where JAX would end the process without a message."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", place.port))
        except OSError as error:
            taken = f"{place.coordinator}: port {place.port} can't be had ({error.strerror})"
            raise place.refusal("coordinator", taken) from error


def leave(status: int) -> None:
    """Ends a process that can't go on, without waiting for the others as long as JAX would before it aborts."""
    if supervisor.is_supervised():
        if status not in (1, 2):  # all have stopped at the same step, and none is to go before all have said so
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
    store, turn, own = distributed.global_state.client, next(_TURNS), jax.process_index()
    store.key_value_set(f"peer_jax/{turn}/{own}", text)
    texts = [store.blocking_key_value_get(f"peer_jax/{turn}/{i}", WAIT * 1000) for i in range(jax.process_count())]
    if turn > 0:  # which all processes have read, since all have come to this turn
        store.key_value_delete(f"peer_jax/{turn - 1}/{own}")
    return texts


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
    told = "" if refused is None else json.dumps([str(refused), refused.argument, isinstance(refused, InUse)])
    told = gather(told)
    if refused is not None:
        raise refused
    for message, argument, in_use in map(json.loads, filter(None, told)):
        raise (InUse if in_use else InputError)(message, argument=argument)
