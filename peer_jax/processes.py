"""The processes of a run: one by default; several, each with its own devices, under ``jax.distributed``."""

import os
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from peer_jax.errors import InputError

# Seconds after which a process that is no longer heard of has died, and after which one that ends stops waiting for others.
HEARTBEAT, SHUTDOWN, START = 20, 20, 120


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    from_cluster: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes, if there are any: those of the arguments, or of the cluster that JAX finds.

    Before JAX is used. Slurm, Open MPI and TPU pods are seen in the environment; ``from_cluster`` has JAX look for any
    other cluster that it knows.

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
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{num_processes} processes at {coordinator}" if not missing else "the cluster's processes"
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{where} did not start together within {START} s ({reason}): start all, and check that they reach the first"
        ) from error


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one of several processes of Slurm, Open MPI or a TPU pod (GKE's included)."""
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
