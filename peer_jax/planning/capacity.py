"""Computes whether a run fits a mesh and how fast a step can be at best, without allocating or compiling anything.

Parameters and moments are taken from the run's own abstract state, split as ``peer_jax.sharding`` splits them. A
feed-forward layer itself says what it keeps, works with, reads and exchanges (``FeedForward.costs``). The rest follows
from formulas:

*Kept for the backward pass*, per token and block, in elements of the computation's type (a bytes each) unless said
otherwise:

- the residual stream before attention and before the feed-forward layer, both normalised, queries, keys, values, and
  the output of attention: 8 d;
- attention's probabilities where they are held: heads * seq_len, once in float32 and once in the computation's type.
  Accelerators are taken to run the kernels that hold none, unless the run asks for implementation "xla".

Results of elementwise functions are taken to be computed again. With remat only the residual stream between blocks is
kept (d), and the rest of one block at a time. The mask takes seq_len bytes per token.

*Worked with*, beside what is kept. The loss needs the logits of a chunk of tokens and their gradient in float32, and
the gradient also in the computation's type if that is another one. The backward pass of a block needs the gradients of
attention's scores and probabilities in float32 or what the feed-forward layer works with, whichever is larger, and the
dense kernels that are gathered over fsdp, with their gradients.

*Fullest moment*: the backward pass goes from the last block to the first. At each block, the blocks below are still
kept, and the gradients of the blocks above exist already. The sum of table gradients over copies, which holds these
gradients twice, and the update are compared, too.

t  tokens of a device     E  devices along ``expert``     D  data * fsdp     P  all devices
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from peer_jax.errors import InputError
from peer_jax.layers import DeviceLoad, LayerCosts
from peer_jax.layers.interface import Table
from peer_jax.models import Transformer
from peer_jax.ops import traffic
from peer_jax.ops.chunks import ACCELERATOR_BUDGET, CPU_BUDGET
from peer_jax.ops.cross_entropy import tokens_at_once
from peer_jax.ops.traffic import INDEX
from peer_jax.sharding import AXES, DATA, EXPERT, FSDP, Placement, mesh_axes, part_bytes, use
from peer_jax.training.flops import TRAINING_TO_FORWARD
from peer_jax.training.run import Run
from peer_jax.training.step import TrainState
from peer_jax.training.update_by_rows import ROWS_BUDGET

FLOAT = 4  # bytes

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


class Moment(NamedTuple):
    """Bytes per device at one moment of a step, beside parameters and optimiser."""

    name: str
    gradients: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.working


class MemoryPlan(NamedTuple):
    """Bytes per device; ``fullest`` is the moment of a step that needs most memory beside the other fields."""

    parameters: float
    optimizer: float
    other: float  # statistics and the batch
    fullest: Moment

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.other + self.fullest.total


class StepPlan(NamedTuple):
    """FLOPs per device and step; bytes to and from its memory and received from other devices, by cause."""

    flops: float
    memory: dict[str, float]
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
            "memory traffic": sum(self.memory.values()) / device.bandwidth,
            "interconnect": received,
        }


class Plan(NamedTuple):
    """A run on a mesh.

    Attributes:
        mesh: sizes of the axes.
        tables: whether tables are split by "rows" or "columns".
        tokens: tokens per device and micro-batch.
        memory, step: the counts.
        unknown: labels of the layers that don't say their costs. ``memory`` and ``step`` lack what these layers keep,
            work with, read and exchange, and so are lower bounds; they count the parameters, gradients and FLOPs.
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


