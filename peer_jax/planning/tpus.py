"""Slices of Cloud TPUs: what their names mean, how their chips are arranged, and on which hosts they are.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e for shapes, hosts and runtime versions (of v5p, the shapes
with a name in the table there; GKE has more), and cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus for the
labels of nodes. github.com/AI-Hypercomputer/xpk has the same shapes in ``system_characteristics.py``.
"""

import dataclasses
import math

from peer_jax.errors import InputError

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
        cores: what the names of slices count per chip: two TensorCores per chip, or the chip itself.
        cloud: what the names of slices begin with in Cloud TPU's API.
        gke: the accelerator's name in the labels of GKE's nodes.
        runtime: the software version of its TPU VMs.
        topologies: the shapes of its slices in chips.
    """

    cores: int
    cloud: str
    gke: str
    runtime: str
    topologies: tuple[str, ...]


GENERATIONS = {
    "v4": Generation(2, "v4", "tpu-v4-podslice", "tpu-ubuntu2204-base", _CUBES),
    "v5e": Generation(1, "v5litepod", "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", _SQUARES),
    "v5p": Generation(2, "v5p", "tpu-v5p-slice", "v2-alpha-tpuv5", (*_CUBES, "16x16x16", "16x16x24")),
    "v6e": Generation(1, "v6e", "tpu-v6e-slice", "v2-alpha-tpuv6e", _SQUARES),
}


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """Chips that are connected with one another, and the hosts that they are on.

    Attributes:
        generation: a key of ``GENERATIONS``.
        topology: the shape in chips, such as "2x2x4".
    """

    generation: str
    topology: str

    @property
    def kind(self) -> Generation:
        """What is common to its generation."""
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """The number of chips, which are JAX's devices."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Four, but for slices that are smaller, and for the eight chips of a single host of v5e and v6e."""
        return self.chips if self.chips < 4 or (self.chips == 8 and self.kind.cores == 1) else 4

    @property
    def hosts(self) -> int:
        """The number of hosts, each of which runs one process."""
        return self.chips // self.chips_per_host

    @property
    def name(self) -> str:
        """Such as v5p-32, a slice of 16 chips."""
        return f"{self.generation}-{self.chips * self.kind.cores}"

    @property
    def cloud_name(self) -> str:
        """The name in Cloud TPU's API."""
        return f"{self.kind.cloud}-{self.chips * self.kind.cores}"

    @property
    def device(self) -> str:
        """The name of its chips in ``capacity.DEVICES``."""
        return f"tpu-{self.generation}"


def tpu_slice(name: str) -> TpuSlice:
    """The slice of a name, such as v5p-32, v6e-16, v5e-16 or v5litepod-16.

    Raises:
        InputError: if there is no such generation, or none of its slices has that size.
    """
    prefix, _, size = name.partition("-")
    generation = {kind.cloud: generation for generation, kind in GENERATIONS.items()}.get(prefix, prefix)
    if generation not in GENERATIONS:
        raise InputError(
            f"{name} is not a slice of TPU {', '.join(GENERATIONS)}, which are known here: give one such as v5p-32",
            argument="accelerator",
        )
    slices = [TpuSlice(generation, topology) for topology in GENERATIONS[generation].topologies]
    for found in slices:
        if size == found.name.partition("-")[2]:
            return found
    counted = "two cores per chip" if GENERATIONS[generation].cores == 2 else "chips"
    raise InputError(
        f"{name} doesn't exist: the sizes of {generation} count {counted}, and there are "
        f"{', '.join(found.name for found in slices)}",
        argument="accelerator",
    )


def compile_command(device: str, devices: int) -> str:
    """The beginning of the command that compiles for so many devices of a name in ``capacity.DEVICES``.

    The shape of TPUs is left to the reader if there are that many in no slice.
    """
    kind = device.removeprefix("tpu-")
    slices = (TpuSlice(kind, shape) for shape in GENERATIONS[kind].topologies) if kind in GENERATIONS else ()
    shape = devices if kind == device else next((found.topology for found in slices if found.chips == devices), None)
    return f"peer-jax compile --topology {kind}:{'SHAPE' if shape is None else shape}"
