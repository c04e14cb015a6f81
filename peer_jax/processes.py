"""The processes of a run: one, or several under ``jax.distributed``, each with devices of its own."""

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from peer_jax.errors import InputError, InUse

# Timeouts in seconds: no heartbeat for HEARTBEAT means that a process has died; SHUTDOWN and START are how long a
# process waits for the others when it ends and when it starts, and LEAVE is how long it waits when it has failed.
HEARTBEAT, SHUTDOWN, START = 20, 20, 120
LEAVE = 5


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
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        there = sorted(given.keys() - missing)
        raise InputError(f"{' and '.join(there)} given without {' and '.join(missing)}: give all", argument=missing[0])
    if not missing and not 0 <= process_id < num_processes:
        raise InputError(f"process_id {process_id} is not one of 0 to {num_processes - 1}", argument="process_id")
    if missing and not from_cluster and not in_cluster(environment):
        return
    if not missing:
        _check_address(coordinator, listens=process_id == 0)
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
        where = f"{num_processes} processes at {coordinator}" if not missing else "the cluster's processes"
        reason = (str(failures[0]) or type(failures[0]).__name__).splitlines()[0] if failures else f"waited {START} s"
        raise InputError(
            f"{where} did not start together ({reason}): start all, and check that they reach the first"
        ) from (failures[0] if failures else None)


def _check_address(coordinator: str, *, listens: bool) -> None:
    """An InputError unless this is a host and a port, and the port is free if this process is to listen there.

    JAX would end the process without a message.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"coordinator {coordinator!r} is not HOST:PORT", argument="coordinator")
    if listens:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", int(port)))
            except OSError as error:
                raise InputError(
                    f"coordinator {coordinator}: port {port} can't be had ({error.strerror})", argument="coordinator"
                ) from error


def leave(status: int) -> None:
    """Ends a process that can't go on, without waiting for the others as long as JAX would before it aborts."""
    if jax.distributed.is_initialized():
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(LEAVE)
        if leaving.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment names several processes of Slurm, Open MPI or a TPU pod of GKE."""
    counts = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def leads() -> bool:
    """Whether this is the process that logs, reports and writes for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. Every process calls this, and each gets all texts."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    rows = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) + 1 - own.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


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
