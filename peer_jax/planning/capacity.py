"""Whether a run fits a mesh, and how fast a step can be at best, on paper: nothing is allocated or compiled.

Parameters and moments are those of the run's own abstract state, cut as ``peer_jax.sharding`` cuts them; what split
tables exchange and hold is ``peer_jax.ops.traffic``'s. The rest are formulas:

*Kept for the backward pass*, a token and block, in elements of the computation's type (a bytes) unless said otherwise:

- the residual stream before attention and before the feed-forward layer, both normalised, queries, keys, values, and
  what attention returns: 8 d;
- attention's probabilities: heads * seq_len, in float32 and in a;
- Dense: what goes into the activation and what comes out, 2 d_ff; gated 3 d_ff. MoE: the same for each place of an
  expert;
- PEER and PKM: queries before and after their norm in float32, 8 h d_key bytes; score, gate and index of a pair, 12
  bytes; and what the forward pass has gathered of all E t tokens and the backward pass needs, too.

What is elementwise is taken to be computed again. With remat only the residual stream between blocks is kept, d, and
the rest of one block at a time. Besides: the mask, seq_len bytes a token.

*Worked with*, beside what is kept: at the loss, logits and their gradient in float32, and in a if that is another
type. In a block's backward pass, the larger of the gradients of attention's scores and probabilities, in float32, and
of what its feed-forward layer takes: gradients of d_ff, scores of the retrieval, or E t tokens and chunks of rows; and
dense kernels that are gathered over fsdp, with their gradients.

*Fullest moment*: the backward pass goes from the last block to the first; at each, the blocks below are still kept and
the gradients from there up exist. The sum of table gradients over copies, which holds them twice, and the update are
looked at, too.

t  tokens of a device     E  devices along ``expert``     D  data * fsdp     P  all devices
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from peer_jax.errors import InputError
from peer_jax.layers import PEER, Dense, MoE
from peer_jax.layers.interface import Table
from peer_jax.layers.retrieval import ProductKeyRetrieval
from peer_jax.models import Transformer
from peer_jax.models.transformer import Block
from peer_jax.ops import floor, traffic
from peer_jax.ops.chunks import ACCELERATOR_BUDGET, CPU_BUDGET
from peer_jax.ops.traffic import INDEX
from peer_jax.sharding import AXES, DATA, EXPERT, FSDP, Placement, mesh_axes, use
from peer_jax.training.flops import TRAINING_TO_FORWARD
from peer_jax.training.loop import Run
from peer_jax.training.step import TrainState
from peer_jax.training.update_by_rows import ROWS_BUDGET

FLOAT = 4  # bytes

# Causes of exchanges.
TOKENS, TABLE_GRADIENTS = "tokens to the tables and back", "table gradients over copies"
EXPERTS, KERNELS, GRADIENTS = "tokens to MoE's experts and back", "kernels over fsdp", "other gradients"
CAUSES = (TOKENS, EXPERTS, TABLE_GRADIENTS, KERNELS, GRADIENTS)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do at most, in bytes and seconds.

    ``links`` is what it receives within a domain of so many devices, ``network`` what its port receives from others.
    """

    flops: float  # a second, dense bfloat16
    memory: float
    bandwidth: float
    links: float
    domain: int
    network: float


