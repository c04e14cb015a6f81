"""Compiles the programs of a run for devices that this machine lacks, and says what they take there.

The programs are those that the commands run, with the run's own mesh and shardings, without the checks of
``Run.checked``: nothing is modelled here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Sharding, SingleDeviceSharding

from peer_jax.errors import InputError
from peer_jax.models.generate import lower as lower_generation
from peer_jax.planning import hlo
from peer_jax.planning.topology import Topology, first_line
from peer_jax.sharding import AXES, Placement, compiled_for, current, target, use
from peer_jax.training.evaluate import lower as lower_evaluation
from peer_jax.training.run import Run


class Memory(NamedTuple):
    """Bytes per device: arguments, such as parameters and the optimiser's state; outputs that take the place of no
    argument; temporary arrays; and the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return sum(self)


class Compiled(NamedTuple):
    """A program of a run, compiled.

    Attributes:
        program: "step", "evaluation" or "generation".
        mesh: sizes of the axes.
        tables: whether expert tables are split by "rows" or "columns".
        tokens: how many tokens the program reads.
        memory: bytes per device.
        flops, bytes, seconds: per device, as the compiler counts and estimates them, with each loop counted for one
            turn; None if it doesn't, as for GPUs that this machine lacks.
        account: what the program's text says.
        text: the program's text.
    """

    program: str
    mesh: dict[str, int]
    tables: str
    tokens: int
    memory: Memory
    flops: float | None
    bytes: float | None
    seconds: float | None
    account: hlo.Account
    text: str


def compile_run(run: Run, topology: Topology, program: str = "step") -> Compiled:
    """Compiles a program of ``run`` for the devices of ``topology``.

    Args:
        run: what ``train`` takes.
        topology: the devices; all of them must have a place in the run's mesh.
        program: "step", a training step; "evaluation", a batch of an evaluation; or "generation", which ``generate``
            runs on one device: a row as long as those in training, of which a half is given.

    Raises:
        InputError: if the mesh, the batch or the memory that the program takes doesn't fit the devices, there is no
            such program, or cuDNN is missing.
    """
    if program not in _LOWERED:
        raise InputError(f"{program} is not one of {', '.join(_LOWERED)}", argument="program")
    placement = None if program == "generation" else _place(run, topology, program)
    with use(placement), compiled_for(topology.devices[0]):
        try:
            lowered, tokens = _LOWERED[program](run)
        except RuntimeError as error:  # JAX asks cuDNN itself for its version
            if "cuDNN" not in str(error):
                raise
            raise InputError(
                f"attention on {topology.name} is cuDNN's, which is not installed here: set "
                "Transformer.attention_implementation='xla' to compile without it"
            ) from error
        try:
            compiled = lowered.compile(compiler_options=_OPTIONS.get(topology.devices[0].platform))
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"{topology.name} can't hold the {program} ({first_line(error)[:200]}): set Transformer.remat=True, a "
                "larger Sharding.expert or a smaller Run.batch_size, or take more devices",
                argument="topology",
            ) from None
    cost, text = compiled.cost_analysis() or {}, compiled.as_text()
    return Compiled(
        program=program,
        mesh=dict.fromkeys(AXES, 1) if placement is None else dict(placement.mesh.shape),
        tables=run.sharding.tables,
        tokens=tokens,
        memory=_memory(compiled.memory_analysis()),
        flops=cost.get("flops"),
        bytes=cost.get("bytes accessed"),
        seconds=_seconds(cost),
        account=hlo.read(text),
        text=text,
    )


def _seconds(cost: Mapping[str, float]) -> float | None:
    """The compiler's estimate, which for some programs is zero or, with Pallas kernels, a negative number."""
    return cost["optimal_seconds"] if cost.get("optimal_seconds", 0.0) > 0 else None


# Without a GPU nothing can be timed, so the compiler takes kernels by its own rules.
_OPTIONS = {"gpu": {"xla_gpu_autotune_level": 0}}


def _place(run: Run, topology: Topology, program: str) -> Placement | None:
    """The placement of a run that has all of the devices."""
    sizes = run.sharding.sizes(len(topology.devices))
    if (used := math.prod(sizes.values())) < len(topology.devices):
        raise InputError(
            f"the mesh uses {used} of the {len(topology.devices)} devices of {topology.name}: set Sharding.data=-1, or "
            "take fewer devices",
            argument="topology",
        )
    placement = run.sharding.place(topology.devices)
    if placement is not None and program == "step":
        placement.check_rows("Run.batch_size / Run.accumulation", run.batch_size // run.accumulation)
    return placement


def _memory(held: Any) -> Memory:
    """What the compiler says that a program holds. Outputs that alias arguments take no memory of their own."""
    return Memory(
        arguments=held.argument_size_in_bytes,
        outputs=held.output_size_in_bytes - held.alias_size_in_bytes,
        temporaries=held.temp_size_in_bytes,
        program=held.generated_code_size_in_bytes,
    )


def _batch(run: Run, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = _sharding("batch")
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in run.task.example(1).items()
    }


def _sharding(*axes: str) -> Sharding:
    return SingleDeviceSharding(target()) if current() is None else current().sharding(*axes)


def _step(run: Run) -> tuple[jax.stages.Lowered, int]:
    trainer = run.trainer()
    rates = run.optimizer.rates(trainer.labels, 0, 1)
    batch = _batch(run, run.batch_size)
    lowered = trainer.compiled_step().lower(trainer.abstract_state(), batch, rates)
    return lowered, run.batch_size * run.task.seq_len


def _evaluation(run: Run) -> tuple[jax.stages.Lowered, int]:
    trainer, rows = run.trainer(), run.eval_batch_size()
    lowered = lower_evaluation(trainer.model(trainer.abstract_state()), _batch(run, rows))
    return lowered, rows * run.task.seq_len


def _generation(run: Run) -> tuple[jax.stages.Lowered, int]:
    trainer, size = run.trainer(), max(2, run.task.seq_len)
    return lower_generation(trainer.model(trainer.abstract_state()), size, size // 2), size


_LOWERED = {"step": _step, "evaluation": _evaluation, "generation": _generation}
