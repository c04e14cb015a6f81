"""Prints what ``peer_jax.planning.capacity`` has counted."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from peer_jax.planning.capacity import Device, Plan

GIB = 2**30


def show(plan: Plan, name: str, device: Device, step_tokens: int, devices: int) -> None:
    """Memory, exchanges, memory traffic and floor of a step, each a table, and what they come to in a sentence.

    Args:
        plan: of the run.
        name, device: what it runs on.
        step_tokens: tokens of a step, of all devices.
        devices: how many there are.
    """
    console = Console(highlight=False, soft_wrap=True)
    used = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    left_out = f" of {devices}" if used < devices else ""
    console.print(f"{used}{left_out} {name}: {mesh}; tables by {plan.tables}; {step_tokens:,} tokens a step")

    memory = plan.memory
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "gradients": memory.fullest.gradients,
        "activations": memory.fullest.activations,
        "working arrays": memory.fullest.working + memory.other,
        "total": memory.total,
    }
    _print(console, "memory a device", "GiB", {part: f"{size / GIB:.2f}" for part, size in parts.items()})
    share = memory.total / device.memory
    console.print(
        f"{'Fits' if share <= 1 else 'DOES NOT FIT'}: {share:.0%} of {device.memory / GIB:.1f} GiB, "
        f"most in {memory.fullest.name}."
    )
    if share > 1:
        console.print(
            "Try a larger expert axis, Transformer.remat=True, a smaller Run.batch_size or a higher Run.accumulation, "
            "or AdamW.table_second_moment='row'."
        )

    step = plan.step
    for what, by_cause in (("received from others, a step", step.interconnect), ("to and from memory", step.memory)):
        sizes = {cause: size for cause, size in by_cause.items() if size} | {"total": sum(by_cause.values())}
        _print(console, what, "GiB", {cause: f"{size / GIB:.2f}" for cause, size in sizes.items()})

    seconds = step.seconds(device, plan.mesh)
    limit = max(seconds, key=seconds.__getitem__)
    _print(console, "least time of a step", "ms", {what: f"{1e3 * time:.2f}" for what, time in seconds.items()})
    console.print(
        f"A step takes {1e3 * seconds[limit]:.3g} ms at least, limited by {limit}: "
        f"{step_tokens / seconds[limit]:,.0f} tokens/s at most."
    )


def _print(console: Console, what: str, unit: str, rows: dict[str, str]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(what, no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
