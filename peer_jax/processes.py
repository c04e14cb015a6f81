"""The processes of a run: one by default; several, each with its own devices, under ``jax.distributed``."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from peer_jax.errors import InputError

# Seconds: without a sign of life a process has died; one that ends, and one that starts, waits so long for others.
HEARTBEAT, SHUTDOWN, START = 20, 20, 120
LEAVE = 5  # the same for one that has failed


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    from_cluster: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes, if there are any: those of the arguments, or of the cluster that JAX finds.

    Before JAX is used. Slurm, Open MPI and TPU pods of GKE are seen in the environment; ``from_cluster`` has JAX look
    for any other cluster that it knows.

    Raises:
        InputError: if only some of the arguments are given, or the processes don't find one another in time.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(sorted(given.keys() - missing))} needs {' and '.join(missing)}, too")
    if not missing and not 0 <= process_id < num_processes:
        raise InputError(f"--process-id {process_id} is not one of 0 to {num_processes - 1}")
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
        except Exception as error:  # of whatever kind, for the thread that waits
            failures.append(error)

    # JAX aborts the process when its time is up, with no word of whom it waited for: ours is up before.
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
    """An InputError unless this is a host and a port; one that is free, if it is here. JAX would crash."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator {coordinator!r} is not HOST:PORT")
    if listens:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", int(port)))
            except OSError as error:
                raise InputError(f"--coordinator {coordinator}: port {port} can't be had ({error.strerror})") from error


def leave(status: int) -> None:
    """Ends a process that can't go on. Of several it does not wait long for the others: JAX would, and abort then."""
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
    """Whether the environment is that of one of several processes of Slurm, Open MPI or a TPU pod of GKE."""
    counts = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def leads() -> bool:
    """Whether this process logs, reports and writes for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(text: str) -> list[str]:
    """The text of each process, in all of them; every process calls it."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    rows = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) + 1 - own.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses in this block, all refuse: none goes on to wait for one that has ended.

    Raises:
        InputError: that of this process, or else the first one's.
    """
    refused = None
    try:
        yield
    except InputError as error:
        refused = error
    messages = gather("" if refused is None else str(refused))
    if refused is not None:
        raise refused
    for message in filter(None, messages):
        raise InputError(message)
