"""Processes that each have CPU devices of their own, as hosts do; they run peer-jax commands or a test's functions.

Two processes with 4 devices each make up one run. A function is called in all of them and returns values that can be
written as JSON. Shapes and types of peer_jax are checked in these processes, too.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from small_runs import PROGRAM, stack, start_process

HOSTS, DEVICES = 2, 4


def train_command(tiny, folder, *bindings, layer="peer"):
    """The command that trains, without the flags for several processes."""
    command = [*PROGRAM, "train", "--quiet", "--no-table", "--workdir", str(folder)]
    return command + [f"--config={file}" for file in stack(tiny, layer)] + [f"--set={binding}" for binding in bindings]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def flags(host, port):
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(HOSTS), "--process-id", str(host)]


def slurm(host, port, hosts=HOSTS):
    """What Slurm tells a process of a step on one node."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "JAX_COORDINATOR_PORT": str(port)}
    counts = {"SLURM_NTASKS": str(hosts), "SLURM_STEP_NUM_TASKS": str(hosts), "SLURM_STEP_TASKS_PER_NODE": str(hosts)}
    return {**job, **counts, "SLURM_PROCID": str(host), "SLURM_LOCALID": str(host)}


def open_mpi_4(host, port, hosts=HOSTS):
    """What Open MPI up to version 4 tells a process."""
    job = {"OMPI_MCA_orte_hnp_uri": "1989935104.0;tcp://127.0.0.1:59379", "JAX_COORDINATOR_PORT": str(port)}
    return {**job, **ranks(host, hosts)}


def open_mpi_5(host, port, hosts=HOSTS):
    """What later versions tell."""
    job = {"PMIX_NAMESPACE": "prterun-localhost-6842@1", "OMPI_VERSION": "5.0.11", "JAX_COORDINATOR_PORT": str(port)}
    return {**job, **ranks(host, hosts)}


def ranks(host, hosts):
    world = {"OMPI_COMM_WORLD_SIZE": str(hosts), "OMPI_COMM_WORLD_RANK": str(host)}
    return world | {"OMPI_COMM_WORLD_LOCAL_SIZE": str(hosts), "OMPI_COMM_WORLD_LOCAL_RANK": str(host)}


class Hosts:
    """Starts processes, and kills those that still run at the end of a test."""

    def __init__(self):
        self._started = []

    def start(self, command, devices=DEVICES, variables=None):
        self._started.append(start_process(command, **{"JAX_NUM_CPU_DEVICES": str(devices)} | (variables or {})))
        return self._started[-1]

    def start_all(self, command, second=(), variables=None):
        """Starts two processes of one run: the command, and the command with ``second`` appended."""
        port = free_port()
        own = [(), second]
        return [self.start([*command, *own[host], *flags(host, port)], variables=variables) for host in range(HOSTS)]

    def start_launched(self, command, launcher, variables=None):
        """Starts two processes of one run as a launcher would, which tells them its variables and gives no flags."""
        port = free_port()
        return [self.start(command, variables=(variables or {}) | launcher(host, port)) for host in range(HOSTS)]

    def measured(self, folder, module, function, *arguments, hosts=HOSTS, devices=HOSTS * DEVICES):
        """What ``module.function(*arguments)`` returns in each of two processes, or in one with all devices."""
        command = [sys.executable, __file__, module, function, json.dumps(arguments), str(folder), str(hosts)]
        command += [str(free_port())]
        for process in [self.start([*command, str(host)], devices // hosts) for host in range(hosts)]:
            finish(process)
        return [json.loads((folder / f"returned-{host}").read_text()) for host in range(hosts)]

    def kill(self):
        for process in self._started:
            process.kill()
            process.communicate()


def ended(process, timeout=120):
    """Exit status and standard error of a process, which must end by itself within the timeout."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def finish(process):
    """Waits for a process, which must end with status 0."""
    status, errors = ended(process, timeout=600)
    assert status == 0, errors


def main():
    module, function, arguments, folder, hosts, port, host = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest  # noqa: F401, as the tests have it
    import jax

    from peer_jax import cluster, processes

    if int(hosts) > 1:
        processes.start(cluster.find(f"127.0.0.1:{port}", int(hosts), int(host)))
    # optax's bias correction raises a float to the power of an integer count, which strict promotion forbids.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    assert len(jax.devices()) == int(hosts) * int(os.environ["JAX_NUM_CPU_DEVICES"]), jax.devices()
    returned = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(folder, f"returned-{host}").write_text(json.dumps(returned))


if __name__ == "__main__":
    main()
