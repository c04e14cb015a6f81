"""Whether runs fit the devices that they are to be launched on, and what they cost at least, in device-hours."""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from peer_jax.errors import InputError
from peer_jax.memory import shown
from peer_jax.planning import capacity
from peer_jax.planning.capacity import Plan
from peer_jax.planning.tpus import compile_command
from peer_jax.training.run import Run

HOUR = 3600.0


class Planned(NamedTuple):
    """A run of so many steps with its plan on the devices of one slice."""

    name: str
    steps: int
    plan: Plan


class Cost(NamedTuple):
    """What the runs of one or more slices cost, if every step took its least time.

    Attributes:
        device: a name of ``capacity.DEVICES``.
        devices: how many of them a slice has.
        seconds: the least time of each run on one slice.
        runs: the runs, in the order of ``seconds``.
    """

    device: str
    devices: int
    seconds: list[float]
    runs: list[Planned]

    @property
    def device_hours(self) -> float:
        """Of all runs, with every step at its least time."""
        return sum(self.seconds) * self.devices / HOUR

    @property
    def peak_hours(self) -> float:
        """Device-hours of all runs if their FLOPs were done at the devices' peak, which no program reaches."""
        flops = sum(run.steps * run.plan.step.flops for run in self.runs) * self.devices
        return flops / capacity.DEVICES[self.device].flops / HOUR

    def hours(self, slices: int) -> float:
        """Until the last run has ended, if each slice takes the longest run that is left whenever it has ended one."""
        free = [0.0] * slices
        for seconds in sorted(self.seconds, reverse=True):
            heapq.heapreplace(free, free[0] + seconds)
        return max(free) / HOUR

    def sentences(self, slices: int, what: str) -> Iterator[str]:
        """What a person wants to know before these devices are paid for.

        Args:
            slices: how many slices share the runs.
            what: the name of one slice.
        """
        fullest = max(self.runs, key=lambda run: run.plan.memory.total)
        share = fullest.plan.memory.total / capacity.DEVICES[self.device].memory
        runs = f"{len(self.runs)} runs fit" if len(self.runs) > 1 else "The run fits"
        yield (
            f"{runs} {what} ({self.devices} devices) by the least that a step takes; {fullest.name} takes at least "
            f"{share:.0%} of a device's memory. For the peak, see {compile_command(self.device, self.devices)}."
        )
        if unknown := sorted({label for run in self.runs for label in run.plan.unknown}):
            yield f"What {' and '.join(unknown)} exchanges with other devices is unknown and not counted."
        longest = max(self.seconds)
        yield (
            f"Cost: at least {_short(self.device_hours)} device-hours of {self.device}, if every step takes the least "
            f"time that its FLOPs, its state and its exchanges allow on paper ({_short(self.peak_hours)} for FLOPs "
            "alone). Real steps are slower, and compiling, evaluating, saving and waiting come on top: measure some "
            "steps, and scale."
        )
        yield (
            f"Time: at least {_short(self.hours(slices))} hours on {slices} slice{'s' * (slices > 1)}; the longest run "
            f"takes {_short(longest / HOUR)}."
        )
        useful = min(len(self.runs), math.ceil(sum(self.seconds) / longest))
        if slices > useful:
            yield f"More than {useful} slices are idle for part of the time: --slices {useful} takes about as long."


def _short(hours: float) -> str:
    """Writes hours to a tenth, or small ones to two digits."""
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def plan_on(name: str, run: Run, devices: int) -> Plan:
    """The plan of a run on so many devices.

    Raises:
        InputError: if its batch or its mesh can't be split over them; the message names the run.
    """
    try:
        return capacity.plan(run, devices=devices)
    except InputError as error:
        raise InputError(f"{name} can't run on {devices} devices: {error}") from error


def cost(runs: Sequence[Planned], device: str, devices: int, what: str) -> Cost:
    """What the runs cost on slices of so many devices.

    Args:
        runs: at least one.
        device: a name of ``capacity.DEVICES``.
        devices: how many of them a slice has.
        what: the name of a slice.

    Raises:
        InputError: if a run doesn't fit a device's memory, or leaves devices of a slice idle.
    """
    on = capacity.device(device)
    for run in runs:
        if (used := math.prod(run.plan.mesh.values())) < devices:
            raise InputError(
                f"{run.name} uses {used} of the {devices} devices of {what}: set Sharding.data=-1 or take fewer"
            )
    if large := [run for run in runs if run.plan.memory.total > on.memory]:
        largest = max(large, key=lambda run: run.plan.memory.total)
        raise InputError(
            f"{len(large)} of {len(runs)} runs don't fit {what}: {largest.name} takes at least "
            f"{shown(largest.plan.memory.total)} on each device, which has {shown(on.memory)}: take a larger slice, or "
            "a larger Sharding.expert, Transformer.remat=True, a smaller Run.batch_size or a higher Run.accumulation"
        )
    seconds = [run.steps * max(run.plan.step.seconds(on, run.plan.mesh).values()) for run in runs]
    return Cost(device, devices, seconds, list(runs))
