"""The processes of a run: one, or several under ``jax.distributed``, each with devices of its own."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
from jax._src import distributed

from peer_jax import supervisor
from peer_jax.errors import InputError, InUse
from peer_jax.supervisor import START

# Timeouts in seconds: no heartbeat for HEARTBEAT means that a process has died; a supervisor, where there is one, is
# earlier to say which. SHUTDOWN and START are how long a process waits for the others when it ends and when it starts,
# LEAVE is how long it waits when it has failed, and WAIT is how long it waits for others that live.
HEARTBEAT, SHUTDOWN = 30, 20
LEAVE, WAIT = 5, 7 * 24 * 3600
HEAD_START = 0.5  # of the others, which JAX would abort once the first process has gone
_TURNS = itertools.count()


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    from_cluster: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX is used.

    Args:
        coordinator: HOST:PORT where the first process listens; None if a cluster tells, or there is one process.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        from_cluster: have JAX look for any cluster that it knows; not needed for Slurm, Open MPI and TPU pods of GKE.
        environment: where the cluster's variables are looked for.

    Raises:
        InputError: if only some of the first three arguments are given, or the processes don't find one another in
            time.
    """
    where = supervisor.address(coordinator, num_processes, process_id)
    if where is None and not from_cluster and not in_cluster(environment):
        return
    if where is not None and process_id == 0:
        _check_port(where[1], coordinator)
    failures = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
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
        who = "the cluster's processes" if where is None else f"{num_processes} processes at {coordinator}"
        reason = (str(failures[0]) or type(failures[0]).__name__).splitlines()[0] if failures else f"waited {START} s"
        raise InputError(
            f"{who} did not start together ({reason}): start all, and check that they reach the first"
        ) from (failures[0] if failures else None)


def _check_port(port: int, coordinator: str) -> None:
    """An InputError if a port is taken, where JAX would end the process without a message."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(
                f"coordinator {coordinator}: port {port} can't be had ({error.strerror})", argument="coordinator"
            ) from error


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


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment names several processes of Slurm, Open MPI or a TPU pod of GKE."""
    counts = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


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
