"""Counts what a run holds and exchanges on a mesh, and the least time of a step, without allocating or compiling.

The parameters, the optimiser's state and the batch are exact, split as ``peer_jax.sharding`` splits them. FLOPs and the
bytes that devices receive follow from formulas; a feed-forward layer itself says what it exchanges for the parameters
that are split over ``expert`` (``FeedForward.exchanged``). What else a step holds at its peak, and reads and writes, is
up to the compiler: it is bounded from below here, and ``peer_jax.planning.compiled`` asks the compiler.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from peer_jax.errors import InputError
from peer_jax.layers import DeviceLoad
from peer_jax.layers.interface import Table
from peer_jax.ops.traffic import Collectives
from peer_jax.sharding import AXES, DATA, EXPERT, FSDP, Placement, mesh_axes, part_bytes, use
from peer_jax.training import room
from peer_jax.training.flops import TRAINING_TO_FORWARD
from peer_jax.training.run import Run
from peer_jax.training.step import TrainState

# Causes of exchanges.
TOKENS, TABLE_GRADIENTS = "tokens to the experts and back", "table gradients over copies"
KERNELS, GRADIENTS = "kernels over fsdp", "other gradients"
CAUSES = (TOKENS, TABLE_GRADIENTS, KERNELS, GRADIENTS)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device has and can do at most, in FLOPs per second, bytes and bytes per second."""

    flops: float  # per second, in dense bfloat16 products
    memory: float
    bandwidth: float  # of the memory
    links: float  # received from devices of the same domain
    domain: int  # devices that are connected by links
    network: float  # received from other domains, by a port of the device


# TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e; the links of a chip have 2400, 1600, 4800 and 3584 Gbit/s, and
# a pod is the domain.
# GPU: NVIDIA's data sheets of the H100 SXM and H200 SXM, where NVLink has 900 GB/s in both directions together, and of
# the DGX H100 and H200, whose 8 GPUs have a port of 400 Gbit/s each.
DEVICES = {
    "tpu-v4": Device(275e12, 32 * 2**30, 1228e9, 300e9, 4096, 300e9),
    "tpu-v5e": Device(197e12, 16 * 2**30, 819e9, 200e9, 256, 200e9),
    "tpu-v5p": Device(459e12, 95 * 2**30, 2765e9, 600e9, 8960, 600e9),
    "tpu-v6e": Device(918e12, 32 * 2**30, 1640e9, 448e9, 256, 448e9),
    "h100": Device(989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Device(989e12, 141e9, 4800e9, 450e9, 8, 50e9),
}


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in DEVICES:
        raise InputError(f"{name} is not one of the devices {', '.join(DEVICES)}", argument="device")
    return DEVICES[name]


class MemoryPlan(NamedTuple):
    """Bytes per device.

    Attributes:
        parameters, optimizer: the state of a run.
        other: statistics and the batch.
        working: what a step holds at least beside these three: the gradients, those of tables perhaps of touched rows
            alone, which exist all at once when they are clipped by their norm, or the activations that
            ``peer_jax.training.room`` counts, if they are more.
    """

    parameters: float
    optimizer: float
    other: float
    working: float

    @property
    def total(self) -> float:
        """The least that a step takes."""
        return sum(self)


class StepPlan(NamedTuple):
    """FLOPs of a device; bytes of the state that it reads and writes; bytes that it receives from others, by cause."""

    flops: float
    state: float
    interconnect: dict[str, float]

    def seconds(self, device: Device, mesh: Mapping[str, int]) -> dict[str, float]:
        """The least time of each kind of work; a step takes at least the longest of them.

        The devices of an ``expert`` axis are taken to be neighbours. Devices of a domain that exchange the same array
        share their ports.
        """
        E, EF, P = mesh[EXPERT], mesh[EXPERT] * mesh[FSDP], math.prod(mesh.values())
        every, strided = device.domain, max(1, device.domain // E)
        # For each cause: how many devices in a row it spans, and how many of a domain exchange with one another.
        groups = {
            TOKENS: (E, every),
            TABLE_GRADIENTS: (P, strided),
            KERNELS: (EF, strided),
            GRADIENTS: (P, every),
        }

        def rate(span: int, sharing: int) -> float:
            return device.links if span <= device.domain else min(device.links, sharing * device.network)

        received = sum(size / rate(*groups[cause]) for cause, size in self.interconnect.items())
        return {
            "FLOPs": self.flops / device.flops,
            "state, read and written": self.state / device.bandwidth,
            "interconnect": received,
        }


class Plan(NamedTuple):
    """A run on a mesh.

    Attributes:
        mesh: sizes of the axes.
        tables: whether tables are split by "rows" or "columns".
        tokens: tokens per device and micro-batch.
        memory, step: the counts.
        unknown: labels of the layers that don't say what they exchange, which ``step`` lacks.
    """

    mesh: dict[str, int]
    tables: str
    tokens: int
    memory: MemoryPlan
    step: StepPlan
    unknown: tuple[str, ...] = ()


def parse_mesh(text: str | None) -> dict[str, int]:
    """Parses ``data=2,fsdp=1,expert=4`` into the sizes of the axes that are named.

    Raises:
        InputError: if the text has another form, or names an axis that doesn't exist.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise InputError(f"{text} has no axis {axis!r}: the mesh has {', '.join(AXES)}", argument="mesh")
        if not size.lstrip("-").isdecimal():
            raise InputError(f"{text} is not of the form data=2,fsdp=1,expert=4", argument="mesh")
        if axis in sizes:
            raise InputError(f"{text} names {axis} twice", argument="mesh")
        sizes[axis] = int(size)
    return sizes


def plan(run: Run, mesh: Mapping[str, int] | None = None, devices: int | None = None) -> Plan:
    """What ``run`` needs on a mesh of accelerators.

    Args:
        run: as ``train`` takes it.
        mesh: sizes of axes, in place of the sizes of ``run.sharding``.
        devices: the number of devices; the product of the mesh's sizes if None, where -1 counts as 1.

    Raises:
        InputError: if the mesh or the run doesn't fit the devices.
    """
    sharding = dataclasses.replace(run.sharding, **(mesh or {}))
    if devices is None:
        devices = math.prod(max(1, getattr(sharding, axis)) for axis in AXES)
    sizes = sharding.sizes(devices)
    placement = Placement(AbstractMesh(tuple(sizes.values()), AXES), sharding.tables)
    placement.check_rows("Run.batch_size / Run.accumulation", run.batch_size // run.accumulation)
    seq_len = run.task.seq_len
    with use(placement):
        trainer = run.trainer()
        state = trainer.abstract_state()
        tokens = run.batch_size // run.accumulation * seq_len
        whole, tables = trainer.touched.split(state.params, tokens)
        changes = functools.partial(trainer.touched.changes, tables, tokens)
        # On a mesh, E parts of a compact table are split over E devices, and so are its columns.
        gradients = part_bytes(whole) + part_bytes(jax.eval_shape(changes)) / placement.size(EXPERT)
    model = trainer.abstract_model
    tokens //= placement.mesh.size
    parameters, optimizer, others = (part_bytes(tree) for tree in (state.params, state.optimizer, state.others))
    row_bytes = sum(array.nbytes for array in run.task.example(1).values())
    batch = row_bytes * (tokens // seq_len) * run.accumulation
    activations = room.activation_bytes(model, tokens, seq_len, on_cpu=False)
    memory = MemoryPlan(parameters, optimizer, others + batch, max(gradients, activations))
    flops = (TRAINING_TO_FORWARD + model.remat) * model.flops_per_token(seq_len) * tokens * run.accumulation
    load = DeviceLoad(
        tokens=tokens,
        seq_len=seq_len,
        expert=placement.size(EXPERT),
        copies=placement.size(DATA) * placement.size(FSDP),
        tables=sharding.tables,
        size=jnp.dtype(model.dtype).itemsize,
        remat=model.remat,
        touched=trainer.touched.micro_share if tables else None,
    )
    layers = [block.ffw for block in model.blocks]
    exchanged = [layer.exchanged(load) for layer in layers]
    unknown = dict.fromkeys(layer.label for layer, known in zip(layers, exchanged, strict=True) if known is None)
    received = _received(exchanged, load, state.params, placement)
    interconnect = {cause: run.accumulation * size for cause, size in received.items()}
    step = StepPlan(flops, 2 * _updated_whole(state, touched=bool(tables)), interconnect)
    return Plan(sizes, sharding.tables, tokens, memory, step, tuple(unknown))


def _updated_whole(state: TrainState, *, touched: bool) -> int:
    """Bytes of the parameters, and of the optimiser's state, that a step changes whatever the batch is.

    With ``touched``, those of tables depend on the batch.
    """
    leaves = jax.tree.leaves((state.params, state.optimizer), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return part_bytes([leaf for leaf in leaves if not (touched and isinstance(leaf, Table))])


def _received(
    exchanged: Sequence[Collectives | None], load: DeviceLoad, params: nnx.State, placement: Placement
) -> dict[str, float]:
    """Bytes that a device receives in a micro-batch, in rings as in ``traffic``; statistics and norms are left out."""
    layers = Collectives()
    for known in exchanged:
        layers = layers.plus(known or Collectives())
    layers = layers.received(load.expert, load.copies)
    kernels = gradients = 0.0
    for path, variable in nnx.to_flat_state(params):
        if isinstance(variable, Table):  # counted by the layers
            continue
        leaf = variable.get_value()
        named = mesh_axes(leaf.sharding.spec)
        F = placement.size(FSDP) if FSDP in named else 1
        copies = placement.mesh.size // (F * (load.expert if EXPERT in named else 1))
        whole = F * part_bytes(leaf)  # gathered over fsdp
        kernels += (2 if load.remat and path[0] == "blocks" else 1) * whole * (F - 1) / F
        gradients += whole * (F - 1) / F + 2 * whole / F * (copies - 1) / copies
    return {
        TOKENS: sum(layers) - layers.copies - layers.everywhere,
        TABLE_GRADIENTS: layers.copies + layers.everywhere,
        KERNELS: kernels,
        GRADIENTS: gradients,
    }
