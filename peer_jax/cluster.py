"""Where the processes of a run meet, how many there are, which one this is, and how long they wait for one another.

The place of a process is given by flags or by a launcher's variables.

Slurm, Open MPI and GKE tell their processes all of this in the environment. The addresses are those
that ``jax.distributed.initialize`` would choose. It can't be asked: a process's parent (``supervisor.py``) has no JAX.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from peer_jax.errors import InputError, TryAgain

_PORTS = 2**12  # A job gets one of the last ports, by its number. Systems don't give these ports to programs unasked.
_TPU_PORT = 8482
_ADDRESS = "JAX_COORDINATOR_ADDRESS"


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds that the processes of a run wait for one another. The defaults are for pods, whose hosts start slowly.

    Attributes:
        start: how long a process waits for the others when it starts.
        heartbeat: a process that has given no sign of life for so long has died. Where launched processes have
            parents (``supervisor.py``), a process that has ended is noticed at once.
        shutdown: how long a process that has ended waits for the others to end.
    """

    start: int = 600
    heartbeat: int = 100
    shutdown: int = 300


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of its run.

    Attributes:
        host: where process 0 listens.
        port: the port there.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        local_id: which of the processes on its host this is; None if the launcher says that it is alone, or nothing.
        variables: the variables that gave each argument of ``find``; empty if it was given.
    """

    host: str
    port: int
    num_processes: int
    process_id: int
    local_id: int | None = None
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.num_processes} processes at {self.coordinator}"

    @property
    def coordinator(self) -> str:
        """HOST:PORT of process 0."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def refusal(self, argument: str, sentence: str, kind: type[InputError] = InputError) -> InputError:
        """The error for an argument of ``find``, which starts with its value, or for the variable that gave it."""
        if argument in self.variables:
            return kind(f"{self.variables[argument]} {sentence}")
        return kind(sentence, argument=argument)


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process: as the arguments say, or else as Slurm, Open MPI or GKE do.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        environment: where the launchers' variables are looked for.

    Returns:
        None if nothing is given and no launcher has started several processes.

    Raises:
        InputError: if only some of the arguments are given, or if an argument or a variable can't be.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    variables = {}
    if len(missing) == len(given):
        launched = _open_mpi(environment) or _slurm(environment) or _tpu(environment)
        if launched is None or launched[1] < 2:
            return None
        coordinator, num_processes, process_id, variables = launched
        variables |= {"coordinator": _ADDRESS}
        if environment.get(_ADDRESS):
            coordinator = environment[_ADDRESS]
        elif coordinator is None:
            names = " and ".join(variables[name] for name in ("num_processes", "process_id"))
            raise InputError(f"{names} don't come with the host of process 0: set {_ADDRESS}=HOST:PORT")
    elif missing:
        there = sorted(given.keys() - missing)
        raise InputError(f"{' and '.join(there)} given without {' and '.join(missing)}: give all", argument=missing[0])
    host, _, port = coordinator.rpartition(":")
    is_port = port.isdecimal() and 0 < int(port) < 2**16
    local_id = _local_id(environment)
    place = Place(host.strip("[]"), int(port) if is_port else 0, num_processes, process_id, local_id, variables)
    if not 0 <= process_id < num_processes:
        raise place.refusal("process_id", f"{process_id} is not one of 0 to {num_processes - 1}")
    if not host or not is_port:
        raise place.refusal("coordinator", f"{coordinator!r} is not HOST:PORT")
    return place


def not_together(who: str, reason: str, kind: type[InputError] = TryAgain) -> InputError:
    """The error of processes that have not all come."""
    return kind(f"{who} did not start together ({reason}): start all, and check that they reach the first")


# What a launcher says: the address of process 0, or None if it doesn't say that; how many processes there are; which of
# them this is; and the variables that say the last two.
_Launched = tuple[str | None, int, int, dict[str, str]]


def _open_mpi(environment: Mapping[str, str]) -> _Launched | None:
    """Process 0 runs on the host of ``mpirun``, whose address is in a URI, or since version 5 in the job's name."""
    count, number = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    if not environment.get(count):
        return None
    address = None
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::9b:ac5d,2620:10d::3]:43370
    uri = r"(\d+)\..*?;tcp(?:://|6://\[)(.+?)(?:,|\]|:\d+(?:;|$))"
    if found := re.match(uri, environment.get("OMPI_MCA_orte_hnp_uri", "")):
        address = f"{found[2]}:{_port(environment, int(found[1]) // 2**12)}"
    elif found := re.match(r"prte\w*-(.+)-(\d+)@", environment.get("PMIX_NAMESPACE", "")):
        address = f"{found[1]}:{_port(environment, int(found[2]))}"
    variables = {"num_processes": count, "process_id": number}
    return address, _number(environment, count), _number(environment, number), variables


def _slurm(environment: Mapping[str, str]) -> _Launched | None:
    """Process 0 runs on the first node of the step. Outside of a step, as in a batch script, there is one process."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        return None
    count, number = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"
    if not environment.get(count):
        count = "SLURM_NTASKS"
    # node7,other or node[001-015,020]-rack,other
    address = None
    if found := re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes):
        address = f"{''.join(filter(None, found.groups()))}:{_port(environment, _number(environment, 'SLURM_JOB_ID'))}"
    variables = {"num_processes": count, "process_id": number}
    return address, _number(environment, count), _number(environment, number), variables


def _tpu(environment: Mapping[str, str]) -> _Launched | None:
    """Process 0 runs on the first host, of the first slice if there are several."""
    if not environment.get("TPU_WORKER_HOSTNAMES"):
        return None
    hosts = (environment.get("TPU_PROCESS_ADDRESSES") or environment["TPU_WORKER_HOSTNAMES"]).split(",")
    slices, of_slice, first = 1, 0, hosts[0]
    if environment.get("MEGASCALE_NUM_SLICES"):
        slices, of_slice = (_number(environment, f"MEGASCALE_{name}") for name in ("NUM_SLICES", "SLICE_ID"))
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", first if slices == 1 else "")
    if slices * len(hosts) < 2:
        return None
    address = first and f"{first.split(':')[0]}:{environment.get('JAX_COORDINATOR_PORT') or _TPU_PORT}"
    number = of_slice * len(hosts) + _number(environment, "TPU_WORKER_ID")
    variables = {"num_processes": "TPU_WORKER_HOSTNAMES", "process_id": "TPU_WORKER_ID"}
    return address or None, slices * len(hosts), number, variables


def _local_id(environment: Mapping[str, str]) -> int | None:
    if environment.get("OMPI_COMM_WORLD_SIZE"):
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return None if alone else _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    if environment.get("SLURM_STEP_NODELIST"):
        alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return None if alone else _number(environment, "SLURM_LOCALID")
    return None


def _port(environment: Mapping[str, str], job: int) -> str:
    """The port of process 0, which is seldom the same for two jobs on one host."""
    return environment.get("JAX_COORDINATOR_PORT") or str(2**16 - _PORTS + job % _PORTS)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not (value.isascii() and value.isdecimal()):
        flags = "--coordinator, --num-processes and --process-id"
        raise InputError(f"{name}={value} of the environment is not a number: mend it, or give {flags}")
    return int(value)
