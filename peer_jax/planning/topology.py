"""Devices that this machine lacks, to compile for: a slice of TPUs by libtpu, GPUs by the wheels of JAX for CUDA."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from peer_jax.errors import InputError
from peer_jax.planning import gpus
from peer_jax.planning.capacity import DEVICES, Device
from peer_jax.planning.tpus import GENERATIONS

EXAMPLES = "give one such as v5p:2x2x2, v6e:8x8 or h100:8"


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: such as v5p:2x2x2 or h100:8.
        devices: what a mesh is made of.
        kind: what each of them has and can do.
    """

    name: str
    devices: list[jax.Device]
    kind: Device


def topology(name: str) -> Topology:
    """The devices of a name: a generation of TPUs and a shape in chips, or a kind of GPU and a number.

    Raises:
        InputError: if there are no such devices, or what compiles for them is not installed.
    """
    kind, colon, shape = name.partition(":")
    if colon and kind in GENERATIONS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        return Topology(name, _tpus(kind, shape), DEVICES[f"tpu-{kind}"])
    if colon and kind in gpus.KINDS and re.fullmatch(r"[1-9]\d*", shape):
        return Topology(name, _gpus(kind, int(shape)), DEVICES[kind])
    kinds = ", ".join([*GENERATIONS, *gpus.KINDS])
    raise InputError(f"{name} names no devices of {kinds}: {EXAMPLES}", argument="topology")


def _tpus(generation: str, shape: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"{generation}:{shape} needs libtpu to compile, which is not installed: pip install 'peer-jax[compile]'",
            argument="topology",
        )
    # libtpu would ask a metadata server which host of which slice this is, and wait for it; and it takes a machine's
    # TPUs for one process, although none of them is needed to compile.
    apart = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in apart.items():
        os.environ.setdefault(variable, value)
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}  # or each core would be a device
    try:
        return topologies.get_topology_desc(f"{generation}:{shape}", "tpu", **options).devices
    except JaxRuntimeError as error:
        raise InputError(
            f"{generation}:{shape} is no slice of TPUs ({first_line(error)})", argument="topology"
        ) from None


def _gpus(kind: str, number: int) -> list[jax.Device]:
    ptxas = gpus.ptxas_folder()
    if ptxas is None or importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise InputError(
            f"{kind}:{number} needs the wheels of JAX for CUDA 13 and ptxas to compile: pip install "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cuda-nvcc",
            argument="topology",
        )
    per_node = DEVICES[kind].domain
    if number > per_node and number % per_node:
        raise InputError(
            f"{kind}:{number} is no number of whole nodes of {per_node} GPUs: {EXAMPLES}", argument="topology"
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), ptxas])
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there may be no driver
    nodes = -(-number // per_node)
    shape = f"1x{nodes}x{number // nodes}"  # partitions, nodes of each, GPUs of a node
    try:
        return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=gpus.target(kind)).devices
    except (JaxRuntimeError, RuntimeError) as error:
        raise InputError(f"{kind}:{number} can't be compiled for ({first_line(error)})", argument="topology") from None


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