def plan(run: Run, mesh: Mapping[str, int] | None = None, devices: int | None = None, *, on_cpu: bool = False) -> Plan:
    """What ``run`` needs on a mesh.

    Args:
        run: as ``train`` takes it.
        mesh: sizes of axes, in place of the sizes of ``run.sharding``.
        devices: the number of devices; the product of the mesh's sizes if None, where -1 counts as 1.
        on_cpu: count the chunks that a CPU takes, and the copies that XLA makes for an update there; this is for
            comparing with compiled programs.

    Raises:
        InputError: if the mesh or the run doesn't fit the devices, or a layer can't be planned on them.
    """
    sharding = dataclasses.replace(run.sharding, **(mesh or {}))
    if devices is None:
        devices = math.prod(max(1, getattr(sharding, axis)) for axis in AXES)
    sizes = sharding.sizes(devices)
    placement = Placement(AbstractMesh(tuple(sizes.values()), AXES), sharding.tables)
    placement.check_rows("Run.batch_size / Run.accumulation", run.batch_size // run.accumulation)
    with use(placement):
        trainer = run.trainer()
        state = trainer.abstract_state()
    model = trainer.abstract_model
    load = DeviceLoad(
        tokens=run.batch_size // run.accumulation * run.task.seq_len // placement.mesh.size,
        seq_len=run.task.seq_len,
        expert=placement.size(EXPERT),
        copies=placement.size(DATA) * placement.size(FSDP),
        tables=sharding.tables,
        size=jnp.dtype(model.dtype).itemsize,
        budget=CPU_BUDGET if on_cpu else ACCELERATOR_BUDGET,
        remat=model.remat,
    )
    costs = [block.ffw.costs(load) for block in model.blocks]
    unknown = dict.fromkeys(block.ffw.label for block, known in zip(model.blocks, costs, strict=True) if known is None)
    counted = _Counting(model, state, placement, load, costs, run.accumulation, on_cpu)
    return Plan(sizes, sharding.tables, load.tokens, counted.memory(), counted.step(), tuple(unknown))


class _Counting:
    """The counts of one run, by the formulas above; a layer whose costs are unknown counts nothing."""

    def __init__(
        self,
        model: Transformer,
        state: TrainState,
        placement: Placement,
        load: DeviceLoad,
        costs: Sequence[LayerCosts | None],
        accumulation: int,
        on_cpu: bool,
    ) -> None:
        self.model, self.state, self.placement = model, state, placement
        self.accumulation, self.on_cpu = accumulation, on_cpu
        self.layers = [LayerCosts(kept=0.0, working=0.0) if known is None else known for known in costs]
        self.t, self.seq_len, self.a = load.tokens, load.seq_len, load.size
        self.E, self.D, self.P = load.expert, load.copies, placement.mesh.size

    # Memory.

    def memory(self) -> MemoryPlan:
        """Bytes per device."""
        parameters, optimizer, others = (
            part_bytes(tree) for tree in (self.state.params, self.state.optimizer, self.state.others)
        )
        batch = 3 * INDEX * self.t * self.accumulation
        return MemoryPlan(parameters, optimizer, others + batch, max(self.moments(), key=lambda moment: moment.total))

    def moments(self) -> list[Moment]:
        """The moments that may be the fullest."""
        whole = self._kept()
        between = self.a * self.t * self.model.d_model
        kept = [between if self.model.remat else size for size in whole]
        outside = self.seq_len * self.t + 2 * between  # the mask; the residual stream around the last norm
        always = self._held_for_update() + (self._gradients() if self.accumulation > 1 else 0)
        chunk = tokens_at_once(self.t, self.model.vocab_size)
        logits = (2 * FLOAT + (self.a if self.a < FLOAT else 0)) * chunk * self.model.vocab_size
        found = [Moment("the loss", 0, sum(kept) + outside, logits + always)]
        gradients = self._gradients("embed", "head", "final_norm")
        for index in reversed(range(len(whole))):
            below = sum(kept[: index + 1]) + outside
            activations = below + (whole[index] if self.model.remat else 0)
            gradients += self._gradients(index)
            working = self._working(index) + always
            found.append(Moment(f"the backward pass of block {index}", gradients, activations, working))
            if (tables := self._gradients(index, only_tables=True)) and self.D > 1:
                name = f"the sum of block {index}'s table gradients over copies"
                found.append(Moment(name, gradients + tables, activations, always))
        again = gradients - self._gradients(only_tables=True) if self.P > 1 else 0
        found.append(Moment("the update", gradients + again, 0, always))
        return found

    def _params(self, *of: str | int) -> Iterator[tuple[tuple, jax.ShapeDtypeStruct, bool]]:
        """All parameters, or the parameters of some blocks and modules: path, array and whether it is a table."""
        for path, variable in nnx.to_flat_state(self.state.params):
            if not of or (path[1] if path[0] == "blocks" else path[0]) in of:
                yield path, variable.get_value(), isinstance(variable, Table)

    def _gradients(self, *of: str | int, only_tables: bool = False) -> float:
        """Bytes of the part of the gradients of ``_params(*of)`` that a device has."""
        return float(sum(part_bytes(leaf) for _, leaf, is_table in self._params(*of) if is_table or not only_tables))

    def _held_for_update(self) -> float:
        """Bytes that XLA copies on CPU before the forward pass: arrays that are updated whole, and the first rows of
        arrays that are updated by rows.
        """
        if not self.on_cpu:
            return 0.0
        sizes = (part_bytes(leaf) for _, leaf, _ in self._params())
        return float(sum(size if size <= ROWS_BUDGET else 3 * ROWS_BUDGET for size in sizes))

    def _kept(self) -> list[float]:
        """Bytes that the forward pass of each block leaves for the backward pass."""
        attention = 8 * self.model.d_model * self.a + self._scores() * (FLOAT + self.a)
        return [self.t * attention + layer.kept for layer in self.layers]

    def _scores(self) -> int:
        """Scores of attention per token and block that are held."""
        held = self.on_cpu or self.model.blocks[0].attention.implementation == "xla"
        return self.model.num_heads * self.seq_len if held else 0

    def _working(self, index: int) -> float:
        """Bytes that the backward pass of a block holds beside what is kept."""
        attention = 2 * FLOAT * self.t * self._scores()
        others = self.placement.size(FSDP) - 1
        kernels = others * sum(part_bytes(leaf) for _, leaf, is_table in self._params(index) if not is_table)
        return max(attention, self.layers[index].working) + 2 * kernels

    # Work.

    def step(self) -> StepPlan:
        """FLOPs and bytes per device."""
        passes = TRAINING_TO_FORWARD + self.model.remat
        flops = passes * self.model.flops_per_token(self.seq_len) * self.t * self.accumulation
        return StepPlan(flops, self._memory_traffic(), self._interconnect())

    def _memory_traffic(self) -> dict[str, float]:
        """The least bytes: what is kept is written and read; kernels and retrieved rows are read in each pass."""
        passes = 2 + self.model.remat
        kernels = passes * sum(self._whole(leaf)[0] for _, leaf, is_table in self._params() if not is_table)
        rows = sum(layer.rows_read for layer in self.layers)
        kept = sum(self._kept()) + 2 * FLOAT * self.t * self.model.vocab_size
        state = part_bytes((self.state.params, self.state.optimizer))
        return {
            "update": 2 * (self._gradients() + state),
            "kernels": self.accumulation * kernels,
            "rows of tables": self.accumulation * rows,
            "activations": self.accumulation * 2 * kept,
        }

    def _whole(self, leaf: jax.ShapeDtypeStruct) -> tuple[float, int, int]:
        """Bytes of a kernel that is gathered over fsdp, the number of its parts there, and the number of its copies."""
        named = mesh_axes(leaf.sharding.spec)
        F = self.placement.size(FSDP) if FSDP in named else 1
        parts = F * (self.E if EXPERT in named else 1)
        return F * part_bytes(leaf), F, self.P // parts

    def _interconnect(self) -> dict[str, float]:
        """Bytes that a device receives by cause, in rings as in ``traffic``; statistics and norms are left out."""
        remat, n = self.model.remat, self.accumulation
        layers = traffic.Collectives()
        for layer in self.layers:
            layers = layers.plus(layer.exchanged)
        layers = layers.received(self.E, self.D)
        kernels = gradients = 0.0
        for path, leaf, is_table in self._params():
            if is_table:  # counted by the layers
                continue
            whole, F, copies = self._whole(leaf)
            passes = 2 if remat and path[0] == "blocks" else 1
            kernels += passes * whole * (F - 1) / F
            gradients += whole * (F - 1) / F + 2 * whole / F * (copies - 1) / copies
        return {
            TOKENS: n * (sum(layers) - layers.copies),
            TABLE_GRADIENTS: n * layers.copies,
            KERNELS: n * kernels,
            GRADIENTS: n * gradients,
        }
