"""Prints what ``peer_jax.planning.capacity`` has counted."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from peer_jax.planning.capacity import Device, Plan
from peer_jax.planning.tpus import compile_command

GIB = 2**30


def show(plan: Plan, name: str, device: Device, step_tokens: int, devices: int) -> None:
    """Prints memory, exchanges and least time of a step, each in a table, and what follows from them.

    Args:
        plan: the plan of a run.
        name, device: the device that the run is planned for.
        step_tokens: tokens per step, on all devices together.
        devices: the number of devices, which may be more than the mesh has.
    """
    console = Console(highlight=False, soft_wrap=True)
    used = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    left_out = f" of {devices}" if used < devices else ""
    console.print(f"{used}{left_out} {name}: {mesh}; tables by {plan.tables}; {step_tokens:,} tokens per step")

    memory = plan.memory
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "statistics and batch": memory.other,
        "gradients or activations, at least": memory.working,
        "total, at least": memory.total,
    }
    print_table(console, "memory per device", "GiB", {part: f"{size / GIB:.2f}" for part, size in parts.items()})
    share = memory.total / device.memory
    console.print(f"{'DOES NOT FIT: a' if share > 1 else 'A'}t least {share:.0%} of {device.memory / GIB:.1f} GiB.")
    if share > 1:
        console.print(
            "Try a larger expert axis, Transformer.remat=True, a smaller Run.batch_size, a higher Run.accumulation, or "
            "an optimiser with a smaller state, such as AdamW with table_second_moment='row'."
        )
    else:
        console.print(f"How much a step takes at its peak, its compiler says: {compile_command(name, used)}.")

    step = plan.step
    sizes = {cause: size for cause, size in step.interconnect.items() if size}
    sizes |= {"total": sum(step.interconnect.values())}
    unknown = dict.fromkeys(plan.unknown, "unknown")
    received = unknown | {cause: f"{size / GIB:.2f}" for cause, size in sizes.items()}
    print_table(console, "received per step", "GiB", received)

    seconds = step.seconds(device, plan.mesh)
    limit = max(seconds, key=seconds.__getitem__)
    print_table(console, "least time of a step", "ms", {what: f"{1e3 * time:.2f}" for what, time in seconds.items()})
    console.print(
        f"A step takes {1e3 * seconds[limit]:.3g} ms at least, limited by {limit}: "
        f"{step_tokens / seconds[limit]:,.0f} tokens/s at most."
    )
    if unknown:
        console.print(
            f"What {' and '.join(plan.unknown)} exchanges with other devices is unknown and not counted: a layer can "
            "say it by a method exchanged(load), see peer_jax/layers/interface.py."
        )


def print_table(console: Console, what: str, unit: str, rows: dict[str, str]) -> None:
    """Prints two columns with the heads ``what`` and ``unit``."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column(what, no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
