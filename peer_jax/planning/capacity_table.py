"""Prints what ``peer_jax.planning.capacity`` has counted."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from peer_jax.planning.capacity import Device, Plan

GIB = 2**30


def show(plan: Plan, name: str, device: Device, step_tokens: int, devices: int) -> None:
    """Prints memory, exchanges, memory traffic and least time of a step, each in a table, and what follows from them.

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
    layers = " and ".join(plan.unknown)
    unknown = dict.fromkeys(plan.unknown, "unknown")  # a row of every table that lacks what such a layer needs

    memory = plan.memory
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "gradients": memory.fullest.gradients,
        "activations": memory.fullest.activations,
        "working arrays": memory.fullest.working + memory.other,
        "total": memory.total,
    }
    print_table(
        console, "memory per device", "GiB", unknown | {part: f"{size / GIB:.2f}" for part, size in parts.items()}
    )
    share = memory.total / device.memory
    verdict = "DOES NOT FIT" if share > 1 else "May fit" if unknown else "Fits"
    least = "at least " if unknown else ""
    console.print(f"{verdict}: {least}{share:.0%} of {device.memory / GIB:.1f} GiB, most in {memory.fullest.name}.")
    if share > 1:
        console.print(
            "Try a larger expert axis, Transformer.remat=True, a smaller Run.batch_size, a higher Run.accumulation, or "
            "an optimiser with a smaller state, such as AdamW with table_second_moment='row'."
        )

    step = plan.step
    for what, by_cause in (("received per step", step.interconnect), ("to and from memory", step.memory)):
        sizes = {cause: size for cause, size in by_cause.items() if size} | {"total": sum(by_cause.values())}
        print_table(console, what, "GiB", unknown | {cause: f"{size / GIB:.2f}" for cause, size in sizes.items()})

    seconds = step.seconds(device, plan.mesh)
    limit = max(seconds, key=seconds.__getitem__)
    print_table(console, "least time of a step", "ms", {what: f"{1e3 * time:.2f}" for what, time in seconds.items()})
    console.print(
        f"A step takes {1e3 * seconds[limit]:.3g} ms at least, limited by {limit}: "
        f"{step_tokens / seconds[limit]:,.0f} tokens/s at most."
    )
    if unknown:
        console.print(
            f"What {layers} keeps in memory and exchanges with other devices is unknown and not counted, so whether "
            "this fits is unknown, too: a layer can say it by a method costs(load), see peer_jax/layers/interface.py."
        )


def print_table(console: Console, what: str, unit: str, rows: dict[str, str]) -> None:
    """Prints two columns with the heads ``what`` and ``unit``."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column(what, no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