# TPU: cloud.google.com/tpu/docs/v5p and /v6e, links of a chip 4800 and 3584 Gbit/s, a pod as domain. GPU: NVIDIA's
# data sheets of the H100 SXM and H200 SXM, NVLink 900 GB/s in both directions together, and of the DGX H100 and H200, 8
# GPUs with a port of 400 Gbit/s each.
DEVICES = {
    "tpu-v5p": Device(459e12, 95 * 2**30, 2765e9, 600e9, 8960, 600e9),
    "tpu-v6e": Device(918e12, 32 * 2**30, 1640e9, 448e9, 256, 448e9),
    "h100": Device(989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Device(989e12, 141e9, 4800e9, 450e9, 8, 50e9),
}


def device(name: str) -> Device:
    """That of a name.

    Raises:
        InputError: if there is none.
    """
    if name not in DEVICES:
        raise InputError(f"--device {name} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]


class Moment(NamedTuple):
    """Bytes a device at one moment of a step, beside parameters and optimiser."""

    name: str
    gradients: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.working


class MemoryPlan(NamedTuple):
    """Bytes a device; ``fullest`` is the moment that takes most beside the rest."""

    parameters: float
    optimizer: float
    other: float  # statistics and the batch
    fullest: Moment

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.other + self.fullest.total


class StepPlan(NamedTuple):
    """Of a device and step: FLOPs; bytes to and from memory and from other devices, by cause."""

    flops: float
    memory: dict[str, float]
    interconnect: dict[str, float]

    def seconds(self, device: Device, mesh: Mapping[str, int]) -> dict[str, float]:
        """The least time of each kind of work; a step takes the longest of them at least.

        The devices of an ``expert`` axis are neighbours. Those of a domain that exchange the same share their ports.
        """
        E, EF, P = mesh[EXPERT], mesh[EXPERT] * mesh[FSDP], math.prod(mesh.values())
        every, strided = device.domain, max(1, device.domain // E)
        # Of each cause: how many devices in a row it spans, and how many of a domain exchange with one another.
        groups = {
            TOKENS: (E, every),
            EXPERTS: (E, every),
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
    """A run on a mesh; tables are split by "rows" or "columns"."""

    mesh: dict[str, int]
    tables: str
    tokens: int  # of a device and micro-batch
    memory: MemoryPlan
    step: StepPlan


def parse_mesh(text: str | None) -> dict[str, int]:
    """``data=2,fsdp=1,expert=4`` as sizes; what isn't named is not in it.

    Raises:
        InputError: for another form, or an axis that doesn't exist.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise InputError(f"--mesh {text} has no axis {axis!r}: the mesh has {', '.join(AXES)}")
        if not size.lstrip("-").isdecimal():
            raise InputError(f"--mesh {text} is not of the form data=2,fsdp=1,expert=4")
        if axis in sizes:
            raise InputError(f"--mesh {text} names {axis} twice")
        sizes[axis] = int(size)
    return sizes


def plan(run: Run, mesh: Mapping[str, int] | None = None, devices: int | None = None, *, on_cpu: bool = False) -> Plan:
    """What ``run`` needs on a mesh.

    Args:
        run: as ``train`` takes it.
        mesh: sizes of axes, in place of those of ``run.sharding``.
        devices: how many there are; as many as the mesh names where None, of which -1 counts as 1.
        on_cpu: with a CPU's chunks and, as XLA does there, what the update copies: to compare with compiled programs.

    Raises:
        InputError: if the mesh or the run doesn't fit the devices.
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
    if placement.mesh.size > 1 and any(getattr(block.ffw, "capacity_factor", 1.0) is None for block in model.blocks):
        raise InputError("MoE.capacity_factor=None can't be planned on several devices: give a number")
    t = run.batch_size // run.accumulation * run.task.seq_len // placement.mesh.size
    counted = _Counting(model, state, placement, t, run.task.seq_len, run.accumulation, on_cpu)
    return Plan(sizes, sharding.tables, t, counted.memory(), counted.step())


def _part(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that one device has."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


class _Counting:
    """The counts of one run, by the formulas above."""

    def __init__(
        self,
        model: Transformer,
        state: TrainState,
        placement: Placement,
        t: int,
        seq_len: int,
        accumulation: int,
        on_cpu: bool,
    ) -> None:
        self.model, self.state, self.placement = model, state, placement
        self.t, self.seq_len, self.accumulation, self.on_cpu = t, seq_len, accumulation, on_cpu
        self.a = jnp.dtype(model.dtype).itemsize
        self.E, self.P = placement.size(EXPERT), placement.mesh.size
        self.D = placement.size(DATA) * placement.size(FSDP)
        self.budget = CPU_BUDGET if on_cpu else ACCELERATOR_BUDGET

    # Memory.

    def memory(self) -> MemoryPlan:
        """Bytes a device."""
        parameters, optimizer, others = (
            sum(map(_part, jax.tree.leaves(tree)))
            for tree in (self.state.params, self.state.optimizer, self.state.others)
        )
        batch = 3 * INDEX * self.t * self.accumulation
        return MemoryPlan(parameters, optimizer, others + batch, max(self.moments(), key=lambda moment: moment.total))

    def moments(self) -> list[Moment]:
        """Those that may be the fullest."""
        whole = [self._kept(block) for block in self.model.blocks]
        between = self.a * self.t * self.model.d_model
        kept = [between if self.model.remat else size for size in whole]
        outside = self.seq_len * self.t + 2 * between  # the mask; around the last norm
        always = self._held_for_update() + (self._gradients() if self.accumulation > 1 else 0)
        logits = (2 * FLOAT + (self.a if self.a < FLOAT else 0)) * self.t * self.model.vocab_size
        found = [Moment("the loss", 0, sum(kept) + outside, logits + always)]
        gradients = self._gradients("embed", "head", "final_norm")
        for index, block in reversed(list(enumerate(self.model.blocks))):
            below = sum(kept[: index + 1]) + outside
            activations = below + (whole[index] if self.model.remat else 0)
            gradients += self._gradients(index)
            working = self._working(index, block) + always
            found.append(Moment(f"the backward pass of block {index}", gradients, activations, working))
            if (tables := self._gradients(index, only_tables=True)) and self.D > 1:
                name = f"the sum of block {index}'s table gradients over copies"
                found.append(Moment(name, gradients + tables, activations, always))
        again = gradients - self._gradients(only_tables=True) if self.P > 1 else 0
        found.append(Moment("the update", gradients + again, 0, always))
        return found

    def _params(self, *of: str | int) -> Iterator[tuple[tuple, jax.ShapeDtypeStruct, bool]]:
        """Path, array and whether it is a table, of all parameters or of those of some blocks and other modules."""
        for path, variable in nnx.to_flat_state(self.state.params):
            if not of or (path[1] if path[0] == "blocks" else path[0]) in of:
                yield path, variable.get_value(), isinstance(variable, Table)

    def _gradients(self, *of: str | int, only_tables: bool = False) -> float:
        """Bytes of a device's part of the gradients of ``_params(*of)``."""
        return float(sum(_part(leaf) for _, leaf, is_table in self._params(*of) if is_table or not only_tables))

    def _held_for_update(self) -> float:
        """On CPU, XLA copies what is updated whole, and cuts first rows of the rest, before the forward pass."""
        if not self.on_cpu:
            return 0.0
        sizes = (_part(leaf) for _, leaf, _ in self._params())
        return float(sum(size if size <= ROWS_BUDGET else 3 * ROWS_BUDGET for size in sizes))

    def _kept(self, block: Block) -> float:
        """Of one block, for the backward pass."""
        model, ffw, a = self.model, block.ffw, self.a
        of_token = 8 * model.d_model * a + model.num_heads * self.seq_len * (FLOAT + a)
        if isinstance(ffw, Dense):
            of_token += (2 if ffw.gate is None else 3) * a * ffw.up.out_features
        elif isinstance(ffw, MoE):
            width = (2 if ffw.gate is None else 3) * ffw.up.shape[-1] + 2 * model.d_model
            of_token += 2 * FLOAT * ffw.num_experts + self._places(ffw) * a * width
        elif isinstance(ffw, ProductKeyRetrieval):
            of_token += 2 * FLOAT * ffw.num_heads * ffw.d_key + 3 * FLOAT * ffw.num_heads * ffw.top_k
            return self.t * of_token + self._table_memory(ffw).kept
        return self.t * of_token

    def _places(self, moe: MoE) -> float:
        """Places of all experts, a token."""
        router = math.prod(moe.router.kernel.shape)
        expert = (moe.num_params() - router) / moe.num_experts
        return (moe.flops_per_token(self.seq_len) / 2 - router) / expert

    def _working(self, index: int, block: Block) -> float:
        """Of one block's backward pass, beside what is kept."""
        model, ffw = self.model, block.ffw
        attention = 2 * FLOAT * self.t * model.num_heads * self.seq_len
        if isinstance(ffw, ProductKeyRetrieval):
            n = math.isqrt(ffw.num_experts)
            scores = 3 * min(self.budget, FLOAT * self.t * ffw.num_heads * n)
            held = self._table_memory(ffw)
            feed_forward = max(scores, held.gathered - held.kept + held.chunks)
        elif isinstance(ffw, MoE):
            feed_forward = 2 * self.a * self.t * self._places(ffw) * (ffw.up.shape[-1] + model.d_model)
        else:
            feed_forward = 2 * self.a * self.t * (ffw.up.out_features if isinstance(ffw, Dense) else model.d_model)
        others = self.placement.size(FSDP) - 1
        kernels = others * sum(_part(leaf) for _, leaf, is_table in self._params(index) if not is_table)
        return max(attention, feed_forward) + 2 * kernels

    def _table_memory(self, ffw: ProductKeyRetrieval) -> traffic.Memory:
        memory = traffic.expert_mix_memory if isinstance(ffw, PEER) else traffic.value_bag_memory
        return memory(*self._sizes(ffw), self.budget, **self._element_sizes(ffw))

    def _sizes(self, ffw: ProductKeyRetrieval) -> tuple[int, int, int, int, int, int, str]:
        r = ffw.num_heads * ffw.top_k
        return self.t, r, ffw.d_model, ffw.num_experts, self.E, self.D, self.placement.tables

    def _element_sizes(self, ffw: ProductKeyRetrieval) -> dict[str, int]:
        """PEER's gates stay float32, PKM's take the type of the computation."""
        return {"size": self.a, "gate_size": FLOAT if isinstance(ffw, PEER) else self.a}

    # Work.

    def step(self) -> StepPlan:
        """FLOPs and bytes."""
        passes = TRAINING_TO_FORWARD + self.model.remat
        flops = passes * self.model.flops_per_token(self.seq_len) * self.t * self.accumulation
        return StepPlan(flops, self._memory_traffic(), self._interconnect())

    def _memory_traffic(self) -> dict[str, float]:
        """The least: what is kept is written and read, kernels are read in each pass, and rows once for each pair."""
        passes = 2 + self.model.remat
        kernels = passes * sum(self._whole(leaf)[0] for _, leaf, is_table in self._params() if not is_table)
        rows = 0.0
        for ffw in self._retrievals():
            t, r, d, N, *_ = self._sizes(ffw)
            tables = (ffw.down, ffw.up) if isinstance(ffw, PEER) else (ffw.values,)
            # Of E t tokens a device has an E-th of the pairs, or an E-th of each row.
            used = 2 * floor.rows_read("token", N, t * r)
            rows += used * d * sum(table.get_value().dtype.itemsize for table in tables)
        kept = sum(self._kept(block) for block in self.model.blocks) + 2 * FLOAT * self.t * self.model.vocab_size
        state = sum(map(_part, jax.tree.leaves((self.state.params, self.state.optimizer))))
        return {
            "update": 2 * (self._gradients() + state),
            "kernels": self.accumulation * kernels,
            "rows of tables": self.accumulation * rows,
            "activations": self.accumulation * 2 * kept,
        }

    def _retrievals(self) -> list[ProductKeyRetrieval]:
        return [block.ffw for block in self.model.blocks if isinstance(block.ffw, ProductKeyRetrieval)]

    def _whole(self, leaf: jax.ShapeDtypeStruct) -> tuple[float, int, int]:
        """Bytes of a kernel once it is gathered over fsdp, into how many parts it is split there, and its copies."""
        named = mesh_axes(leaf.sharding.spec)
        F = self.placement.size(FSDP) if FSDP in named else 1
        parts = F * (self.E if EXPERT in named else 1)
        return F * _part(leaf), F, self.P // parts

    def _interconnect(self) -> dict[str, float]:
        """Bytes that a device receives, by cause; rings, as ``traffic`` has them. Statistics and norms are left out."""
        remat, n = self.model.remat, self.accumulation
        tables = traffic.Collectives()
        for ffw in self._retrievals():
            of = traffic.expert_mix_step if isinstance(ffw, PEER) else traffic.value_bag_step
            tables = tables.plus(of(*self._sizes(ffw), **self._element_sizes(ffw), remat=remat))
        tables = tables.received(self.E, self.D)
        experts = 0.0
        for block in self.model.blocks:
            if isinstance(block.ffw, MoE):
                sent = self.a * self.t * self._places(block.ffw) * self.model.d_model
                experts += (6 if remat else 4) * sent * (self.E - 1) / self.E
        kernels = gradients = 0.0
        for path, leaf, is_table in self._params():
            if is_table:  # the formulas above have them
                continue
            whole, F, copies = self._whole(leaf)
            passes = 2 if remat and path[0] == "blocks" else 1
            kernels += passes * whole * (F - 1) / F
            gradients += whole * (F - 1) / F + 2 * whole / F * (copies - 1) / copies
        return {
            TOKENS: n * (sum(tables) - tables.copies),
            EXPERTS: n * experts,
            TABLE_GRADIENTS: n * tables.copies,
            KERNELS: n * kernels,
            GRADIENTS: n * gradients,
        }
